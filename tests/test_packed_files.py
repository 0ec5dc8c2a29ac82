import json
import os
import struct

import numpy as np
import pytest
import torch
from packed_models import CLASSES, images, logits_of, trained
from safetensors.torch import save_file

import binvit
from binvit.packed.files import KEY, is_packed

X = images(4)
NAMES = ("ant", "bee", "cat", "dog", "emu")


@pytest.fixture(scope="module")
def model():
    return trained("gsb", distilled=True)


@pytest.fixture
def path(model, tmp_path):
    packed = binvit.pack(model, exact=True, classes=NAMES, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    return binvit.save(packed, tmp_path / "new" / "model.safetensors")


def test_round_trip(model, path):
    packed = binvit.load(path)
    assert packed.exact
    assert packed.classes == NAMES
    assert packed.blueprint.mean == (0.5, 0.4, 0.3)
    assert packed.blueprint.scheme == model.scheme
    assert torch.equal(packed(X), logits_of(model, X))
    again = binvit.save(packed, path.with_name("again.safetensors"))
    assert again.read_bytes() == path.read_bytes()
    assert sorted(os.listdir(path.parent)) == ["again.safetensors", "model.safetensors"]
    assert not binvit.load(path, exact=False).exact


def test_the_file_is_small_and_its_header_is_json(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header["blocks.0.mlp.fc1.weight"] == header["blocks.0.mlp.fc1.weight"] | {"dtype": "U64", "shape": [192, 1]}
    assert header["patch_embed.proj.weight"]["dtype"] == header["head_dist.weight"]["dtype"] == "I8"
    assert header["blocks.1.norm2.weight"]["dtype"] == "F32"
    blueprint = json.loads(header["__metadata__"][KEY])["blueprint"]
    assert blueprint["classes"] == list(NAMES)
    assert blueprint["vit"]["depth"] == 2


@pytest.mark.parametrize("name", binvit.list_schemes())
def test_every_scheme_survives_its_file(name, tmp_path):
    model = trained(name, steps=1)
    path = binvit.save(binvit.pack(model, exact=True), tmp_path / "model.safetensors")
    assert torch.equal(binvit.load(path)(X), logits_of(model, X))


def test_missing_truncated_and_foreign_files(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no packed model"):
        binvit.load(tmp_path / "nowhere.safetensors")
    data = path.read_bytes()
    for length in (0, 4, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(ValueError, match="truncated or no safetensors file"):
            binvit.load(tmp_path / "cut")
        assert not is_packed(tmp_path / "cut")
    (tmp_path / "text").write_text("I am a poem.\n" * 100)
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        binvit.load(tmp_path / "text")
    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="no packed model of binvit"):
        binvit.load(tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"use binvit\.pack"):
        binvit.save(torch.nn.Linear(1, 1), tmp_path / "linear")
    assert is_packed(path)


def rewrite(path, change):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[KEY])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(header, tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, {KEY: json.dumps(header)})


CHANGES = {
    "future version": (lambda h, t: h.update(version=7), r"format version 7, this release of binvit reads version 1"),
    "missing tensor": (lambda h, t: t.pop("blocks.1.norm2.bias"), r"blocks.1.norm2.bias has shape None"),
    "missing weight": (lambda h, t: t.pop("blocks.1.mlp.fc2.weight"), r"no tensor blocks.1.mlp.fc2.weight"),
    "extra tensor": (lambda h, t: t.update(extra=torch.zeros(2)), r"the tensor extra has shape \(2,\)"),
    "wrong shape": (
        lambda h, t: t.update({"norm.bias": torch.zeros(3)}),
        r"norm.bias has shape \(3,\), expected \(48,\)",
    ),
    "wrong words": (
        lambda h, t: t.update({"blocks.0.mlp.fc1.weight": t["blocks.0.mlp.fc1.weight"][:10].clone()}),
        r"blocks.0.mlp.fc1.weight",
    ),
    "wrong levels": (
        lambda h, t: t.update({"head.weight": t["head.weight"][:, :10]}),
        r"head.weight",
    ),
    "no blueprint": (lambda h, t: h.pop("blueprint"), r"damaged \(KeyError"),
    "unknown scheme field": (
        lambda h, t: h["blueprint"]["scheme"].update(colour="red"),
        r"Unknown scheme field 'colour'",
    ),
    "unknown field": (lambda h, t: h["blueprint"].update(colour="red"), r"colour"),
    "no object": (lambda h, t: h.update(blueprint=3), r"is damaged"),
    "impossible shape": (lambda h, t: h["blueprint"]["vit"].update(depth=3), r"blocks.2"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_that_contradict_themselves(change, path):
    function, sentence = CHANGES[change]
    rewrite(path, function)
    with pytest.raises(ValueError, match=sentence) as caught:
        binvit.load(path)
    assert str(path) in str(caught.value)


def test_biases_and_positions_are_halved_only_where_no_prediction_changes(tmp_path):
    model = trained(binvit.scheme("gsb", attention_bias="relative"))
    name = "blocks.0.attn.bias.values"
    assert binvit.pack(model).tensors[name].dtype == torch.float32
    packed = binvit.pack(model, images=X)
    same = torch.equal(packed.predict(X), binvit.pack(model).predict(X))
    assert same
    assert packed.tensors[name].dtype == packed.tensors["pos_embed"].dtype == torch.float16
    assert torch.equal(binvit.load(binvit.save(packed, tmp_path / "half"))(X), packed(X))
    exact = binvit.pack(model, exact=True, images=X)
    assert exact.tensors[name].dtype == exact.tensors["pos_embed"].dtype == torch.float32
    assert torch.equal(exact(X), logits_of(model, X))
    for block in model.blocks:  # 60010 becomes 60000 and 54005 becomes 54016, which then is above 0.9 of the maximum
        values = block.attn.bias.values.data
        values.copy_(torch.tensor([60010.0, 54005.0, 0.0])[torch.randint(0, 3, values.shape)])
        block.attn.attention_binarizer.scale3.data.fill_(5)  # of that group
    many = images(64)
    model.head.bias.data.sub_(logits_of(model, many).mean(0))  # close to a draw
    assert binvit.pack(model, images=many).tensors[name].dtype == torch.float32
    for block in model.blocks:
        block.attn.bias.values.data.fill_(1e6)  # beyond float16's range, but the same for all
    assert binvit.pack(model, images=X).tensors[name].dtype == torch.float32
    with torch.no_grad():
        model.pos_embed.mul_(1e9)  # beyond it, too
    for block in model.blocks:
        block.attn.bias.values.data.normal_(std=1e-3)
    both = binvit.pack(model, images=X)
    assert (both.tensors[name].dtype, both.tensors["pos_embed"].dtype) == (torch.float16, torch.float32)
    for block in model.blocks:
        block.attn.bias.values.data.fill_(0.25)
    assert binvit.pack(model, exact=True).tensors[name].dtype == torch.float16


def test_rounded_vectors_are_stored_as_halves_and_keep_the_exact_path(tmp_path):
    model = trained(binvit.scheme("gsb", attention_bias="relative"))
    rounded = binvit.round_vectors(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained(model.scheme).parameters(), strict=True))
    assert not torch.equal(rounded.blocks[0].mlp.fc1.shift, model.blocks[0].mlp.fc1.shift)
    torch.testing.assert_close(rounded.blocks[0].mlp.fc1.shift, model.blocks[0].mlp.fc1.shift, rtol=2**-11, atol=1e-7)
    assert torch.equal(rounded.head.weight, model.head.weight)
    packed = binvit.pack(rounded, exact=True)
    halves = {name for name, tensor in packed.tensors.items() if tensor.dtype == torch.float16}
    assert halves >= {"pos_embed", "blocks.0.attn.bias.values", "blocks.1.norm2.weight", "blocks.1.attn.value_shift"}
    assert not any("scale" in name for name in halves)
    path = binvit.save(packed, tmp_path / "rounded")
    assert torch.equal(binvit.load(path)(X), logits_of(rounded, X))
    assert path.stat().st_size < binvit.save(binvit.pack(model, exact=True), tmp_path / "whole").stat().st_size
    rounded.pos_embed.data.mul_(1e9)
    assert torch.equal(binvit.round_vectors(rounded).pos_embed, rounded.pos_embed)  # beyond the range of float16
    with pytest.raises(ValueError, match=r"made by binvit.binarize\(\), got Linear"):
        binvit.round_vectors(torch.nn.Linear(2, 2))


def test_numpy_torch_read_only_and_wrong_images(model):
    packed = binvit.pack(model, exact=True)
    expected = logits_of(model, X)
    array = X.numpy().copy()
    array.flags.writeable = False
    logits = packed(array)
    assert isinstance(logits, np.ndarray)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, expected)
    np.testing.assert_array_equal(packed(np.asfortranarray(array)), expected)
    assert torch.equal(packed(X.clone().requires_grad_()), expected)
    assert torch.equal(packed.predict(X), expected.argmax(1))
    np.testing.assert_array_equal(packed.predict(array), expected.argmax(1))
    assert packed(X[:0]).shape == (0, CLASSES)
    wrong = {"list": [[1.0]], "int64": X.long(), "float64": X.double(), "3-d": X[0], "size": X[:, :, :8]}
    for images_ in wrong.values():
        with pytest.raises(ValueError, match=r"Images must be"):
            packed(images_)


def test_repr_and_sizes(model):
    packed = binvit.pack(model, classes=NAMES)
    text = repr(packed)
    for word in ("gsb", "width=48", "depth=2", "distilled", "1-bit weights", "attention bias", "kB"):
        assert word in text
    sizes = packed.nbytes
    assert sizes["1-bit weights"] == 2 * 8 * (144 + 48 + 192 + 3 * 48)
    assert sizes["attention bias"] == 2 * 4 * 3 * 18 * 18
    assert sizes["patch embedding"] == 48 * 48 + 48 * 4 + 48 * 4
    assert sum(sizes.values()) == sum(t.numel() * t.element_size() for t in packed.tensors.values())
