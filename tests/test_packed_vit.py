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

import binvit
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
