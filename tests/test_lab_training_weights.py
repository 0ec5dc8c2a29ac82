import dataclasses
import errno
import hashlib
import socket
import threading
import time
import zipfile

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from archive_maker import result
from limits import open_files
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

import binvit
from binvit.lab.training.model import build_model, default_patch_size
from binvit.lab.training.recipes import list_recipes, parse_options, recipe
from binvit.lab.training.weights import create_pretrained, file_hash, load_weights
from binvit.lab.trials import archive
from binvit.lab.trials.train_trial import train_trial
from binvit.lab.trials.trial import Trial

SHAPE = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 2.0}


def vit(image_size=16, classes=7, **options):
    torch.manual_seed(3)
    return VisionTransformer(img_size=image_size, num_classes=classes, **{**SHAPE, **options})


@pytest.fixture
def weights(tmp_path):
    """Write a state in timm's layout: 4x4 patches, layer scales, no head, halves."""
    state = {name: tensor for name, tensor in vit(init_values=0.3).half().state_dict().items() if "head" not in name}
    safetensors.torch.save_file(state, tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors"


def test_weights_fill_a_model_of_another_size_and_other_classes(weights):
    stored = safetensors.torch.load_file(weights)
    model = vit(24, classes=3, init_values=1e-5)
    head = model.head.weight.clone()
    load_weights(model, weights)
    expected = resample_abs_pos_embed(stored["pos_embed"].float(), new_size=(6, 6), num_prefix_tokens=1)
    torch.testing.assert_close(model.pos_embed.data, expected)
    assert torch.equal(model.head.weight, head)
    for name in stored.keys() - {"pos_embed"}:
        assert torch.equal(model.state_dict()[name], stored[name].float()), name
    binary = binvit.binarize(model, "gsb")
    assert torch.equal(binary.blocks[0].ls1.gamma, torch.full((32,), 0.3).half().float())


@pytest.mark.parametrize(
    ("more", "has"), [({"reg_tokens": 4}, "1 of cls_token, 4 of reg_token"), ({}, "1 of cls_token")]
)
def test_weights_with_other_tokens_beside_the_patches_are_told_in_words(tmp_path, more, has):
    torch.save(vit(**more).state_dict(), tmp_path / "vit.pth")
    wanted = "2 of reg_token" if more else "1 of cls_token, 2 of reg_token"
    model = vit(24, reg_tokens=2, class_token=not more, global_pool="avg" if more else "token")
    with pytest.raises(
        ValueError, match=rf"do not fit the model \(their tokens .* are {has}, the model's {wanted}\)\.$"
    ):
        load_weights(model, tmp_path / "vit.pth")


@pytest.mark.parametrize("key", ["model", "state_dict", None])
def test_states_that_torch_has_saved(tmp_path, key):
    state = vit().state_dict()
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "vit.pth")
    model = vit(classes=3)
    load_weights(model, tmp_path / "vit.pth")
    assert torch.equal(model.pos_embed, state["pos_embed"])
    same = vit()
    load_weights(same, tmp_path / "vit.pth")
    assert torch.equal(same.head.weight, state["head.weight"])  # the same classes


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.pop("norm.weight"), r"another model's: of the tensor 'norm\.weight' they have none"),
        (lambda state: state.update(extra=torch.zeros(2)), "of the tensor 'extra' the model has none"),
        (lambda state: state.update({"norm.weight": torch.zeros(2)}), r"'norm\.weight' has the shape \(2,\), expected"),
        (lambda state: state.update(pos_embed=torch.zeros(1, 12, 32)), "do not fit the model"),
        (lambda state: state["norm.bias"].fill_(torch.nan), r"damaged: the tensor 'norm\.bias' holds numbers"),
        (
            lambda state: state.update({"norm.bias": torch.full((32,), 1e300, dtype=torch.float64)}),
            "not finite in float32",
        ),
        (lambda state: state.update(count=torch.zeros(2, dtype=torch.int64)), "'count' is no tensor of floating"),
        (lambda state: state.clear(), "expected a mapping of names to tensors"),
    ],
)
def test_weights_that_do_not_fit_get_one_sentence(tmp_path, change, sentence):
    state = vit().state_dict()
    change(state)
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=sentence) as caught:
        load_weights(vit(), tmp_path / "vit.pth")
    assert "\n" not in str(caught.value)


