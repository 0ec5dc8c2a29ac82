"""ONNX Runtime answers for an exported model as the packed model does."""

import functools
import sys

import numpy as np
import pytest
import torch
from packed_models import CLASSES, images, trained, vit
from torch.utils._python_dispatch import TorchDispatchMode

import binvit
from binvit.packed import export

X = images(5)
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def run(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": x.numpy()})[0]


def check(model, folder, x=X):
    packed = binvit.pack(model)
    path = binvit.export_onnx(packed, folder / "new" / "model.onnx")
    for count in {1, len(x)}:  # any number of images
        np.testing.assert_allclose(run(path, x[:count]), packed(x[:count]), rtol=1e-4, atol=1e-4)
    return path


EXPORTED = ("bhvit-qd", "bibert", "bivit-head", "gsb", "xnor", "xnor-k")
"""Schemes that have, with the variants below, every kind of step; to export all takes a minute."""


@pytest.mark.parametrize("name", EXPORTED)
def test_schemes_answer_alike_in_onnx_runtime(name, tmp_path):
    check(trained(name, steps=1, depth=1), tmp_path)


VARIANTS = {
    "maxima over the batch": (binvit.scheme("gsb", reduce="batch", attention_bias="relative"), {"distilled": True}),
    "parts in float": (binvit.scheme("gsb", components=("mlp",)), {"init_values": 0.1, "global_pool": "map"}),
    "no squares": ("bit", {"img_size": (8, 24), "patch_size": (4, 8), "reg_tokens": 2}),
}


def variant_of(name):
    """Return a calibrated variant and images for it."""
    scheme, options = VARIANTS[name]
    x = torch.randn(5, 3, *options.get("img_size", (16, 16)), generator=torch.Generator().manual_seed(0))
    return binvit.calibrate(binvit.binarize(vit(**{"depth": 1} | options), scheme), x).eval(), x


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_transformer(variant, tmp_path):
    model, images = variant_of(variant)
    path = check(model, tmp_path, images)
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    assert {opset.domain for opset in graph.opset_import} <= {"", "ai.onnx"}  # every runtime knows them
    (x,), (y,) = graph.graph.input, graph.graph.output
    shapes = [[d.dim_param or d.dim_value for d in t.type.tensor_type.shape.dim] for t in (x, y)]
    assert (x.name, y.name, shapes) == ("images", "logits", [["batch", *images.shape[1:]], ["batch", CLASSES]])


class Steps(TorchDispatchMode):
    """Notes what the exporter is given: every operation with the kinds of its arguments."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        named = tuple(sorted((name, kind(value)) for name, value in (kwargs or {}).items()))
        self.seen.add((str(function), kind(args), named))
        return function(*args, **(kwargs or {}))


def kind(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.ndim
    return tuple(map(kind, value)) if isinstance(value, list | tuple) else type(value)


def steps_of(model, x):
    packed = binvit.pack(model)
    network = export._as_floats(packed)
    with torch.no_grad(), Steps() as steps:
        logits = network(x)
    torch.testing.assert_close(logits, packed(x), rtol=1e-4, atol=1e-4)
    return steps.seen


@functools.cache
def exported_steps():
    models = [(trained(name, steps=1, depth=1), X) for name in EXPORTED] + [variant_of(name) for name in VARIANTS]
    return set().union(*(steps_of(*model) for model in models))


@pytest.mark.parametrize("name", binvit.list_schemes())
def test_every_scheme_has_only_steps_that_are_exported_above(name):
    assert steps_of(trained(name, steps=1, depth=1), X) <= exported_steps()


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"writes a PackedViT, got Linear; use binvit.pack\(\) first"):
        binvit.export_onnx(torch.nn.Linear(1, 1), tmp_path / "linear.onnx")
    packed = binvit.pack(trained("gsb", steps=1, depth=1))
    monkeypatch.setattr(export, "_LARGEST", 1000)
    with pytest.raises(ValueError, match=r"more than the 1000 that an ONNX file holds"):
        binvit.export_onnx(packed, tmp_path / "model.onnx")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match=r"onnxscript is not installed \(pip install binvit\[export\]\)"):
        binvit.export_onnx(packed, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
