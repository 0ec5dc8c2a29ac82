import asyncio
import contextlib
import copy
import multiprocessing
import pickle
import warnings

import numpy as np
import pytest
import torch
from packed_models import CLASSES, images, logits_of, trained, vit
from PIL import Image

import binvit
from binvit.packed import Card
from binvit.packed.files import to_bytes

X = images(5)
TARGETS = torch.arange(5) % CLASSES
SCHEMES = {
    "gsb": binvit.scheme("gsb", attention_bias="relative"),
    "floats": binvit.scheme("gsb", components=("mlp",)),  # attention, head and patches in float: sums that round
    "xnor-k": binvit.scheme("xnor-k"),
    "irnet": binvit.scheme("irnet"),
}


@contextlib.contextmanager
def setting(get, set_, value):
    before = get()
    set_(value)
    try:
        yield
    finally:
        set_(before)


SETTINGS = {
    "float64": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "bfloat16": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "default device": lambda: setting(lambda: None, torch.set_default_device, "meta"),
    "cpu": lambda: torch.device("cpu"),
    "1 thread": lambda: setting(torch.get_num_threads, torch.set_num_threads, 1),
    "3 threads": lambda: setting(torch.get_num_threads, torch.set_num_threads, 3),
    "inference": torch.inference_mode,
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
}


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_answers_do_not_depend_on_what_the_program_around_has_set(scheme, exact):
    model = trained(SCHEMES[scheme])
    packed = binvit.pack(model, exact=exact)
    expected, data = packed(X), to_bytes(packed)
    wrong = []
    for name, enter in SETTINGS.items():
        with enter():
            repacked = binvit.pack(model, exact=exact)
            answers = [p(X) for p in (packed, pickle.loads(pickle.dumps(packed)), repacked)]  # noqa: S301
            empty = packed(X[:0])
        wrong += [
            f"{name}, {what}"
            for what, logits in zip(("call", "load", "pack"), answers, strict=True)
            if logits.dtype != torch.float32 or logits.device.type != "cpu" or not torch.equal(logits, expected)
        ]
        wrong += [f"{name}, file"] * (to_bytes(repacked) != data) + [f"{name}, empty"] * (empty.dtype != torch.float32)
        # What came out of inference mode runs outside of it, too.
        wrong += [f"{name}, later"] * (not torch.equal(repacked(X), expected))
    assert wrong == []


@pytest.mark.parametrize("name", binvit.list_schemes())
@pytest.mark.parametrize("defaults", ["float64", "bfloat16", "default device"])
def test_training_does_not_depend_on_defaults(name, defaults):
    def losses(float_model, enter):
        with enter():
            model, found = binvit.binarize(float_model, name), []
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            for _ in range(2):
                loss = torch.nn.functional.cross_entropy(model(X), TARGETS)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
            assert {p.dtype for p in model.parameters()} == {torch.float32}
            return found

    float_model = vit(depth=1)
    assert losses(float_model, SETTINGS[defaults]) == losses(float_model, contextlib.nullcontext)


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_asyncio(exact):
    packed = binvit.pack(trained("gsb"), exact=exact)
    expected = packed(X).numpy()

    async def several():
        return await asyncio.gather(*(asyncio.to_thread(packed, X.numpy()) for _ in range(4)))

    for logits in asyncio.run(several()):
        np.testing.assert_array_equal(logits, expected)


def answer(models, answers):
    answers.put([packed(X.numpy()) for packed in models])


@pytest.mark.parametrize("method", sorted({"fork", "spawn"} & set(multiprocessing.get_all_start_methods())))
def test_other_processes_compute_the_same_logits(method):
    models = [binvit.pack(trained("gsb"), exact=exact) for exact in (False, True)]
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    with SETTINGS["3 threads"](), warnings.catch_warnings():
        expected = [packed(X.numpy()) for packed in models]  # kernels and threads are at work before a fork
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own: threads do not survive
        worker = context.Process(target=answer, args=(models, answers))
        worker.start()
    try:
        np.testing.assert_array_equal(answers.get(timeout=120), expected)
    finally:
        worker.kill()
        worker.join()


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_pickles_are_as_small_as_the_file(exact):
    packed = binvit.pack(trained("gsb"), exact=exact, classes=list("abcde"))
    expected = packed(X)  # scratch has been used
    data = pickle.dumps(packed)
    assert len(data) <= len(to_bytes(packed)) + 200
    for twin in (pickle.loads(data), copy.deepcopy(packed), copy.copy(packed)):  # noqa: S301
        assert torch.equal(twin(X), expected)
        assert (twin.exact, twin.classes) == (exact, packed.classes)


