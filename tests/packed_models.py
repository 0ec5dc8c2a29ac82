"""Small trained vision transformers for the tests of the packed engine."""

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

import binvit

IMAGE = (3, 16, 16)
# ReActNet without the parts that the fast path has no kernels for: what is left are shifts and shifted PReLUs.
SIMPLE = dict.fromkeys(("own_input", "context_norm", "context_residual", "separate_qkv"), False) | {"norm": "none"}
CLASSES = 5


def images(count, seed=1):
    return torch.randn(count, *IMAGE, generator=torch.Generator().manual_seed(seed))


def vit(distilled=False, **options):
    """A timm model of 17 or 18 tokens, width 48 and heads of 16 channels."""
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": CLASSES}
    torch.manual_seed(0)
    return (VisionTransformerDistilled if distilled else VisionTransformer)(**sizes | options)


def trained(scheme, distilled=False, steps=2, seed=0, model=None, **options):
    """A binarized model after a few steps on noise: every shift, scale and bias has moved."""
    model = binvit.binarize(vit(distilled, **options) if model is None else model, scheme)
    torch.manual_seed(seed)
    for parameter in model.parameters():  # thresholds with values of their own, whatever the gradient does to them
        if parameter.dim() and not parameter.detach().any():
            parameter.data.normal_(std=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(steps):
        x, y = images(8, seed=seed + 100 + step), torch.randint(0, CLASSES, (8,))
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def logits_of(model, x):
    return model(x)
