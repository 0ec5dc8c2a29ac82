import dataclasses
import os
import re
import resource

import forks
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

import binvit
from binvit.lab.training import checkpoint
from binvit.lab.training.checkpoint import load_checkpoint, save_checkpoint
from binvit.lab.training.model import CheckpointInfo, build_model, default_patch_size, new_model
from binvit.lab.training.recipes import recipe
from binvit.packed.files import checksum

TINY = {"width": 16, "depth": 1, "heads": 2}


def info(classes=3):
    names = tuple("abc"[:classes])
    return CheckpointInfo(recipe("smoke", **TINY), binvit.scheme("elastic"), names, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 8)


def written(path, model, described):
    """Save a model with a description of another one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_check_fits", lambda *_: None)
        return save_checkpoint(path, model, described)


def test_checkpoints_survive_the_round_trip(tmp_path):
    model = new_model(info()).eval()
    path = save_checkpoint(tmp_path / "folder" / "model.safetensors", model, info())
    again, read = load_checkpoint(path)
    assert read == info()
    states = model.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not again.training
    assert [item.name for item in path.parent.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("name", binvit.list_schemes())
def test_every_scheme_is_rebuilt_whole(name, tmp_path):
    described = dataclasses.replace(info(), scheme=binvit.scheme(name), recipe=recipe("smoke", **TINY, drop_path=0.1))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = binvit.calibrate(new_model(described), x).eval()
    again, _ = load_checkpoint(save_checkpoint(tmp_path / "model", model, described))
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    assert {t.device.type for t in [*again.parameters(), *again.buffers()]} == {"cpu"}


@pytest.mark.parametrize("claim", [{"depth": 1000}, {"width": 999_998}, {"mlp_ratio": 500.0}, {"image_size": 400_000}])
def test_claims_of_a_header_are_checked_before_anything_is_built(claim, tmp_path):
    model, size = new_model(info()), claim.get("image_size", 8)
    options = TINY | {name: value for name, value in claim.items() if name != "image_size"}
    wrong = dataclasses.replace(info(), recipe=recipe("smoke", **options), image_size=size)
    path = written(tmp_path / "model.safetensors", model, wrong)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"^The checkpoint .* (does not fit its own header|that can be built).*\.$"):
        load_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_bad_checkpoints_get_one_sentence(tmp_path):
    path = save_checkpoint(tmp_path / "model.safetensors", new_model(info()), info())
    whole = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(tmp_path / "missing.safetensors")
    for damaged in (b"", b"text", whole[:5], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="truncated or no safetensors file"):
            load_checkpoint(path)
    written(path, new_model(info(classes=2)), info())
    with pytest.raises(ValueError, match=r"does not fit its own header: .* has shape \(2,.*expected \(3,"):
        load_checkpoint(path)
    written(path, build_model(info().recipe, 3, 8), info())
    with pytest.raises(ValueError, match=r"has no tensor '.*binarizer"):
        load_checkpoint(path)


def test_what_would_be_loaded_as_another_model_is_not_saved(tmp_path):
    path, model = tmp_path / "model.safetensors", new_model(info())
    for other, described, sentence in (
        (new_model(info(classes=2)), info(), r"The model does not fit info: .* has shape \(2,.*expected \(3,"),
        (model, dataclasses.replace(info(), recipe=recipe("smoke", **TINY | {"depth": 2})), "depth is 2, .* 1 blocks"),
        (model, dataclasses.replace(info(), scheme=binvit.scheme("gsb")), "scheme is not that of info, 'gsb'"),
        (build_model(info().recipe, 3, 8), info(), "scheme is not that of info, 'elastic'"),
        (5, info(), "model must be .*, got int"),
        (model, "info", "info must be a CheckpointInfo, got str"),
    ):
        with pytest.raises(ValueError, match=sentence):
            save_checkpoint(path, other, described)
    model.reset_classifier(2)
    with pytest.raises(ValueError, match="The model does not fit info"):
        save_checkpoint(path, model, info())
    assert not path.exists()
    for call in (lambda: save_checkpoint(5, model, info()), lambda: load_checkpoint(5)):
        with pytest.raises(ValueError, match="path must be a path, got int"):
            call()


def test_foreign_safetensors_files_are_refused(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no checkpoint of binvit"):
        load_checkpoint(path)
    save_file({"x": torch.zeros(1)}, path, {"format": "binvit checkpoint", "version": "1"})
    with pytest.raises(ValueError, match="format version '1', this release of binvit reads 2"):
        load_checkpoint(path)


def test_every_flipped_bit_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path / "model.safetensors", new_model(info()), info())
    whole = path.read_bytes()
    places = torch.randint(0, 8 * len(whole), (150,), generator=torch.Generator().manual_seed(0)).tolist()
    header = int.from_bytes(whole[:8], "little")
    places += torch.randint(0, 8 * (8 + header), (150,), generator=torch.Generator().manual_seed(1)).tolist()
    for place in places:
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"damaged|truncated or no safetensors|no checkpoint of binvit"):
            load_checkpoint(path)


def test_equal_models_are_equal_files_in_every_process(tmp_path):
    program = (
        "import sys, torch\n"
        "from binvit.lab.training.checkpoint import load_checkpoint, save_checkpoint\n"
        "from binvit.lab.training.model import new_model\n"
        "_, info = load_checkpoint(sys.argv[1])\n"
        "torch.manual_seed(0)\n"
        "save_checkpoint(sys.argv[2], new_model(info), info)\n"
    )
    paths = [tmp_path / f"{number}.safetensors" for number in range(2)]
    torch.manual_seed(0)
    save_checkpoint(paths[0], new_model(info()), info())
    done = forks.run(program, *paths)
    assert done.returncode == 0, done.stderr
    assert paths[0].read_bytes() == paths[1].read_bytes()


HEADER = (
    ('"mean": [0.5]', r"Its mean must be a list of at least 2 entries, got [\[(]0\.5"),
    ('"mean": ["a", "b", "c"]', "Its mean.* must be a number, got 'a'"),
    (f'"mean": [1{400 * "0"}, 0, 0]', "Its mean.* must be a number, got a whole number of about 400 digits"),
    ('"mean": [NaN, 0, 0]', "it is no readable JSON"),
    ('"std": [null, null, null]', "Its std.* must be a number, got None"),
    ('"std": [0.0, 0.0, 0.0]', "Its std.* must be above 0, got 0"),
    ('"trial": [1]', "Its trial must be a mapping of names to values"),
    (f'"trial": {{"a": {100 * "["}{100 * "]"}}}', "Its trial is nested deeper than 32 levels"),
    ('"classes": "abc"', "Its classes must be a list, got 'abc'"),
    ('"classes": [[1], {"a": 1}, null]', "Its classes.* must be a text"),
    (f'"image_size": {2**62}', "Its image_size must be at most 1048576"),
    (f'"image_size": {5000 * "9"}', "it is no readable JSON"),
    (f'"recipe": {1000 * "["}{1000 * "]"}', "it is no readable JSON"),
    ('"version": "two"', "it has format version 'two', this release of binvit reads 2"),
    ('"colour": 1', "Unknown checkpoint info field 'colour'"),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = save_checkpoint(tmp_path_factory.mktemp("sound") / "model", new_model(info()), info())
    with safe_open(path, "pt") as file:
        header = file.metadata()["binvit checkpoint"].partition(" ")[2]
    return header, load_file(path)


def refusal(header, tensors, path):
    """Return how a checkpoint with this header, and the checksum that belongs to it, is refused."""
    total = checksum({"header": header}, tensors)
    path.write_bytes(save(tensors, {"binvit checkpoint": f"{total} {header}"}))
    with pytest.raises(ValueError, match=r"^The checkpoint .* has a damaged header: .*\.$") as refused:
        load_checkpoint(path)
    return str(refused.value).partition("header: ")[2]


@pytest.mark.parametrize(("claim", "sentence"), HEADER, ids=[claim[:20] for claim, _ in HEADER])
def test_a_header_with_a_checksum_of_its_own_is_checked_as_well(claim, sentence, sound, tmp_path):
    header, tensors = sound
    assert re.match(sentence, refusal(f"{header[:-1]}, {claim}}}", tensors, tmp_path / "model"))


@pytest.mark.parametrize("header", ["{}", "null", "[]", '"text"', "1"])
def test_a_header_that_is_no_header_is_refused_in_words(header, sound, tmp_path):
    assert refusal(header, sound[1], tmp_path / "model").startswith("it has format version None, this release")


def test_a_pipe_is_no_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe is no regular file\.$"):
        load_checkpoint(tmp_path / "pipe")


def test_a_default_patch_is_found_at_once_however_large_the_image():
    for side in range(4, 400):
        divisors = [n for n in range(2, side // 2 + 1) if side % n == 0 and side // n <= 32]
        if divisors:
            assert default_patch_size(side) == min(divisors, key=lambda n: abs(n - side / 8))
    assert default_patch_size(2**62) == 2**59