HEADS = {
    "classes": ({}, (CLASSES,)),
    "features": ({"num_classes": 0}, (48,)),
    "all tokens": ({"num_classes": 0, "global_pool": ""}, (17, 48)),
    "classes of all tokens": ({"global_pool": ""}, (17, CLASSES)),
    "mean": ({"num_classes": 0, "global_pool": "avg"}, (48,)),
    "attention pooling": ({"global_pool": "map"}, (CLASSES,)),
    "mean of query and key": ({"global_pool": "prr"}, (CLASSES,)),
    "distilled": ({"distilled": True}, (CLASSES,)),
    "distilled features": ({"distilled": True, "num_classes": 0}, (48,)),
}


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("head", HEADS)
def test_no_images_give_an_empty_answer_of_the_right_shape(head, exact):
    options, shape = HEADS[head]
    model = binvit.calibrate(binvit.binarize(vit(depth=1, **options), "gsb"), X).eval()
    packed = binvit.pack(model, exact=exact)
    assert packed(X).shape == logits_of(model, X).shape == (5, *shape)
    for empty in (packed(X[:0]), packed(X[:0].numpy())):
        assert empty.shape == (0, *shape)
    assert packed(X[:0].numpy()).dtype == np.float32


NAMES = ("ant", "bee", "cat", "dog", "emu")
NORMALIZATION = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


@pytest.fixture(scope="module")
def described():
    card = {"data": "five insects", "accuracy": 0.75, "seeds": (1, 2), "licence": "MIT", "recipe": "smoke"}
    return binvit.pack(trained("gsb"), classes=NAMES, card=card, **NORMALIZATION)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("size", [(16, 16), (40, 30), (30, 41), (7, 9), (16, 100)])
def test_preprocessing_is_that_of_training(size, described, tmp_path):
    from binvit.lab.data.transforms import eval_transform

    pixels = picture(*size)
    image = Image.fromarray(pixels)
    expected = eval_transform(16, **NORMALIZATION)(image)[None]
    image.save(tmp_path / "image.png")
    path = tmp_path / "image.png"
    for source in (image, pixels, path, str(path), path.read_bytes(), [path], (image,)):
        assert torch.equal(described.preprocess(source), expected)
    grey = Image.fromarray(pixels[..., 0])
    for source in (grey, pixels[..., 0]):
        assert torch.equal(described.preprocess(source), described.preprocess(grey.convert("RGB")))
    assert torch.equal(described.preprocess([image, grey]), torch.cat([expected, described.preprocess(grey)]))
    assert described.preprocess([]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_preprocessing_cuts_as_timm_does(interpolation):
    from timm.data import create_transform

    packed = binvit.pack(trained("gsb"), resize=20, interpolation=interpolation, **NORMALIZATION)
    options = {"crop_pct": 16 / 20, "interpolation": interpolation, **NORMALIZATION}
    for size in [(40, 30), (33, 77), (20, 20), (16, 16)]:
        image = Image.fromarray(picture(*size))
        torch.testing.assert_close(packed.preprocess(image)[0], create_transform(16, **options)(image))


def test_preprocessing_of_other_shapes():
    wide = binvit.calibrate(binvit.binarize(vit(img_size=(8, 24)), "gsb"), torch.randn(2, 3, 8, 24)).eval()
    packed = binvit.pack(wide, resize=10, **NORMALIZATION)
    flat = np.full((50, 60, 3), 128, np.uint8)
    expected = (128 / 255 - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.25, 0.3])
    torch.testing.assert_close(packed.preprocess(flat), expected.view(1, 3, 1, 1).expand(1, 3, 8, 24))
    grey_model = binvit.calibrate(binvit.binarize(vit(in_chans=1), "gsb"), X[:, :1]).eval()
    grey = binvit.pack(grey_model, mean=[0.5], std=[0.5])
    assert grey.preprocess(flat).shape == (1, 1, 16, 16)


def test_what_a_pretrained_configuration_says_about_images_is_kept():
    import timm

    model = timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=5)
    packed = binvit.pack(binvit.calibrate(binvit.binarize(model, "gsb"), torch.randn(2, 3, 32, 32)).eval())
    assert (packed.blueprint.resize, packed.blueprint.interpolation) == (35, "bicubic")  # crop_pct 0.9


