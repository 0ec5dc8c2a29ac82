"""Official GSB checkpoints load, agree with the released code, and bad files get one sentence."""

import errno
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from limits import open_files
from timm.models.deit import VisionTransformerDistilled

import binvit
from binvit.nn.official_gsb import official_names

FOLDER = Path(__file__).parent / "golden"
CHECKPOINT = FOLDER / "imrl_tiny.pth"
GOLDEN = np.load(FOLDER / "imrl_tiny_io.npz")
IMAGES = torch.tensor(GOLDEN["x"])


@pytest.fixture(scope="module")
def trained():
    """The official model after one backward pass in training mode, with its logits and its loss."""
    model = binvit.load_official_gsb(CHECKPOINT).train()
    model.set_distilled_training(True)
    cls, dist = model(IMAGES)
    labels, teacher = (torch.tensor(GOLDEN[key]) for key in ("y", "teacher"))
    loss = 0.5 * F.cross_entropy(cls, labels) + 0.5 * F.cross_entropy(dist, teacher)
    loss.backward()
    return model, cls.detach(), dist.detach(), loss.detach()


def test_shapes_follow_from_the_file():
    model = binvit.load_official_gsb(CHECKPOINT)
    assert isinstance(model, VisionTransformerDistilled)
    assert not model.training
    assert (model.embed_dim, len(model.blocks), model.num_classes) == (48, 2, 10)
    assert model.blocks[0].attn.num_heads == 3
    assert model.patch_embed.img_size == (32, 32)
    assert model.scheme == binvit.scheme("gsb", reduce="batch", init="official")
    assert all(module.eps == 1e-12 for module in model.modules() if isinstance(module, torch.nn.LayerNorm))


