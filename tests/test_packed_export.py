"""ONNX Runtime answers for an exported model as the packed model does."""

import sys

import numpy as np
import pytest
import torch
from packed_models import CLASSES, images, trained, vit

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


@pytest.mark.parametrize("name", binvit.list_schemes())
def test_every_scheme_answers_alike_in_onnx_runtime(name, tmp_path):
    check(trained(name, steps=1, depth=1), tmp_path)


VARIANTS = {
    "maxima over the batch": (binvit.scheme("gsb", reduce="batch", attention_bias="relative"), {"distilled": True}),
    "parts in float": (binvit.scheme("gsb", components=("mlp",)), {"init_values": 0.1, "global_pool": "map"}),
    "no squares": ("bit", {"img_size": (8, 24), "patch_size": (4, 8), "reg_tokens": 2}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_transformer(variant, tmp_path):
    scheme, options = VARIANTS[variant]
    size = options.get("img_size", (16, 16))
    x = torch.randn(5, 3, *size, generator=torch.Generator().manual_seed(0))
    model = binvit.binarize(vit(**{"depth": 1} | options), scheme)
    path = check(binvit.calibrate(model, x).eval(), tmp_path, x)
    graph = onnx.load(path)
    onnx.checker.check_model(graph)
    assert {opset.domain for opset in graph.opset_import} <= {"", "ai.onnx"}  # every runtime knows them
    (x,), (y,) = graph.graph.input, graph.graph.output
    shapes = [[d.dim_param or d.dim_value for d in t.type.tensor_type.shape.dim] for t in (x, y)]
    assert (x.name, y.name, shapes) == ("images", "logits", [["batch", 3, *size], ["batch", CLASSES]])


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