def test_what_the_caller_says_about_images_goes_before_a_pretrained_configuration():
    model = trained("gsb", depth=1)
    model.pretrained_cfg = {**NORMALIZATION, "crop_pct": 0.5, "interpolation": "bilinear"}
    for options, expected in (
        ({}, (32, "bilinear")),
        ({"interpolation": "bicubic"}, (32, "bicubic")),
        ({"resize": 20}, (20, "bilinear")),
        (NORMALIZATION, (None, "bicubic")),
    ):
        packed = binvit.pack(model, **options)
        assert (packed.blueprint.resize, packed.blueprint.interpolation) == expected
    for options in ({"interpolation": "foo"}, {"interpolation": ""}, {"resize": "20"}, {"resize": 0}):
        with pytest.raises(ValueError, match=r"resize|interpolation"):
            binvit.pack(model, **options)


BAD_IMAGES = {
    "missing": (lambda folder: folder / "none.png", FileNotFoundError, "does not exist"),
    "no image": (lambda folder: b"poem", ValueError, "cannot be decoded"),
    "floats": (lambda folder: np.zeros((8, 8, 3)), ValueError, "got float64 of shape"),
    "four axes": (lambda folder: np.zeros((1, 8, 8, 3), np.uint8), ValueError, r"got uint8 of shape \(1, 8, 8, 3\)"),
    "nothing": (lambda folder: np.zeros((0, 8, 3), np.uint8), ValueError, r"got uint8 of shape \(0, 8, 3\)"),
    "a path with NUL": (lambda folder: "a\0b.png", ValueError, r"must not hold a NUL byte, got 'a\\x00b\.png'"),
    "a number": (lambda folder: 3, ValueError, "got int"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_what_is_no_image_is_refused(case, described, tmp_path):
    source, kind, sentence = BAD_IMAGES[case]
    for call in (described.preprocess, described.predict):
        with pytest.raises(kind, match=sentence) as caught:
            call(source(tmp_path))
        assert str(caught.value).endswith(".")


def test_predictions_are_names_and_probabilities(described):
    pictures = [picture(20, 30, seed) for seed in range(3)]
    x = described.preprocess(pictures)
    probabilities = described(x).softmax(-1)
    for found in (described.predict(pictures), described.predict(x), described.predict(x.numpy(), top=9, threads=1)):
        assert len(found) == 3
        for pairs, row in zip(found, probabilities, strict=True):
            assert sorted(name for name, _ in pairs) == sorted(NAMES)
            assert [p for _, p in pairs] == sorted((p for _, p in pairs), reverse=True)
            assert dict(pairs) == pytest.approx(dict(zip(NAMES, row.tolist(), strict=True)))
    assert [len(pairs) for pairs in described.predict(pictures[0], top=2)] == [2]
    unnamed = binvit.pack(trained("gsb"))
    assert unnamed.predict(x, top=1)[0][0][0] == f"class {int(unnamed(x)[0].argmax())}"
    assert described.predict(x[:0]) == []


def test_predictions_need_classes_and_a_normalization(described):
    with pytest.raises(ValueError, match="top, must be a whole number of at least 1, got 0"):
        described.predict(X, top=0)
    features = binvit.calibrate(binvit.binarize(vit(num_classes=0), "gsb"), X).eval()
    with pytest.raises(ValueError, match="no head that tells classes"):
        binvit.pack(features).predict(X)
    with pytest.raises(ValueError, match="known normalization"):
        binvit.pack(trained("gsb")).predict(picture(16, 16))


def test_the_model_card_is_in_header_and_repr(described, tmp_path):
    loaded = binvit.load(binvit.save(described, tmp_path / "model"))
    assert loaded.blueprint == described.blueprint
    assert loaded.blueprint.card == Card("five insects", "smoke", 0.75, (1, 2), "MIT")
    for packed in (described, loaded):
        for words in ("five insects", "smoke", "75.00%", "1, 2", "MIT", "kB"):
            assert words in repr(packed)


CARDS = {
    "accuracy in percent": ({"accuracy": 75.0}, "accuracy must be at most 1"),
    "not finite": ({"accuracy": float("nan")}, "accuracy must be"),
    "a text as seeds": ({"seeds": "12"}, "seeds must be a list"),
    "a number as licence": ({"licence": 3}, "licence must be a text"),
    "unknown": ({"colour": "red"}, "Unknown card field 'colour'"),
    "no mapping": ([1], "must be a mapping"),
}


@pytest.mark.parametrize("case", CARDS)
def test_cards_that_say_nothing_sensible_are_refused(case):
    card, sentence = CARDS[case]
    with pytest.raises(ValueError, match=sentence):
        binvit.pack(trained("gsb", depth=1), card=card)


@pytest.mark.parametrize("options", [{"resize": 8}, {"resize": 0}, {"resize": 20.5}, {"interpolation": "nearest"}])
def test_sizes_that_do_not_fit_are_refused(options):
    with pytest.raises(ValueError, match=r"resize|interpolation"):
        binvit.pack(trained("gsb", depth=1), **options)
