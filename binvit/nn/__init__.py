"""What trains: binarization rules, layers, schemes and the conversion of timm models."""

from binvit.nn import functional
from binvit.nn.catalogue import CATALOGUE, list_schemes, scheme
from binvit.nn.convert import binarize, calibrate, round_vectors, set_progress
from binvit.nn.layer_parts import AttentionBias, Binarizer, RPReLU, Shortcut
from binvit.nn.layers import BinaryAttention, BinaryLinear, BinaryMlp, BinaryPatchConv
from binvit.nn.official_gsb import load_official_gsb
from binvit.nn.schemes import COMPONENTS, PLACES, Scheme

__all__ = [
    "CATALOGUE",
    "COMPONENTS",
    "PLACES",
    "AttentionBias",
    "Binarizer",
    "BinaryAttention",
    "BinaryLinear",
    "BinaryMlp",
    "BinaryPatchConv",
    "RPReLU",
    "Scheme",
    "Shortcut",
    "binarize",
    "calibrate",
    "functional",
    "list_schemes",
    "load_official_gsb",
    "round_vectors",
    "scheme",
    "set_progress",
]