@torch.no_grad()
def test_logits_of_the_batch():
    logits = binvit.load_official_gsb(CHECKPOINT, reduce="batch")(IMAGES)
    np.testing.assert_allclose(logits, GOLDEN["logits_batch"], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("reduce", ["batch", "sample"])
def test_logits_of_single_images(reduce):
    model = binvit.load_official_gsb(CHECKPOINT, reduce=reduce)
    logits = torch.cat([model(image) for image in IMAGES.split(1)])
    np.testing.assert_allclose(logits, GOLDEN["logits_single"], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_taking_the_maxima_per_image_makes_the_released_model_independent_of_the_batch():
    model = binvit.load_official_gsb(CHECKPOINT, reduce="sample")
    np.testing.assert_allclose(model(IMAGES), GOLDEN["logits_single"], rtol=1e-4, atol=1e-4)
    assert np.abs(GOLDEN["logits_single"] - GOLDEN["logits_batch"]).max() > 1e-2


def test_both_heads_and_the_loss_in_training_mode(trained):
    _, cls, dist, loss = trained
    np.testing.assert_allclose(cls, GOLDEN["train_cls"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dist, GOLDEN["train_dist"], rtol=1e-4, atol=1e-4)
    assert loss.item() == pytest.approx(float(GOLDEN["loss"]), abs=1e-5)


def test_names_cover_every_gradient_and_every_parameter(trained):
    names = official_names(depth=2)
    assert {key.removeprefix("grad/") for key in GOLDEN.files if key.startswith("grad/")} == set(names)
    assert set(names.values()) == {name for name, _ in trained[0].named_parameters()}
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize(("theirs", "ours"), official_names(depth=2).items())
def test_gradients(trained, theirs, ours):
    want = GOLDEN[f"grad/{theirs}"]
    got = trained[0].get_parameter(ours).grad.numpy().reshape(want.shape)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    # Many of these gradients are themselves below 1e-4, so compare with their own size too.
    assert np.abs(got - want).max() <= 1e-3 * np.abs(want).max() + 1e-8


def test_loaded_scales_are_not_initialized_again():
    model = binvit.load_official_gsb(CHECKPOINT).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(IMAGES)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.fixture
def state():
    return torch.load(CHECKPOINT, weights_only=True)["model"]


def test_a_plain_string_is_a_path_too():
    assert binvit.load_official_gsb(str(CHECKPOINT)).num_classes == 10


def test_a_checkpoint_without_the_flag_of_the_patch_embedding_loads(state, tmp_path):
    del state["patch_embed.proj.init_state"]
    torch.save({"model": state}, tmp_path / "old.pth")
    assert binvit.load_official_gsb(tmp_path / "old.pth").num_classes == 10


def refused(path, sentence, error=ValueError):
    with pytest.raises(error, match=sentence) as caught:
        binvit.load_official_gsb(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert path.name in message


def test_a_missing_file(tmp_path):
    refused(tmp_path / "nothing.pth", "There is no checkpoint", FileNotFoundError)
    refused(tmp_path, "There is no checkpoint", FileNotFoundError)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file(tmp_path, share):
    content = CHECKPOINT.read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: int(share * len(content))])
    refused(tmp_path / "cut.pth", "truncated or no PyTorch checkpoint")


@pytest.mark.parametrize("content", [b"not a checkpoint", b"\x80\x04\x95", b"\x00" * 500, "Grüße\n".encode() * 50])
def test_a_foreign_file(tmp_path, content):
    (tmp_path / "foreign.pth").write_bytes(content)
    refused(tmp_path / "foreign.pth", "truncated or no PyTorch checkpoint")


def test_a_file_that_cannot_be_opened_is_not_called_truncated():
    with pytest.raises(OSError, match="Too many open files") as error, open_files(0):
        binvit.load_official_gsb(CHECKPOINT)
    assert error.value.errno == errno.EMFILE


class Harmful:
    def __reduce__(self):
        raise_ = "raise SystemError('a checkpoint ran code')"
        return exec, (raise_,)


def test_a_file_that_wants_to_run_code_is_refused(tmp_path):
    torch.save({"model": Harmful()}, tmp_path / "harmful.pth")
    refused(tmp_path / "harmful.pth", "no PyTorch checkpoint of plain tensors")


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"state": {}}, {"model": {"epoch": 3}}, {"model": [1]}])
def test_a_file_without_a_model(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    refused(tmp_path / "other.pth", "the key 'model' with a dictionary of tensors is missing")


def test_keys_that_are_no_names(state, tmp_path):
    torch.save({"model": state | {3: torch.zeros(1)}}, tmp_path / "other.pth")
    refused(tmp_path / "other.pth", "the key 'model' with a dictionary of tensors is missing")


def test_numbers_that_are_not_finite(state, tmp_path):
    torch.save({"model": state | {"norm.bias": torch.full_like(state["norm.bias"], torch.nan)}}, tmp_path / "nan.pth")
    refused(tmp_path / "nan.pth", "the tensor 'norm.bias' holds numbers that are not finite")
    large = torch.full_like(state["norm.bias"], 1e300, dtype=torch.float64)  # finite until it is converted
    torch.save({"model": state | {"norm.bias": large}}, tmp_path / "large.pth")
    refused(tmp_path / "large.pth", "the tensor 'norm.bias' holds numbers that are not finite in float32")


def test_an_empty_model(tmp_path):
    torch.save({"model": {}}, tmp_path / "empty.pth")
    refused(tmp_path / "empty.pth", "is missing")


KEYS = sorted(torch.load(CHECKPOINT, weights_only=True)["model"])


@pytest.mark.parametrize("key", [k for k in KEYS if not k.endswith("init_state") and "blocks.0" not in k])
def test_a_missing_key_is_named(state, tmp_path, key):
    del state[key]
    torch.save({"model": state}, tmp_path / "missing.pth")
    refused(tmp_path / "missing.pth", f"the key '{re.escape(key)}' is missing")


@pytest.mark.parametrize("key", ["decoder.weight", "blocks.0.attn.clip_attn4", "blocks.x.norm1.weight", "head.extra"])
def test_an_unexpected_key_is_named(state, tmp_path, key):
    state[key] = torch.zeros(3)
    torch.save({"model": state}, tmp_path / "more.pth")
    refused(tmp_path / "more.pth", f"the key '{re.escape(key)}' is unexpected")


DECIDING = (
    "patch_embed.proj.weight",
    "pos_embed",
    "blocks.0.mlp.fc1.weight",
    "blocks.0.attn.move_q.bias",
    "head.weight",
)
SHAPES = [(k, (7,)) for k in KEYS if not k.endswith("init_state") and "blocks.1" not in k]
SHAPES += [(k, shape) for k in DECIDING for shape in ((), (2, 3, 5, 1, 1), (3, 0), (0, 0, 0, 0), (1, 1, 4))]


@pytest.mark.parametrize(("key", "shape"), SHAPES)
def test_another_shape_is_refused(state, tmp_path, key, shape):
    state[key] = torch.zeros(shape)
    torch.save({"model": state}, tmp_path / "shape.pth")
    refused(tmp_path / "shape.pth", "shape of|pos_embed covers|wrong number of dimensions|do not divide|is empty")


def test_a_transposed_weight_is_refused(state, tmp_path):
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"].mT.contiguous()
    torch.save({"model": state}, tmp_path / "transposed.pth")
    refused(tmp_path / "transposed.pth", r"'blocks.0.attn.qkv.weight' is \(48, 144\), expected \(144, 48\)")


def test_a_wrong_reduction_is_refused():
    with pytest.raises(ValueError, match="reduce must be one of batch, sample, head, row, got 'all'"):
        binvit.load_official_gsb(CHECKPOINT, reduce="all")


@pytest.mark.parametrize("number", ["99999999999", "9" * 5000, "7"], ids=["11 digits", "5000 digits", "gap"])
def test_a_block_number_claims_no_blocks(state, tmp_path, number):
    torch.save({"model": state | {f"blocks.{number}.norm1.weight": torch.zeros(48)}}, tmp_path / "number.pth")
    refused(tmp_path / "number.pth", r"the key 'blocks\.2\.norm1\.weight' is missing")


CLAIMS = {
    "stride 0": lambda state: {"pos_embed": torch.zeros(1).expand(1, 10**6, 10**6)},
    "one storage": lambda state: dict.fromkeys(state, torch.zeros(10**5)),
    "meta": lambda state: {"norm.bias": torch.empty(48, device="meta")},
    "8 bits": lambda state: {"norm.bias": torch.zeros(48).to(torch.float8_e4m3fn)},
    "nested": lambda state: {"norm.bias": torch.nested.nested_tensor([torch.zeros(24), torch.zeros(24)])},
}


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns of what it has in beta
def test_tensors_that_claim_more_than_the_file_has(state, tmp_path, claim):
    torch.save({"model": state | CLAIMS[claim](state)}, tmp_path / "claim.pth")
    refused(tmp_path / "claim.pth", "is damaged: its tensors claim|is no plain one")


def test_a_compressed_archive_is_not_unpacked(tmp_path):
    with (
        zipfile.ZipFile(CHECKPOINT) as source,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in source.namelist():
            data = source.read(entry)
            bomb.writestr(entry, bytes(10**8) if entry.endswith("/data/0") else data)
    refused(tmp_path / "bomb.pth", "truncated or no PyTorch checkpoint")


def test_every_parameter_is_there_and_learns():
    model = binvit.load_official_gsb(CHECKPOINT)
    assert all(tensor.device.type == "cpu" for tensor in [*model.parameters(), *model.buffers()])
    assert all(parameter.requires_grad for parameter in model.parameters())
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(set(pointers)) == len(pointers)
