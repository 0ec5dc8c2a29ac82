"""The float model that a recipe describes."""

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from binvit.lab.recipes import Recipe


def build_model(recipe: Recipe, num_classes: int, image_size: int, pretrained: bool = False) -> VisionTransformer:
    """Build the float model of a recipe.

    Args:
        recipe: the model's shape.
        num_classes: outputs of each head.
        image_size: pixels of an image's side; images are square.
        pretrained: load timm's pretrained weights, which timm downloads.

    Returns:
        A timm vision transformer, images (B, 3, H, W) -> logits (B, num_classes).

    Raises:
        ValueError: the image is not divisible into patches, or timm does not know the model.
    """
    if recipe.model is not None:
        if not timm.is_model(recipe.model):
            raise ValueError(f"timm knows no model named {recipe.model!r} (the recipe's field model).")
        size = {"img_size": image_size, "drop_path_rate": recipe.drop_path}
        model = timm.create_model(recipe.model, pretrained=pretrained, num_classes=num_classes, **size)
        if not isinstance(model, VisionTransformer):
            raise ValueError(f"The recipe's model must be a vision transformer, got {recipe.model!r}.")
        return model
    patch_size = recipe.patch_size or max(2, image_size // 8)
    if image_size % patch_size:
        raise ValueError(f"The image size {image_size} is not divisible by the patch size {patch_size}.")
    cls = VisionTransformerDistilled if recipe.distilled else VisionTransformer
    return cls(
        img_size=image_size,
        patch_size=patch_size,
        num_classes=num_classes,
        embed_dim=recipe.width,
        depth=recipe.depth,
        num_heads=recipe.heads,
        mlp_ratio=recipe.mlp_ratio,
        global_pool=recipe.global_pool,
        class_token=recipe.global_pool == "token",
        drop_path_rate=recipe.drop_path,
        norm_layer=torch.nn.LayerNorm,
    )
