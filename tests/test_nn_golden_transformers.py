"""The methods made for transformers against numbers of their authors' code (`tests/golden/methods.npz`)."""

from types import SimpleNamespace

import pytest
import torch
from golden_methods import golden
from timm.layers import Mlp
from timm.layers.attention import Attention
from torch import nn

import binvit
from binvit.nn import products, rules
from binvit.nn.layer_parts import Binarizer
from binvit.nn.layers import BinaryAttention, BinaryMlp
from binvit.nn.linear import BinaryLinear
from binvit.nn.rules import Bwn, Elastic, HeadSign, LearnedRow, MapThreshold, ScoreSign, Sign

ELASTIC_BIT = Elastic(gradient="bit")


def part(name):
    """Return the arrays of a part as tensors: its own by name, "param/..." and "grad/..." in two dictionaries."""
    own, found = SimpleNamespace(), {"param": {}, "grad": {}}
    for key, tensor in golden(name).items():
        kind, _, rest = key.partition("/")
        if rest:
            found[kind][rest] = tensor
        else:
            setattr(own, kind.replace(".", "_"), tensor)
    return own, found["param"], found["grad"]


def close(mine, theirs, what="", within=1e-5, size=0.0):
    """Compare to a part of the largest value, or of `size` if that is more."""
    mine = mine.detach().reshape(theirs.shape)
    worst = (mine - theirs).abs().max().item() / max(theirs.abs().max().item(), size, 1e-6)
    assert worst <= within, f"{what}: off by {worst:.1e} of the largest value"


RULES = {
    "bit/signed": ELASTIC_BIT,
    "bit/signed_zeros": ELASTIC_BIT,
    "bit/unsigned": Elastic(lo=0),
    "bit/unsigned_negative_inputs": Elastic(lo=0),
    "bit/weight_bwn": Bwn(),
    "bit/weight_bwn_row": Bwn(scale="channel"),
    "bibert/activation_qkv": Sign(window="open"),
    "bibert/map": ScoreSign(),
    "bibert/weight": Sign(scale="row", center=True, factor="bare"),
    "bivit/activation": Sign(window="open"),
    "bivit/weight": LearnedRow(),
    "bivit/weight_fixed_scale": Sign(scale="row", center=True, window="open"),
    "bivit-head/head_sign": HeadSign(),
    "bivit-head/head_sign_map": HeadSign(),
    "bivit-head/weight": Sign(scale="row", factor="bare"),
}


def run(rule, x, parameters, gy):
    x = x.clone().requires_grad_()
    shape = rule.parameter_shape(channels=x.shape[0], heads=x.shape[1])
    parameters = [p.reshape(shape).clone().requires_grad_() for p in parameters]
    y = products.binarize(x, rule, *parameters)
    y.backward(gy)
    return y, x.grad, [p.grad for p in parameters]


@pytest.mark.parametrize("name", RULES)
def test_rules(name):
    g, rule = part(name)[0], RULES[name]
    x = g.w if hasattr(g, "w") else g.x
    parameters = [getattr(g, parameter) for parameter in rule.parameters]
    y, gx, gradients = run(rule, x, parameters, g.gy)
    # The official sign of 0 is 0, ours +1.
    known = x != 0 if rule in (ELASTIC_BIT, Sign(window="open")) else torch.ones_like(x, dtype=torch.bool)
    close(y[known], g.y[known], "value")
    close(gx, g.gw if hasattr(g, "w") else g.gx, "gradient")
    for parameter, gradient in zip(rule.parameters, gradients, strict=True):
        theirs = getattr(g, f"g{parameter}")
        zeros = (g.gy * ~known).sum() / x.numel() ** 0.5 if rule == ELASTIC_BIT else 0.0
        close(gradient - zeros, theirs, parameter)


def test_a_scale_below_the_floor_of_bit():
    g, binarizer = part("bit/signed_small_scale")[0], Binarizer(ELASTIC_BIT)
    binarizer.scale.data.copy_(g.scale.squeeze())
    binarizer.initialized.fill_(True)
    x = g.x.clone().requires_grad_()
    y = products.binarize(x, ELASTIC_BIT, *binarizer.values(x))
    y.backward(g.gy)
    known = g.x != 0
    close(y[known], g.y[known], "value")
    close(x.grad, g.gx, "gradient")
    close(binarizer.scale.grad - (g.gy * ~known).sum() / x.numel() ** 0.5, g.gscale, "scale")


def test_the_threshold_of_bivit_keeps_a_quarter_of_the_rows_maximum():
    g = part("bivit/map")[0]
    scores = g.x.clone().requires_grad_()
    y = products.binarize(scores.softmax(-1), MapThreshold(share=0.25))
    y.backward(g.gy)
    close(scores.softmax(-1), g.softmax, "softmax")
    close(y, g.y, "value")
    close(scores.grad, g.gx, "gradient")


