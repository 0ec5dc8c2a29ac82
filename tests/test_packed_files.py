import contextlib
import errno
import json
import os
import re
import resource
import struct
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from limits import open_files
from packed_models import CLASSES, images, logits_of, trained
from safetensors.torch import save_file

import binvit
from binvit.packed import files
from binvit.packed.audit import audit
from binvit.packed.files import KEY, checksum, from_bytes, is_packed, to_bytes

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
    with pytest.raises(FileNotFoundError, match="There is no model"):
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
    if isinstance(header, dict):
        content = {name: value for name, value in header.items() if name not in ("version", "checksum")}
        header["checksum"] = checksum(content, tensors)
    save_file(tensors, path, {KEY: json.dumps(header)})


def replaced(name, function):
    """A change of one tensor of a file."""
    return lambda header, tensors: tensors.update({name: function(tensors[name])})


def with_padding(words):
    changed = words.numpy().copy()
    changed[3, -1] |= np.uint64(1 << 63)
    return torch.from_numpy(changed)


def with_one(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


FC1 = "blocks.0.mlp.fc1.weight"
TYPES = {torch.int32: "int32", torch.bool: "bool", torch.double: "float64", torch.bfloat16: "bfloat16"}
CHANGES = {
    "former version": (
        lambda h, t: h.update(version=1),
        r"format version 1, .* reads the versions 2 and 3",
    ),
    "future version": (
        lambda h, t: h.update(version=7),
        r"format version 7, .* reads the versions 2 and 3",
    ),
    **{
        f"version {value!r}"[:20]: (
            lambda h, t, value=value: h.update(version=value),
            r"has format version .*, this rel",
        )
        for value in (3.0, True, "3", None, [3], 10**30, int("9" * 4000))
    },
    "no object at all": (lambda h, t: h.clear(), r"has format version None"),
    "exact is no switch": (lambda h, t: h.update(exact="no"), r"exact must be true or false, got 'no'"),
    "an unknown entry": (lambda h, t: h.update(colour="red"), r"Unknown header field 'colour'"),
    "missing tensor": (lambda h, t: t.pop("blocks.1.norm2.bias"), r"blocks.1.norm2.bias is missing"),
    "missing weight": (lambda h, t: t.pop("blocks.1.mlp.fc2.weight"), r"tensor blocks.1.mlp.fc2.weight is missing"),
    "missing scale": (lambda h, t: t.pop(f"{FC1}_scale"), rf"{FC1}_scale is missing"),
    "scale per channel": (
        replaced(f"{FC1}_scale", lambda scale: scale.expand(192, 1)),
        rf"{FC1}_scale is float32 of shape \(192, 1\), expected float32 of shape \(\)",
    ),
    "half of a scale": (replaced(f"{FC1}_scale", torch.Tensor.half), rf"{FC1}_scale is float16"),
    "infinite scale": (replaced(f"{FC1}_scale", with_one(torch.inf)), rf"{FC1}_scale holds numbers that are not fin"),
    "float levels": (replaced(FC1, lambda w: torch.ones(192, 48)), rf"{FC1} is float32 .*, expected uint64"),
    "int8 levels": (replaced(FC1, lambda w: torch.ones(192, 48, dtype=torch.int8)), rf"{FC1} is int8"),
    "words of the head": (
        replaced("head.weight", lambda w: torch.zeros(CLASSES, 1, dtype=torch.uint64)),
        r"head.weight is uint64 .*, expected int8 of shape \(5, 48\)",
    ),
    "padding": (replaced(FC1, with_padding), rf"{FC1} has bits past its 48 columns"),
    "not a number": (replaced("norm.bias", with_one(torch.nan)), r"norm.bias holds numbers that are not finite"),
    "flag": (
        lambda h, t: t.update({"blocks.0.attn.query_binarizer.initialized": torch.tensor(False)}),
        r"query_binarizer.initialized of shape \(\) is none of the model's",
    ),
    **{
        f"{name} as {dtype}": (replaced(name, lambda tensor, dtype=dtype: tensor.to(dtype)), rf"{name} is {words}")
        for name in ("norm.weight", "pos_embed", "blocks.1.attn.attention_binarizer.scale2")
        for dtype, words in TYPES.items()
    },
    "extra tensor": (lambda h, t: t.update(extra=torch.zeros(2)), r"extra of shape \(2,\) is none of the model's"),
    "wrong shape": (
        lambda h, t: t.update({"norm.bias": torch.zeros(3)}),
        r"norm.bias is float32 of shape \(3,\), expected float32 or float16 of shape \(48,\)",
    ),
    "wrong words": (
        lambda h, t: t.update({"blocks.0.mlp.fc1.weight": t["blocks.0.mlp.fc1.weight"][:10].clone()}),
        r"blocks.0.mlp.fc1.weight",
    ),
    "wrong levels": (
        lambda h, t: t.update({"head.weight": t["head.weight"][:, :10]}),
        r"head.weight",
    ),
    "no blueprint": (lambda h, t: h.pop("blueprint"), r"header needs the field blueprint"),
    "unknown scheme field": (
        lambda h, t: h["blueprint"]["scheme"].update(colour="red"),
        r"Unknown scheme field 'colour'",
    ),
    "unknown field": (lambda h, t: h["blueprint"].update(colour="red"), r"colour"),
    "no object": (lambda h, t: h.update(blueprint=3), r"is damaged"),
    "one class name too few": (lambda h, t: h["blueprint"]["classes"].pop(), r"5 classes, but 4 class names came"),
    "class names that are no strings": (
        lambda h, t: h["blueprint"].update(classes=[1] * 5),
        r"classes\[0\] must be a text",
    ),
    "a string of class names": (
        lambda h, t: h["blueprint"].update(classes="abcde"),
        r"classes must be a list",
    ),
    "means without stds": (lambda h, t: h["blueprint"].update(std=[]), r"mean has 3 numbers and the std 0"),
    "a mean that is no number": (
        lambda h, t: h["blueprint"].update(mean=["a", 1, 1]),
        r"mean\[0\] must be a number",
    ),
    "no std": (lambda h, t: h["blueprint"].update(std=[0.0, 1.0, 1.0]), r"std\[0\] must be above 0, got 0"),
    "impossible shape": (
        lambda h, t: h["blueprint"]["vit"].update(depth=3),
        r"depth is 3, but the .* of 2",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_that_contradict_themselves(change, path):
    function, sentence = CHANGES[change]
    rewrite(path, function)
    with pytest.raises(ValueError, match=sentence) as caught:
        binvit.load(path)
    assert str(path) in str(caught.value)


HEADERS = [
    *[("num_heads", value) for value in (0, -1, 3.0, True, "3", 5, 10**9)],
    *[("patch_size", value) for value in ([0, 0], [4], 4, [4, -4], [4.0, 4.0], None, [32, 32])],
    *[("img_size", value) for value in ([16], 16, [10**6, 10**6], [0, 16], [1000, 1000])],
    *[("embed_dim", value) for value in (0, -48, 10**12, "48")],
    *[("depth", value) for value in (-1, 0, 10**9, 2.5)],
    *[("reg_tokens", value) for value in (-1, 10**9, None)],
    *[("in_chans", value) for value in (-1, 0, 3.0)],
    *[("mlp_ratio", value) for value in (-1, 0, float("inf"), float("nan"), "4", 1e-9, 10**400)],
    *[("epsilon", value) for value in ("a", None, -1e-6, float("nan"), True)],
    *[("num_classes", value) for value in (-1, 6, "5")],
    *[(name, value) for name in ("norm", "activation", "pos_embed", "global_pool") for value in ("a", None, 3, [])],
    *[(name, value) for name in ("distilled", "qkv_bias", "fused", "class_token") for value in (None, 1, "true")],
    ("init_values", "a"),
    ("colour", "red"),
]


@pytest.mark.parametrize(("name", "value"), HEADERS, ids=lambda value: repr(value)[:20])
def test_headers_that_describe_no_model(name, value, path):
    rewrite(path, lambda header, tensors: header["blueprint"]["vit"].update({name: value}))
    with pytest.raises(ValueError, match=r"^The packed model .*\.$") as caught:
        binvit.load(path)
    assert "\n" not in str(caught.value)


HOSTILE = {
    "1000 levels": "[" * 1000 + "]" * 1000,
    "100 levels": "[" * 100 + "]" * 100,
    "100,000 levels": "[" * 100_000,
    "10**30": str(10**30),
    "4000 digits": "9" * 4000,
    "5000 digits": "9" * 5000,
    "1e999": "1e999",
    "NaN": "NaN",
    "minus infinity": "-Infinity",
    "text": '"a"',
    "list": "[1, 2]",
    "object": "{}",
    "null": "null",
}


@pytest.mark.parametrize("value", HOSTILE)
def test_every_field_refuses_hostile_values_in_a_sentence(value, path):
    data, wrong = path.read_bytes(), []
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    content = json.loads(header["__metadata__"][KEY])
    plan, tensors = content["blueprint"], binvit.load(path).tensors
    places = [(content, "exact"), (content, "version"), (content, "blueprint")]
    places += [(record, name) for record in (plan, plan["vit"], plan["card"], plan["scheme"]) for name in record]
    for record, name in places:
        before, record[name] = record[name], "HERE"
        text = json.dumps(content).replace('"HERE"', HOSTILE[value])
        record[name] = before
        with contextlib.suppress(ValueError, RecursionError):  # with a checksum that fits, where one can be formed
            changed = json.loads(text)
            fits = checksum({k: v for k, v in changed.items() if k not in ("version", "checksum")}, tensors)
            text = text.replace(content["checksum"], fits)
        header["__metadata__"][KEY] = text
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])
        try:
            binvit.load(path)
        except ValueError as error:
            if not re.fullmatch(r"The (packed model|file) [^\n]+\.", str(error)):
                wrong.append(f"{name}: {str(error)[:300]}")
        else:
            allowed = {"text": {"data", "recipe", "licence"}, "object": {"card"}, "list": {"seeds"}}
            allowed["null"] = {"init_values", "resize", "accuracy"}
            if record is not plan["scheme"] and name not in allowed.get(value, ()):  # a scheme's are tested elsewhere
                wrong.append(f"{name}: accepted")
    assert wrong == []


CLAIMS = {
    "depth": {"depth": 1024},
    "heads": {"embed_dim": 65536, "num_heads": 65536},
    "patches": {"img_size": [512, 512]},
    "pixels": {"img_size": [16384, 16384], "patch_size": [128, 128]},
    "channels": {"in_chans": 1024, "img_size": [16384, 16384], "patch_size": [4096, 4096]},
    "hidden": {"mlp_ratio": 1024.0},
    "classes": {"num_classes": 2**20},
}


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("positions", ["learn", "none"])
def test_claims_of_a_header_are_checked_before_anything_is_built(claim, positions, path):
    scheme = binvit.scheme("gsb", attention_bias="relative")
    binvit.save(binvit.pack(trained(scheme, steps=1, depth=1, pos_embed=positions)), path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rewrite(path, lambda header, tensors: header["blueprint"]["vit"].update(CLAIMS[claim]))
    with pytest.raises(ValueError, match=r"^The packed model .* does not fit its header|has bits past"):
        binvit.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_large_images_of_a_small_file_take_no_memory_before_they_come(exact, tmp_path):
    model = trained(binvit.scheme("gsb", attention_bias="relative"), steps=0, depth=1, embed_dim=8, num_heads=1,
                    img_size=(2**14, 2**7), patch_size=(2**7, 2), pos_embed="none")  # fmt: skip
    for module in model.modules():
        if hasattr(module, "initialized"):
            module.initialized.fill_(True)
    path = binvit.save(binvit.pack(model, exact=exact), tmp_path / "wide")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    binvit.load(path)
    assert path.stat().st_size < 1e6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_files_of_version_2_are_read():
    folder = Path(__file__).parent / "golden"
    packed = binvit.load(folder / "packed_version2.safetensors")
    with np.load(folder / "packed_version2.npz") as golden:
        np.testing.assert_allclose(packed(images(4)), golden["logits"], rtol=1e-5, atol=1e-6)
    assert packed.classes == NAMES
    assert (packed.blueprint.mean, packed.blueprint.resize, str(packed.blueprint.card)) == ((0.5, 0.4, 0.3), None, "")


@pytest.mark.parametrize("blueprint", [None, [], "a", {}, {"scheme": "gsb"}, {"scheme": {"name": "gsb"}, "vit": 3}])
def test_headers_that_hold_no_blueprint(blueprint, path):
    rewrite(path, lambda header, tensors: header.update(blueprint=blueprint))
    with pytest.raises(ValueError, match=r"^The packed model .* is damaged"):
        binvit.load(path)


def test_every_flipped_bit_is_found(path):
    packed = binvit.pack(trained("bnn", steps=1, depth=1, embed_dim=12))
    data = binvit.save(packed, path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    rng = np.random.default_rng(0)
    places = [*range(0, 8 + length, 7), *rng.integers(8 + length, len(data), 100), len(data) - 1]
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=str(path)) as caught:
            binvit.load(path)
        assert place < 8 + length or "is damaged: its checksum does not fit" in str(caught.value)


def test_biases_and_positions_are_halved_only_where_no_prediction_changes(tmp_path):
    model = trained(binvit.scheme("gsb", attention_bias="relative"))
    name = "blocks.0.attn.bias.values"
    assert binvit.pack(model).tensors[name].dtype == torch.float32
    packed = binvit.pack(model, images=X)
    same = torch.equal(packed(X).argmax(1), binvit.pack(model)(X).argmax(1))
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
    assert packed(X[:0]).shape == (0, CLASSES)
    wrong = {"list": [[1.0]], "int64": X.long(), "float64": X.double(), "3-d": X[0], "size": X[:, :, :8]}
    for images_ in wrong.values():
        with pytest.raises(ValueError, match=r"Images must be"):
            packed(images_)


def test_arrays_that_torch_cannot_map(model):
    packed, array = binvit.pack(model), X.numpy()
    for mirrored in (array[::-1], array[..., ::-1], np.flip(array)):
        np.testing.assert_array_equal(packed(mirrored), packed(mirrored.copy()))
    odd = np.zeros(X.shape, np.dtype([("pixel", np.float32), ("other", np.uint8)]))["pixel"]  # strides of 5 bytes
    odd[...] = array
    np.testing.assert_array_equal(packed(odd), packed(array))
    np.testing.assert_array_equal(packed(array.astype(array.dtype.newbyteorder())), packed(array))
    for kind in (object, "U3", "M8[s]", np.longdouble):
        with pytest.raises(ValueError, match=r"^Images must be [^\n]*\.$"):
            packed(np.zeros(X.shape, kind))


def test_what_is_no_path_and_no_packed_model_is_named(model, tmp_path):
    packed = binvit.pack(model)
    for call, sentence in (
        (lambda: binvit.load(5), "path must be a path or the name of a model, got int"),
        (lambda: binvit.save(packed, 5), "path must be a path, got int"),
        (lambda: from_bytes("text"), "data must be the bytes of a packed file, got str"),
        (lambda: audit(5), "takes a PackedViT, got int"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_normalization_and_classes_come_in_any_list(model, kind):
    numbers = [kind([0.5, 0.25, 0.0]), kind([0.5, 0.25, 1.0])]
    packed = binvit.pack(model, classes=np.array(NAMES), mean=numbers[0], std=numbers[1])
    assert (packed.classes, packed.blueprint.mean, packed.blueprint.std) == (NAMES, (0.5, 0.25, 0), (0.5, 0.25, 1))
    assert all(type(name) is str for name in packed.classes)


def test_numpy_images_decide_about_halves():
    model = trained(binvit.scheme("gsb", attention_bias="relative"), depth=1)
    halves, expected = (binvit.pack(model, images=images).tensors for images in (X.numpy()[::-1], X))
    assert {name: tensor.dtype for name, tensor in halves.items()} == {n: t.dtype for n, t in expected.items()}


@pytest.mark.parametrize("images", [X[:0], torch.full_like(X, torch.nan)])
def test_images_that_prove_nothing_decide_about_no_halves(images):
    model = trained(binvit.scheme("gsb"), depth=1)
    with pytest.raises(ValueError, match="must be at least one, and their pixels finite"):
        binvit.pack(model, images=images)


@pytest.mark.parametrize("images", [X.to_sparse(), X.to("meta")])
def test_images_that_are_elsewhere_or_sparse_are_refused(images, model):
    with pytest.raises(ValueError, match=r"^Images must be a dense tensor on the CPU, got torch\.\w+ on \w+\.$"):
        binvit.pack(model)(images)


def test_negated_views_are_images(model):
    packed = binvit.pack(model)
    assert torch.equal(packed(torch._neg_view(X)), packed(-X))


@pytest.mark.parametrize("defaults", ["torch.set_default_dtype(torch.float64)", "torch.set_default_device('meta')"])
def test_warming_up_and_counting_do_not_depend_on_defaults(defaults, model, tmp_path):
    path = binvit.save(binvit.pack(model), tmp_path / "model")
    code = f"import sys, torch, binvit; m = binvit.load(sys.argv[1]); {defaults}; m.warm_up()"
    code += "; from binvit.packed.audit import audit; print(audit(m).file_bytes)"
    done = forks.run(code, path)
    assert (done.returncode, done.stdout) == (0, f"{path.stat().st_size}\n"), done.stderr


def test_a_file_that_may_not_be_read_is_not_called_damaged(model, tmp_path, monkeypatch):
    path = binvit.save(binvit.pack(model), tmp_path / "model")

    def refuse(*arguments):  # root may read everything
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(PermissionError):
        binvit.load(path)


def test_one_more_open_file_is_enough_and_none_is_no_damage(path):
    with open_files(1):
        assert is_packed(path)
        assert binvit.load(path).exact
    for read in (is_packed, binvit.load):
        with pytest.raises(OSError, match="Too many open files"), open_files(0):
            read(path)


ARGUMENTS = {
    "mean alone": ({"mean": (0.5, 0.5, 0.5)}, r"mean has 3 numbers and the std 0"),
    "std alone": ({"std": (0.5, 0.5, 0.5)}, r"mean has 0 numbers and the std 3"),
    "too few": ({"mean": [0.5], "std": [0.5]}, r"expected one of each for every of the model's 3 channels"),
    "not finite": ({"mean": [0.5, np.nan, 0.5], "std": [1, 1, 1]}, r"mean\[1\] must be a finite number, got nan"),
    "not positive": ({"mean": [0, 0, 0], "std": np.array([1, 0, 1])}, r"std\[1\] must be above 0, got 0"),
    "a number": ({"mean": 0.5, "std": 0.5}, r"mean of pack\(\) must be a list, got 0.5"),
    "words": ({"mean": ["a", "b", "c"], "std": [1, 1, 1]}, r"mean of pack\(\) must be a list"),
    "a string": ({"classes": "abcde"}, r"classes of pack\(\) must be a list, got 'abcde'"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_do_not_fit_the_model(case, model):
    arguments, sentence = ARGUMENTS[case]
    with pytest.raises(ValueError, match=sentence):
        binvit.pack(model, **arguments)


def test_models_with_other_numbers_are_refused():
    with pytest.raises(ValueError, match=r"models in float32, but .* is torch.float64; use model.float\(\)"):
        binvit.pack(trained("bnn", steps=1, depth=1).double())
    model = trained("bnn", steps=1, depth=1)
    model.blocks[0].mlp.fc1.weight.data[3, 2] = torch.inf
    with pytest.raises(ValueError, match=r"blocks.0.mlp.fc1.weight holds numbers that are not finite"):
        binvit.pack(model)


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


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_nothing_depends_on_the_file_after_loading(exact, path):
    binvit.save(binvit.pack(trained("gsb"), exact=exact), path)
    data, packed = path.read_bytes(), binvit.load(path)
    with open(path, "r+b") as file:  # in place, as a copying program does
        file.write(bytes(len(data)))
    assert to_bytes(packed) == data
    logits = packed(X)  # words are prepared at the first call
    with open(path, "r+b") as file:
        file.truncate(0)
    assert to_bytes(packed) == data
    path.unlink()
    assert torch.equal(packed(X), logits)
    assert torch.equal(logits, binvit.pack(trained("gsb"), exact=exact)(X))
