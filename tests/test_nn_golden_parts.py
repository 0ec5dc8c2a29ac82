"""Rules, linear layers and parts of blocks of the other binarizers against the numbers of their official codes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from golden_methods import check, close, golden
from torch import Tensor, nn

import binvit
from binvit.nn import products
from binvit.nn.block_parts import ChannelScale, LayerEnd, RPReLU
from binvit.nn.layer_parts import Binarizer
from binvit.nn.linear import BinaryLinear
from binvit.nn.rules import Ede, Rule, Sign, ThreeMaps

EXACT = Sign(scale="row", window="closed", factor="exact")


def rule_of(scheme: str, place: str) -> Rule:
    return binvit.scheme(scheme).rule(place)


# Part of the file -> the rule, of a scheme and place where a scheme has it.
RULES: dict[str, Rule] = {
    "bnn/binarize": rule_of("bnn", "weight"),
    "xnor/activation": rule_of("xnor", "input"),
    "xnor++/activation": rule_of("xnor++", "input"),
    "bireal/activation": rule_of("bireal", "input"),
    "bireal/weight": rule_of("bireal", "weight"),
    "irnet/activation_start": rule_of("irnet", "input"),
    "irnet/activation_half": rule_of("irnet", "input"),
    "irnet/activation_late": rule_of("irnet", "input"),
    "irnet/weight_start": rule_of("irnet", "weight"),
    "irnet/weight_half": rule_of("irnet", "weight"),
    "irnet/weight_late": rule_of("irnet", "weight"),
    "reactnet/weight": rule_of("bireal", "weight"),  # the convolutional code; the transformer version centres
    "binaryvit/activation": rule_of("binaryvit", "value"),
    "binaryvit/weight": rule_of("reactnet", "weight"),
    "binaryvit/conv_weight": rule_of("bireal", "weight"),
    "binaryvit/map": rule_of("binaryvit", "attention"),
    "binaryvit/map_large_scale": rule_of("reactnet", "attention"),
    "bhvit-qd/activation": rule_of("bhvit-qd", "query"),
    "bhvit-qd/weight": rule_of("bhvit-qd", "weight"),
    "bhvit-qd/map": rule_of("bhvit-qd", "attention"),
    "bhvit-qd/map_no_offset": rule_of("bhvit-qd", "attention"),
}
OFFICIAL = {"sharpness": "t"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("part", RULES)
def test_rules(part, dtype):
    arrays, rule = golden(part), RULES[part]
    name = "w" if "w" in arrays else "x"
    shape = rule.parameter_shape(channels=len(arrays[name]), heads=arrays[name].shape[1])
    parameters = [arrays[OFFICIAL.get(p, p)].to(dtype, copy=True).reshape(shape) for p in rule.parameters]
    for parameter in parameters:
        parameter.requires_grad_(rule.learned)
    x = arrays[name].to(dtype, copy=True).requires_grad_()
    y = products.binarize(x, rule, *parameters)
    # The official sign of 0 is 0, ours +1; no rule of {0, 1} has such a case.
    close(y, arrays["y"], where=arrays[name] != 0 if rule.lowest < 0 else None, what="y")
    y.backward(arrays["gy"].to(dtype))
    close(x.grad, arrays[f"g{name}"], what=f"g{name}")
    for parameter, value in zip(rule.parameters, parameters, strict=True):
        if rule.learned:
            close(value.grad, arrays[f"g{parameter}"], 1e-5 if dtype == torch.float64 else 5e-5, what=parameter)


@pytest.mark.parametrize(("part", "heads"), [("bhvit-qd/map_init", 4), ("bhvit-qd/map_init_197", 2)])
def test_the_first_pass_sets_step_and_offset_of_three_maps(part, heads):
    arrays = golden(part)
    x = arrays.get("x")
    if x is None:
        generator = torch.Generator().manual_seed(int(arrays["x_seed"]))
        x = torch.randn(1, heads, 197, 197, generator=generator).softmax(-1)
    binarizer = Binarizer(ThreeMaps(), heads=heads).train()
    scale, offset = binarizer.values(x)
    close(scale, arrays["scale"])
    close(offset, arrays["offset"])
    levels = sum(plane.levels for plane in binarizer.planes(x))
    if "y" in arrays:
        close(levels * scale, arrays["y"])
    else:
        shares = torch.stack([(levels == level).float().mean() for level in range(4)])
        close(shares, arrays["level_shares"], 1e-3)
        close((levels > 0).float().mean(), arrays["share_nonzero"], 1e-3)


def test_a_map_of_binaryvit_starts_at_its_constant():
    (scale,) = RULES["binaryvit/map"].initial(torch.rand(2, 3, 4, 4))
    close(scale, golden("binaryvit/init")["attention.attention.att_prob_clip"])


def test_xnor_centres_and_clips_its_latent_weights_for_good():
    arrays = golden("xnor/weight")
    layer = BinaryLinear(nn.Linear(24, 16), EXACT, Sign(), latent=binvit.scheme("xnor").latent)
    layer.weight.data.copy_(arrays["w"])
    close(layer.eval().constrained(), arrays["w_stored"])
    assert torch.equal(layer.weight, arrays["w"])
    weights = layer.train().constrained()
    close(layer.weight, arrays["w_stored"])
    y = products.binarize(weights, EXACT)
    close(y, arrays["y"])
    y.backward(arrays["gy"])
    close(23 * layer.weight.grad, arrays["gw"])  # that code's factor (1 - 1/24) 24


def test_the_factor_of_the_inputs_of_xnor_k_is_the_mean_of_their_sizes():
    rule = rule_of("xnor-k", "input")
    arrays = golden("xnor/activation")
    (plane,) = rule.planes(arrays["x"])
    close(plane.scale, arrays["mean_abs"])
    arrays = golden("xnor/input_mean_map")
    (plane,) = rule.planes(arrays["x"].movedim(1, -1))
    close(plane.scale.movedim(-1, 1), arrays["mean_abs"])


def test_the_gradient_of_irnet_sharpens_with_the_epochs():
    arrays = golden("irnet/schedule")
    for epoch, t, k in zip(arrays["epoch"], arrays["t"], arrays["k"], strict=True):
        sharpness = torch.tensor(Ede.progress(float(epoch / arrays["epochs"])))
        close(sharpness, t)
        close(Ede.slope(torch.zeros(()), sharpness), k * t)


def double(layer: nn.Module) -> nn.Module:
    return layer.train().double()


def linear(weight: Rule, input: Rule, **options: object) -> BinaryLinear:
    return double(BinaryLinear(nn.Linear(24, 16), weight, input, **options))


BOTH = {"weight": "weight", "bias": "bias"}


def test_linear_layers():
    through = rule_of("bnn", "weight")
    check(linear(through, through), "bnn/linear", BOTH)
    rules = rule_of("binaryvit", "weight"), rule_of("binaryvit", "input")
    check(linear(*rules, linear_bias="never"), "binaryvit/linear", {"weight": "weight"})


@pytest.mark.parametrize(("part", "weight"), [("linear", "sign_open"), ("linear_recipe", "sign_mean_exact")])
def test_linear_layers_of_xnor_plus_plus(part, weight):
    scheme = binvit.scheme("xnor++", weight=weight)
    assert weight == "sign_mean_exact" or scheme == binvit.scheme("xnor++")
    layer = linear(scheme.rule("weight"), scheme.rule("input"), post=LayerEnd(24, 16, factor=scheme.output_factor))
    check(layer, f"xnor++/{part}", BOTH | {"post.factor": "post.alpha"})


@pytest.mark.parametrize("when", ["start", "half", "late"])
def test_linear_layers_of_irnet(when):
    arrays = golden(f"irnet/linear_{when}")
    layer = linear(rule_of("irnet", "weight"), rule_of("irnet", "input"))
    for binarizer in (layer.weight_binarizer, layer.input_binarizer):
        binarizer.sharpness.copy_(arrays["t"].squeeze())
    layer.weight.data.copy_(arrays["w"])
    layer.bias.data.copy_(arrays["bias"])
    x = arrays["x"].double().requires_grad_()
    y = layer(x)
    y.backward(arrays["gy"].double())
    for got, want in ((y, "y"), (x.grad, "gx"), (layer.weight.grad, "gw"), (layer.bias.grad, "gbias")):
        close(got, arrays[want], what=want)


def test_shifted_signs_of_reactnet():
    arrays = golden("reactnet/activation")
    layer = BinaryLinear(nn.Linear(24, 24, bias=False), Sign(), rule_of("reactnet", "input"), shift=True)
    x, shift = (arrays[name].clone().requires_grad_() for name in ("x", "shift"))
    y = products.binarize(x + shift, layer.input_binarizer.rule)
    close(y, arrays["y"], where=arrays["x"] + arrays["shift"] != 0)
    y.backward(arrays["gy"])
    close(x.grad, arrays["gx"])
    close(shift.grad, arrays["gshift"])
    assert torch.equal(layer.shift.detach(), golden("reactnet/init")["shift"])


def test_shifted_prelu():
    arrays = golden("reactnet/rprelu")
    layer, start = RPReLU(24), golden("reactnet/init")
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter.detach(), start[name])
        parameter.data.copy_(arrays[name])
    x = arrays["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(arrays["gy"])
    close(y, arrays["y"])
    close(x.grad, arrays["gx"])
    for name, parameter in layer.named_parameters():
        close(parameter.grad, arrays[f"g{name}"], what=name)
    names = {"shift_in": "move1", "shift_out": "move2", "slope": "prelu.weight"}
    check(double(RPReLU(24)), "binaryvit/rprelu", names, negated=("move1",))  # its code subtracts the first shift


def test_layer_scale():
    check(double(ChannelScale(24)), "binaryvit/layerscale", {"alpha": "alpha", "beta": "move"})


def test_factors_of_xnor_plus_plus_start_at_one():
    assert torch.equal(LayerEnd(24, 16, factor=True).factor.detach(), golden("xnor++/init")["scale"])


# --- the blocks of convolutional nets, with the normalization they have


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm over everything but the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view_as(x)


class Convolution(nn.Module):
    """A 3x3 convolution by two rules and what a scheme puts after a 1-bit layer."""

    def __init__(self, scheme: str, weight: str, shift: bool = False) -> None:
        super().__init__()
        fields = binvit.scheme(scheme)
        self.weight = nn.Parameter(torch.empty(8, 8, 3, 3))
        self.shift = nn.Parameter(torch.empty(8, 1, 1)) if shift else None
        self.weights = Binarizer(fields.rule("weight") if weight == "own" else rule_of(weight, "weight"))
        self.inputs = Binarizer(fields.rule("input"))
        self.end = LayerEnd(8, 8, norm=True, own_input=fields.own_input, activation=fields.layer_activation)
        self.end.norm = TokenBatchNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        shifted = x if self.shift is None else x + self.shift
        signs = products.binarize(shifted, self.inputs.rule, *self.inputs.values(shifted))
        w = self.weight.flatten(1)
        weight = products.binarize(w, self.weights.rule, *self.weights.values(w)).view_as(self.weight)
        y = F.conv2d(signs, weight, padding=1)
        return self.end(y.movedim(1, -1), x.movedim(1, -1)).movedim(-1, 1)


def batch_norm(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}


def test_basic_block_of_bireal():
    names = {"weight": "binary_conv.weights"} | batch_norm("end.norm", "bn1")
    check(double(Convolution("bireal", "own")), "bireal/basic_block", names)


def test_basic_block_of_reactnet():
    names = {"weight": "binary_conv.weight", "shift": "move0.bias"} | batch_norm("end.norm", "bn1")
    rprelu = {"shift_in": "move1.bias", "slope": "prelu.weight", "shift_out": "move2.bias"}
    names |= {f"end.activation.{mine}": theirs for mine, theirs in rprelu.items()}
    check(double(Convolution("reactnet", "bireal", shift=True)), "reactnet/basic_block", names)


def test_basic_block_of_irnet():
    block = double(nn.Sequential(Convolution("irnet", "own"), Convolution("irnet", "own")))
    binvit.nn.set_progress(block, 0.5)  # t 0.1, k 10
    names = {f"{i}.weight": f"conv{i + 1}.weight" for i in range(2)}
    check(block, "irnet/basic_block", names | batch_norm("0.end.norm", "bn1") | batch_norm("1.end.norm", "bn2"))


def test_two_layers_of_bnn():
    """Linear, batch norm, Hardtanh, sign: the window of the second layer's sign is that of the Hardtanh."""
    through, scheme = rule_of("bnn", "weight"), binvit.scheme("bnn")
    first = BinaryLinear(nn.Linear(24, 32), through, through)
    second = BinaryLinear(nn.Linear(32, 16), through, scheme.rule("input"))
    names = {"0.weight": "fc1.weight", "0.bias": "fc1.bias", "2.weight": "fc2.weight", "2.bias": "fc2.bias"}
    check(double(nn.Sequential(first, TokenBatchNorm(32), second)), "bnn/two_layers", names | batch_norm("1", "bn1"))