CLAIMS = {
    "stride 0": lambda: torch.zeros(1).expand(10**6, 10**6),
    "sparse": lambda: torch.eye(5).to_sparse(),
    "compressed rows": lambda: torch.eye(5).to_sparse_csr(),
    "meta": lambda: torch.empty(10**6, 10**6, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "8 bits": lambda: torch.zeros(3).to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("name", ["pos_embed", "head.weight", "patch_embed.proj.weight", "other"])
@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns of what it has in beta
def test_tensors_that_are_not_what_they_claim_are_refused_before_anything_is_computed(tmp_path, claim, name):
    torch.save(vit().state_dict() | {name: CLAIMS[claim]()}, tmp_path / "vit.pth")
    with pytest.raises(
        ValueError, match=r"vit\.pth (cannot be read: the tensor .* is no plain one|is damaged: its)"
    ) as e:
        load_weights(vit(), tmp_path / "vit.pth")
    assert "\n" not in str(e.value)


def test_a_compressed_archive_of_weights_is_not_unpacked(tmp_path):
    torch.save(vit().state_dict(), tmp_path / "vit.pth")
    with (
        zipfile.ZipFile(tmp_path / "vit.pth") as source,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in source.namelist():
            bomb.writestr(entry, bytes(len(source.read(entry))) if "/data/" in entry else source.read(entry))
    with pytest.raises(ValueError, match=r"bomb\.pth holds no weights"):
        load_weights(vit(), tmp_path / "bomb.pth")


def test_a_binarized_model_is_no_start(tmp_path):
    torch.save(binvit.binarize(vit(), "gsb").state_dict(), tmp_path / "gsb.pth")
    with pytest.raises(ValueError, match=r"gsb\.pth are a binarized model's; a training starts from those of a float"):
        load_weights(vit(), tmp_path / "gsb.pth")


def test_files_that_are_no_weights_get_one_sentence(tmp_path, weights):
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:-9])
    (tmp_path / "text.pth").write_text("hello")
    torch.save(vit(), tmp_path / "pickle.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    for name in ("cut.safetensors", "text.pth", "pickle.pth", "list.pth"):
        with pytest.raises(ValueError, match=f"{name} holds no weights"):
            load_weights(vit(), tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"gone\.pth does not exist"):
        load_weights(vit(), tmp_path / "gone.pth")
    with pytest.raises(ValueError, match=r"must not hold a NUL byte, got 'a\\x00b\.pth'"):
        load_weights(vit(), "a\0b.pth")
    with pytest.raises(ValueError, match="is no regular file"):
        load_weights(vit(), tmp_path)


def test_weights_that_cannot_be_opened_are_not_called_damaged(tmp_path, weights):
    model = vit(init_values=1e-5)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    for path in (weights, tmp_path / "vit.pth"):
        load_weights(model, path)
        with pytest.raises(OSError, match="Too many open files"), open_files(0):
            load_weights(model, path)
        with open_files(1):
            load_weights(model, path)


def small(**options):
    chosen = {"width": 32, "depth": 1, "heads": 2, "patch_size": 4, "image_size": 16, "epochs": 1, **options}
    return Trial("digits", "float", "smoke", samples_per_class=2, recipe_options=chosen)


def test_the_content_of_the_weights_is_part_of_the_trial(tmp_path):
    for name, seed in (("a.pth", 0), ("b.pth", 1), ("c.pth", 0)):
        torch.manual_seed(seed)
        torch.save(VisionTransformer(img_size=16, num_classes=5, **SHAPE).state_dict(), tmp_path / name)
    first, second, copy = (small(weights=str(tmp_path / name)) for name in ("a.pth", "b.pth", "c.pth"))
    content = (tmp_path / "a.pth").read_bytes()
    assert first.get_recipe().weights_hash == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert len({first.id, second.id, small().id}) == 3
    assert (first.id == copy.id) == (file_hash(tmp_path / "a.pth") == file_hash(tmp_path / "c.pth"))
    (tmp_path / "elsewhere.pth").write_bytes(content)
    assert small(weights=str(tmp_path / "elsewhere.pth")).id == first.id
    trained = [train_trial(trial).history[0]["train_loss"] for trial in (first, second)]
    assert trained[0] != trained[1]
    (tmp_path / "a.pth").write_bytes((tmp_path / "b.pth").read_bytes())
    with pytest.raises(ValueError, match=r"a\.pth are not those that the trial names"):
        train_trial(first)
    known = small(weights_hash=first.get_recipe().weights_hash)
    with pytest.raises(FileNotFoundError, match=r"starts from weights with the hash sha256:.*; give their file\.$"):
        train_trial(known)
    found = dataclasses.replace(known, root=str(tmp_path))  # beside the data, under any name
    assert found.id == first.id
    assert train_trial(found).history[0]["train_loss"] == trained[0]
    (tmp_path / "elsewhere.pth").unlink()
    (tmp_path / "c.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"give their file, or put it into the folder"):
        train_trial(found)


def test_an_archived_line_names_weights_by_their_hash_alone(tmp_path):
    torch.save(VisionTransformer(img_size=16, num_classes=5, **SHAPE).state_dict(), tmp_path / "a.pth")
    trial = small(weights=str(tmp_path / "a.pth"))
    archive.add([result(trial)], tmp_path / "archive")
    (line,) = (tmp_path / "archive" / "trials" / "digits.jsonl").read_text().splitlines()
    assert str(tmp_path) not in line
    assert archive.find(trial, tmp_path / "archive").id == trial.id
    assert archive.find(small(weights_hash=trial.get_recipe().weights_hash), tmp_path / "archive").id == trial.id


def test_pretrained_weights_are_refused_at_once_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens on "discard"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(
        FileNotFoundError, match=r"'deit_tiny_patch16_224' .* --weights .* timm/deit_tiny_patch16_224"
    ) as e:
        create_pretrained("deit_tiny_patch16_224")
    assert time.monotonic() - start < 10
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="timm has no pretrained weights for 'vit_base_patch16_plus_240'"):
        create_pretrained("vit_base_patch16_plus_240")


@pytest.mark.parametrize("answer", [b"", b"hello\r\n\r\n"], ids=["nothing", "no HTTP"])
def test_a_network_that_answers_wrongly_is_no_network(answer, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "*")
        refuses_download(f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path, monkeypatch)


def test_an_address_of_the_hub_that_is_none(tmp_path, monkeypatch):
    refuses_download("nowhere", tmp_path, monkeypatch)


def test_a_download_that_breaks_off_is_told_in_a_sentence(tmp_path, monkeypatch):
    def breaks(*_, **__):
        raise pytest.importorskip("httpx").ReadError("Connection reset by peer")  # which is no OSError

    monkeypatch.setattr("binvit.lab.training.weights._require_network", lambda: None)
    monkeypatch.setattr(timm, "create_model", breaks)
    refuses_download("http://127.0.0.1:9", tmp_path, monkeypatch)


def refuses_download(address, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded \([^\n\r]+\); give their file with --weights"):
        create_pretrained("deit_tiny_patch16_224")


def test_damaged_weights_of_the_cache_are_named(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *names: str(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match=r"The pretrained weights .*model\.safetensors are damaged \(.*\)\.$"):
        create_pretrained("deit_tiny_patch16_224")


def test_a_full_disk_is_no_missing_network(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("binvit.lab.training.weights._require_network", lambda: None)
    monkeypatch.setattr(timm, "create_model", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        create_pretrained("deit_tiny_patch16_224")
    assert error.value.errno == errno.ENOSPC


def test_pretrained_weights_of_the_cache_need_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--timm--deit_tiny_patch16_224.fb_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123")
    (folder / "snapshots" / "0123").mkdir(parents=True)
    state = timm.create_model("deit_tiny_patch16_224").state_dict()
    safetensors.torch.save_file(state, folder / "snapshots" / "0123" / "model.safetensors")
    model = create_pretrained("deit_tiny_patch16_224", num_classes=3)
    assert torch.equal(model.cls_token, state["cls_token"])
    assert model.head.weight.shape == (3, 192)


# --------------------------------------------------------------------------------------------------- sides and settings


def test_the_default_patch_divides_the_side():
    found = {side: default_patch_size(side) for side in (4, 6, 8, 12, 20, 28, 30, 32, 36, 62, 64, 96, 100, 224)}
    assert found == {4: 2, 6: 2, 8: 2, 12: 2, 20: 2, 28: 4, 30: 3, 32: 4, 36: 4, 62: 2, 64: 8, 96: 12, 100: 10, 224: 28}
    assert [default_patch_size(side, 4) for side in (8, 28, 32, 64, 224)] == [2, 7, 8, 16, 56]
    for side in (1, 2, 3, 7, 31, 97):
        with pytest.raises(ValueError, match=f"Images of {side} pixels cannot .*--image-size .* such as [1-9]"):
            default_patch_size(side)


@pytest.mark.parametrize("name", list_recipes())
@pytest.mark.parametrize("side", [8, 28, 32, 224])  # of digits, Fashion-MNIST, CIFAR and photographs
def test_every_named_data_set_has_a_model_in_every_recipe(name, side):
    given = recipe(name)
    with torch.device("meta"):
        model = build_model(given, 10, given.image_size or side)
    assert 4 <= model.patch_embed.num_patches <= 256


def test_settings_are_read_as_the_recipe_takes_them():
    options = parse_options(
        ["epochs=20", "lr=3e-4", "auto_augment=", "lr_batch=null", "stages=[{epochs: 2}]", "flip=.5"]
    )
    given = recipe("smoke", **options)
    assert (given.epochs, given.lr, given.auto_augment, given.lr_batch, given.flip) == (20, 3e-4, "", None, 0.5)
    assert [stage.epochs for stage in given.stages] == [2]
    assert recipe("smoke", **parse_options(["distilled=true", "optimizer=sgd"])).distilled