INITIAL = {
    "bit/signed_init": ELASTIC_BIT,
    "bit/unsigned_init": Elastic(lo=0),
    "bivit/init": LearnedRow(),
    "bivit-head/head_sign_init": HeadSign(),
    "bivit-head/head_sign_map_init": HeadSign(),
}


@pytest.mark.parametrize("name", INITIAL)
def test_initial_values(name):
    g, rule = part(name)[0], INITIAL[name]
    x = g.w if hasattr(g, "w") else g.x
    values = rule.initial(x)
    for parameter, value in zip(rule.parameters, values, strict=True):
        close(value, getattr(g, parameter), parameter)
    if hasattr(g, "y"):
        close(products.binarize(x, rule, *values), g.y, "value")


def fill(module, names, values):
    """Set the parameters of a module by the official names."""
    for theirs, ours in names.items():
        target = module.get_parameter(ours)
        target.data.copy_(values[theirs].reshape(target.shape))
    for binarizer in module.modules():
        if hasattr(binarizer, "initialized"):
            binarizer.initialized.fill_(True)


def check(module, name, names):
    """Compare a module's output and all gradients with a part's, its parameters named by `names`."""
    g, values, gradients = part(name)
    fill(module, names, values)
    x = g.x.clone().requires_grad_()
    y = module.train()(x)
    y.backward(g.gy)
    close(y, g.y, "value")
    close(x.grad, g.gx, "gx")
    assert set(names) >= set(gradients), set(gradients) - set(names)
    size = 1e-2 * max(gradient.abs().max().item() for gradient in gradients.values())
    for theirs, ours in names.items():
        if theirs in gradients:
            # Long float32 sums, some of terms that cancel: the order of adding shows in them.
            close(module.get_parameter(ours).grad, gradients[theirs], theirs, 5e-5, size)


def check_start(module, name, names, values):
    """Compare the scales that the first batch sets, and the output of that pass."""
    g = part(name)[0]
    fill(module, {theirs: ours for theirs, ours in names.items() if not hasattr(g, theirs.replace(".", "_"))}, values)
    for binarizer in module.modules():
        if hasattr(binarizer, "initialized"):
            binarizer.initialized.fill_(False)
    close(module.train()(g.x), g.y, "value")
    for theirs, ours in names.items():
        if hasattr(g, theirs.replace(".", "_")):
            close(module.get_parameter(ours), getattr(g, theirs.replace(".", "_")), theirs)


LINEAR = {"weight": "weight", "bias": "bias"}


def linear(scheme, inputs=24, outputs=16):
    scheme = binvit.scheme(scheme)
    options = {"shift": scheme.shift, "linear_bias": scheme.linear_bias}
    return BinaryLinear(nn.Linear(inputs, outputs), scheme.rule("weight"), scheme.rule("input"), **options)


def test_linear_layers():
    shifted = {"input_clip_val": "input_binarizer.scale", "move.bias": "shift"}
    check(linear("bit"), "bit/linear", LINEAR | shifted)
    check(linear("bibert"), "bibert/linear", LINEAR)
    check(linear("bivit"), "bivit/linear", LINEAR | {"scaling_factor": "weight_binarizer.scale"})
    check(linear("bivit-head"), "bivit-head/linear", {"weight": "weight"})


def test_a_linear_layer_of_bibert_with_zeros_among_its_inputs():
    """Where an input is exactly 0 the two signs differ, by a known column of the weights."""
    g, values, gradients = part("bibert/linear_zeros")
    layer = linear("bibert")
    fill(layer, LINEAR, values)
    x = g.x.clone().requires_grad_()
    y = layer(x)
    y.backward(g.gy)
    zeros = (g.x == 0).float()
    assert zeros.any()
    binary = rules.superpose(layer.weight_binarizer.planes(layer.weight))
    close(y - zeros @ binary.T, g.y, "value")
    close(x.grad, g.gx, "gx")
    c = values["weight"] - values["weight"].mean(1, keepdim=True)
    h = (g.gy.flatten(0, 1).T @ zeros.flatten(0, 1)) * (c.abs() <= 1)
    close(layer.weight.grad - (h - h.mean(1, keepdim=True)), gradients["weight"], "weight")
    close(layer.bias.grad, gradients["bias"], "bias")


class Joint(nn.Module):
    """Query, key and value as three layers, as in BERT, in place of the joint one."""

    def __init__(self, make):
        super().__init__()
        self.query, self.key, self.value = make(), make(), make()

    def forward(self, x):
        return torch.cat([self.query(x), self.key(x), self.value(x)], -1)


class Bert(nn.Module):
    """A post-norm layer of BERT, or with `alone` its self-attention, made of our attention and MLP."""

    def __init__(self, scheme, alone=False, width=32, heads=2):
        super().__init__()
        settings = binvit.scheme(scheme)
        self.attn = BinaryAttention(Attention(width, heads, qkv_bias=True), settings, (3, 3), 0)
        self.attn.qkv = Joint(lambda: linear(scheme, width, width))
        self.alone = alone
        if alone:
            self.attn.proj = nn.Identity()
            return
        self.mlp = BinaryMlp(Mlp(width, 2 * width), settings)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x):
        y = self.attn(x)
        if self.alone:
            return y
        x = self.norm1(x + y)
        return self.norm2(x + self.mlp(x))


