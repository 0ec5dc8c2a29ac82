"""What deploys: trained binary vision transformers folded into bits."""

from binvit.packed.blueprint import Blueprint
from binvit.packed.files import load, save
from binvit.packed.pack import pack
from binvit.packed.vit import PARTS, PackedViT

__all__ = ["PARTS", "Blueprint", "PackedViT", "load", "pack", "save"]
