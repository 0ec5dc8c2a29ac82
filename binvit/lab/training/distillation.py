"""The training loss: labels, a teacher's answers and similarities of tokens, the distance of weights from signs."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from binvit.lab.training.recipe import Recipe
from binvit.nn.linear import BinaryLinear


def training_loss(
    outputs: Tensor | tuple[Tensor, Tensor],
    images: Tensor,
    targets: Tensor,
    recipe: Recipe,
    teacher: VisionTransformer | None = None,
    projections: Sequence[Tensor] = (),
) -> Tensor:
    """Return the loss of a batch: cross entropy with the labels, mixed with the distance from a teacher's answers.

    With the distance D and the recipe's alpha the loss is (1 - alpha) CE(logits, targets) + alpha D. Hard distillation
    has D = CE(logits, argmax of the teacher), soft distillation with the temperature t has
    D = t^2 KL(softmax(teacher / t) || softmax(logits / t)). `similarity` times `similarity_loss` comes on top.

    Args:
        outputs: logits (B, C), or those of class head and distillation head; the latter learns from the teacher.
        images: the batch, (B, 3, H, W), which the teacher sees, too.
        targets: classes (B,), or shares of classes (B, C) from Mixup, which has smoothed them itself.
        recipe: distillation, alpha, temperature, similarity and label smoothing.
        teacher: the model to distil from; None leaves the labels alone.
        projections: what `recorded` has collected of the model for `similarity_loss`.

    Returns:
        A number, shape ().
    """
    logits, distilled = outputs if isinstance(outputs, tuple) else (outputs, outputs)
    loss = F.cross_entropy(logits, targets, label_smoothing=recipe.label_smoothing if targets.ndim == 1 else 0.0)
    if teacher is None:
        return loss
    with torch.no_grad(), recorded(teacher, recipe) as taught_projections:
        taught = teacher(images)
    if recipe.distillation == "hard":
        distance = F.cross_entropy(distilled, taught.argmax(1))
        loss = (1 - recipe.alpha) * loss + recipe.alpha * distance
    elif recipe.distillation == "soft":
        student, warm = (F.log_softmax(item / recipe.temperature, dim=1) for item in (distilled, taught))
        distance = F.kl_div(student, warm, reduction="batchmean", log_target=True) * recipe.temperature**2
        loss = (1 - recipe.alpha) * loss + recipe.alpha * distance
    if recipe.similarity:
        heads = teacher.blocks[0].attn.num_heads
        loss = loss + recipe.similarity * similarity_loss(projections, taught_projections, heads)
    return loss


def weight_penalty(weights: Sequence[Tensor]) -> Tensor:
    """Return how far latent weights are from -1 and +1: the mean over matrices of mean | |W| - 1 |.

    Args:
        weights: latent weights, each (out, in).

    Returns:
        A number, shape ().

    References:
        Gao et al., BHViT: Binarized hybrid vision transformer, 2025, arXiv 2503.02394: the loss is 0.9 times the others
        and 0.1 times this penalty in the last tenth of the epochs; the released code has a switch for a resumed run.
    """
    return torch.stack([(w.abs() - 1).abs().mean() for w in weights]).mean()


def one_bit_weights(model: nn.Module) -> list[Tensor]:
    """Return the latent weights of a model's layers with 1-bit weights, those of separate parts apart."""
    layers = [module for module in model.modules() if isinstance(module, BinaryLinear)]
    rules = [layer.weight_binarizers[0].rule for layer in layers]
    binary = [not rule.is_float and (rule.lowest, rule.highest) == (-1, 1) for rule in rules]
    return [
        w for layer, is_binary in zip(layers, binary, strict=True) if is_binary for w in layer.matrix.chunk(layer.parts)
    ]


def recorded(model: VisionTransformer, recipe: Recipe) -> AbstractContextManager[Sequence[Tensor]]:
    """Collect what `training_loss` needs of a model's forward pass beside its outputs."""
    return recorded_projections(model) if recipe.similarity else nullcontext(())


def similarity_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], heads: int) -> Tensor:
    """Return the distance between the normalized similarity matrices of two models.

    With x (N, d) the query, key or value of one head, before it is shifted and binarized, S = x x^T and
    P = S / ||S||, it is

        L = sum over blocks and over query, key, value of the mean over images and heads of ||P_student - P_teacher||,

    all norms being Frobenius norms. P does not change with the size of x, nor when all of its tokens are rotated.

    Args:
        student: what the qkv projection of each block puts out, (B, N, 3 * heads * d).
        teacher: the same of the teacher, whose d may be another.
        heads: attention heads of both.

    Returns:
        A number, shape (), from 0 to 3 sqrt(2) per block.

    References:
        Qin et al., BiBERT: Accurate fully binarized BERT, ICLR 2022, direction-matching distillation. Their released
        code divides all matrices of a batch by one norm; here each matrix has its own, so that an image's distance
        does not depend on its batch. The distance between hidden states, which that code adds, is left out.
    """
    differences = [
        _similarities(own, heads) - _similarities(theirs, heads) for own, theirs in zip(student, teacher, strict=True)
    ]
    distances = torch.linalg.vector_norm(torch.stack(differences), dim=(-2, -1))  # (blocks, 3, B, heads)
    return distances.mean(dim=(2, 3)).sum()


def _similarities(qkv: Tensor, heads: int) -> Tensor:
    """Return P of query, key and value, (3, B, heads, N, N)."""
    b, n, _ = qkv.shape
    x = qkv.view(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
    s = x @ x.mT
    return s / torch.linalg.vector_norm(s, dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)


@contextmanager
def recorded_projections(model: VisionTransformer) -> Iterator[list[Tensor]]:
    """Collect what the qkv projection of each block puts out during one forward pass.

    Args:
        model: a timm vision transformer, binarized or not.

    Returns:
        A context; its value is a list that the forward pass fills with one tensor (B, N, 3 * D) per block.
    """
    found: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(output)

    hooks = [block.attn.qkv.register_forward_hook(keep) for block in model.blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def check_comparable(model: VisionTransformer, teacher: nn.Module) -> None:
    """Raise a ValueError unless two models have similarity matrices of the same number and size."""
    if not isinstance(teacher, VisionTransformer):
        raise ValueError(
            f"Similarity distillation needs a vision transformer as teacher, got {type(teacher).__name__}."
        )
    if _shape(model) != _shape(teacher):
        raise ValueError(
            "Similarity distillation compares block by block and head by head: the model has "
            f"{_shape(model)}, the teacher {_shape(teacher)}."
        )


def _shape(model: VisionTransformer) -> str:
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    return f"{len(model.blocks)} blocks of {model.blocks[0].attn.num_heads} heads on {tokens} tokens"
