"""Attention is read as the blocks use it."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import binvit
from binvit.lab.analysis import attention


def model(scheme: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=8, patch_size=2, num_classes=3, embed_dim=16, depth=2, num_heads=2, qk_norm=True)
    made = binvit.binarize(vit, binvit.scheme(scheme, **options)).train()
    made(torch.randn(8, 3, 8, 8))  # sets the scales
    return made.eval()


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_float_attention_is_what_timm_computes():
    vit = model("float")
    weights = attention.attention_weights(vit, images())
    assert weights.shape == (2, 4, 2, 17, 17)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 2, 17))
    x = vit.blocks[0].norm1(vit._pos_embed(vit.patch_embed(images())))
    layer = vit.blocks[0].attn
    value = layer.qkv(x).view(4, 17, 3, 2, 8).permute(2, 0, 3, 1, 4)[2]
    by_hand = layer.proj((weights[0] @ value).transpose(1, 2).reshape(4, 17, 16))
    torch.testing.assert_close(layer(x), by_hand)


@pytest.mark.parametrize(
    ("scheme", "options", "most"), [("bit", {}, 2), ("gsb", {}, 6), ("gsb", {"thresholds": ()}, 2)]
)
def test_binary_attention_has_few_levels(scheme, options, most):
    vit = model(scheme, **options)
    weights = attention.attention_weights(vit, images())
    assert 1 <= attention.levels(weights) <= most
    assert weights.min() == 0


def test_reading_attention_leaves_no_trace():
    for scheme in ("float", "gsb"):
        vit = model(scheme)
        before = vit(images())
        attention.attention_weights(vit, images())
        assert torch.equal(vit(images()), before)
        assert not any(block.attn._forward_pre_hooks for block in vit.blocks)
        assert not any(getattr(block.attn, "record", False) for block in vit.blocks)
