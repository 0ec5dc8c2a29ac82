"""Binarization rules: what each binarizer computes, forward and backward, written once as plain tensor formulas.

A rule is a small frozen record without tensors. It turns a tensor `x` into *planes*, pairs of small integer levels
and a scale, whose sum `scale * levels` is what the network computes with, and it knows the gradient that flows back
to `x` and to the rule's parameters. `binvit.nn.products` makes autograd functions of rules, `binvit.nn.layers`
makes layers of them, `binvit.packed` reads the same levels and scales to fold a trained layer into bits.

Notation in the docstrings: g is the gradient with respect to the binarized tensor, 1[.] an indicator, n the number of
elements, a the scale. sign(0) = +1 everywhere.
"""

from binvit.nn.rules.base import SMALLEST_SCALE, Float, Form, Plane, Rule, reduce_to, sign, superpose
from binvit.nn.rules.elastic import Bwn, Elastic
from binvit.nn.rules.gsb import REDUCTIONS, Gsb, GsbAttention, GsbValue, check_thresholds, largest
from binvit.nn.rules.maps import HeadSign, MapEde, MapLearned, MapThreshold, ScoreSign, ThreeMaps
from binvit.nn.rules.signs import Ede, LearnedOutput, LearnedRow, Sign, centred, window

__all__ = [
    "REDUCTIONS",
    "SMALLEST_SCALE",
    "Bwn",
    "Ede",
    "Elastic",
    "Float",
    "Form",
    "Gsb",
    "GsbAttention",
    "GsbValue",
    "HeadSign",
    "LearnedOutput",
    "LearnedRow",
    "MapEde",
    "MapLearned",
    "MapThreshold",
    "Plane",
    "Rule",
    "ScoreSign",
    "Sign",
    "ThreeMaps",
    "centred",
    "check_thresholds",
    "largest",
    "reduce_to",
    "sign",
    "superpose",
    "window",
]
