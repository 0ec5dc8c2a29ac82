"""What trains: binarization rules, layers, schemes and the conversion of timm models."""

from binvit.nn import functional
from binvit.nn.block_parts import LayerEnd, RPReLU
from binvit.nn.catalogue import CATALOGUE, list_schemes, scheme
from binvit.nn.convert import binarize, init_latent_weights, round_vectors, set_progress
from binvit.nn.layer_parts import AttentionBias, Binarizer
from binvit.nn.layers import BinaryAttention, BinaryMlp
from binvit.nn.linear import BinaryLinear, BinaryPatchConv
from binvit.nn.model import calibrate
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
    "LayerEnd",
    "RPReLU",
    "Scheme",
    "binarize",
    "calibrate",
    "functional",
    "init_latent_weights",
    "list_schemes",
    "load_official_gsb",
    "round_vectors",
    "scheme",
    "set_progress",
]
