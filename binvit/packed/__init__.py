"""What deploys: trained binary vision transformers folded into bits."""

from binvit.packed.blueprint import Blueprint
from binvit.packed.export import export_onnx
from binvit.packed.files import load, save
from binvit.packed.header import Card, Vit
from binvit.packed.pack import pack
from binvit.packed.shipped import list_models
from binvit.packed.vit import PARTS, PackedViT

__all__ = ["PARTS", "Blueprint", "Card", "PackedViT", "Vit", "export_onnx", "list_models", "load", "pack", "save"]