def bert_names(elastic, alone):
    layer = {"weight": "weight", "bias": "bias"}
    if elastic:
        layer |= {"move.bias": "shift", "input_clip_val": "input_binarizer.scale"}
    prefix = "" if alone else "attention.self."
    places = {f"{prefix}{place}": f"attn.qkv.{place}" for place in ("query", "key", "value")}
    names = {}
    if not alone:
        places |= {"attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}
        norms = {"attention.output.LayerNorm": "norm1", "output.LayerNorm": "norm2"}
        names = {f"{theirs}.{end}": f"{ours}.{end}" for theirs, ours in norms.items() for end in ("weight", "bias")}
    names |= {f"{theirs}.{a}": f"{ours}.{b}" for theirs, ours in places.items() for a, b in layer.items()}
    if elastic:
        clips = {"query": "query", "key": "key", "value": "value", "attn": "attention"}
        names |= {f"{prefix}clip_{theirs}": f"attn.{ours}_binarizer.scale" for theirs, ours in clips.items()}
    return names


@pytest.mark.parametrize("alone", [True, False], ids=["attention", "layer"])
@pytest.mark.parametrize("scheme", ["bit", "bibert"])
def test_bert_layers(scheme, alone):
    name = f"{scheme}/{'self_attention' if alone else 'layer'}"
    module, names = Bert(scheme, alone), bert_names(scheme == "bit", alone)
    check(module, name, names)
    if scheme == "bit":
        check_start(Bert(scheme, alone), f"{name}_init", names, part(name)[1])


def test_bibert_attends_by_the_sign_of_its_scores():
    g, values, _ = part("bibert/self_attention")
    module = Bert("bibert", alone=True)
    fill(module, bert_names(False, True), values)
    module.attn.record = True
    module(g.x)
    kept = module.attn.last_attention
    close(kept["scores"], g.scores, "scores")
    for place in ("query", "key", "value"):
        close(kept[place] @ kept[place].mT / kept[place].shape[-1] ** 0.5, getattr(g, f"{place}_similarity"), place)


def names_of(*layers, **ends):
    return {f"{layer}.{theirs}": f"{layer}.{ours}" for layer in layers for theirs, ours in ends.items()}


def test_attention_and_mlp_of_bivit():
    scheme = binvit.scheme("bivit")
    names = names_of("qkv", "proj", weight="weight", bias="bias", scaling_factor="weight_binarizer.scale")

    def attention(bias):
        return BinaryAttention(Attention(32, 2, qkv_bias=bias), scheme, (3, 3), 0)

    check(attention(True), "bivit/attention", names)
    check(attention(False), "bivit/attention", names)  # the released layers have a bias whatever qkv_bias says
    check_start(attention(True), "bivit/attention_init", names, part("bivit/attention")[1])
    check(BinaryMlp(Mlp(32, 64), scheme), "bivit/mlp", names_of("fc1", "fc2", weight="weight", bias="bias"))


class PreNorm(nn.Module):
    def __init__(self, scheme, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = BinaryAttention(Attention(width, heads, qkv_bias=True), scheme, (3, 3), 0)
        self.mlp = BinaryMlp(Mlp(width, 2 * width), scheme)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def test_attention_and_block_of_bivit_head():
    scheme = binvit.scheme("bivit-head")
    names = names_of("qkv", "proj", weight="weight")
    for theirs, ours in {"q": "query", "k": "key", "v": "value", "attn": "attention"}.items():
        names |= {f"{theirs}_act.alpha": f"{ours}_binarizer.scale"}
        names |= {f"{theirs}_act.zero_point": f"{ours}_binarizer.offset"}
    for place in "qk":
        names |= {f"norm_{place}.{end}": f"{place}_norm.{end}" for end in ("weight", "bias")}

    def attention():
        return BinaryAttention(Attention(33, 3, qkv_bias=True), scheme, (3, 3), 0)

    check(attention(), "bivit-head/attention", names)
    check_start(attention(), "bivit-head/attention_init", names, part("bivit-head/attention")[1])
    block = {f"attn.{theirs}": f"attn.{ours}" for theirs, ours in names.items()}
    block |= names_of("mlp.fc1", "mlp.fc2", weight="weight") | names_of("norm1", "norm2", weight="weight", bias="bias")
    check(PreNorm(scheme, 33, 3), "bivit-head/block", block)
    check_start(PreNorm(scheme, 33, 3), "bivit-head/block_init", block, part("bivit-head/block")[1])


def test_the_constant_map_that_bivit_head_starts_with():
    maps = torch.rand(2, 3, 9, 9).softmax(-1)
    y = products.binarize(maps, HeadSign(), *HeadSign().initial(maps))
    assert (y == y[0, 0, 0, 0]).all()
