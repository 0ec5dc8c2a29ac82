import itertools
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import images, trained

import binvit
from binvit.packed.fast import path, threads
from binvit.packed.fast.threads import STEP, Pool, finish_part, take_part, wait_for_parts


@contextmanager
def preempted(step, other, file=threads.__file__):
    """Call other() before one of the bytecodes that the file runs inside, as a switch of threads would."""
    passed = []

    def count(frame, event, argument):
        if event == "opcode":
            passed.append(frame)
            if len(passed) == step + 1:
                other()
        return count

    def trace(frame, event, argument):
        if frame.f_code.co_filename != file:
            return None
        frame.f_trace_opcodes = True
        return count

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield passed
    finally:
        sys.settrace(before)


def test_a_pool_lends_nothing_twice_wherever_threads_are_switched():
    for step in itertools.count():
        pool, held = Pool(2), []
        for key in (1, 2):
            with pool.borrow(key, object):
                pass
        with ExitStack() as stack:

            def borrow_both(pool=pool, held=held, stack=stack):
                held.extend(stack.enter_context(pool.borrow(key, object)) for key in (1, 2))

            with preempted(step, borrow_both) as passed, pool.borrow(1, object) as mine:
                assert all(thing is not mine for thing in held)
            if len(passed) <= step:
                break
            borrow_both()
            assert len({id(thing) for thing in held}) == len(held) == 4
    assert step > 20


def test_a_pool_keeps_what_was_used_last_and_drops_what_failed():
    pool, made = Pool(2), []

    def make():
        made.append(object())
        return made[-1]

    for key in ("a", "b", "a", "c", "a", "c"):
        with pool.borrow(key, make):
            pass
    assert len(made) == 3
    with pytest.raises(RuntimeError), pool.borrow("a", make):
        raise RuntimeError
    with pool.borrow("c", make) as c, pool.borrow("a", make) as a:
        assert c is made[2]
        assert a is made[3]


@pytest.mark.parametrize("options", [{}, {"exact": True}])
def test_python_threads_with_batches_of_several_sizes_share_a_model(options):
    x, interval = images(7), sys.getswitchinterval()
    packed = binvit.pack(trained("gsb"), **options)
    expected, wrong = packed(x), []

    def run(size):
        for _ in range(10):
            for part, logits in zip(x.split(size), expected.split(size), strict=True):
                if not torch.equal(packed(part), logits):
                    wrong.append(size)

    sys.setswitchinterval(1e-6)
    try:
        workers = [threading.Thread(target=run, args=(size,)) for size in (1, 2, 3, 5, 7)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


@pytest.mark.parametrize("order", [[0], [1], [0, 1], [1, 0]])
def test_one_image_needs_none_of_the_threads_that_share_it(monkeypatch, order):
    class OneByOne:
        """A team of which some never come, and some when all work is done."""

        def run(self, task, threads):
            for number in order if threads == 2 else [0]:  # a machine may have one core
                task(number, threads)

    packed, one = binvit.pack(trained("gsb")), images(1)
    expected = packed(one, threads=1)
    monkeypatch.setattr(path, "TEAM", OneByOne())
    assert torch.equal(packed(one, threads=2), expected)


def test_few_small_images_are_left_to_one_thread_unless_the_caller_says_otherwise(monkeypatch):
    class Counting:
        def run(self, task, threads):
            asked.append(threads)
            task(0, 1)

    asked: list[int] = []
    packed = binvit.pack(trained("gsb"))
    monkeypatch.setattr(path, "TEAM", Counting())
    monkeypatch.setattr("binvit.packed.vit.torch_threads", lambda: 2)
    monkeypatch.setattr("binvit.bits.get_threads", lambda: 2)
    packed(images(1))
    packed(images(100))
    packed(images(1), threads=2)
    assert asked == [1, 2, 2]


# Every image is larger than what torch does with one thread of its own accord.
_TORCH_SLEEPS = """
import threading
from pathlib import Path
import torch, binvit
from binvit.packed.fast import patches
from timm.models.vision_transformer import VisionTransformer

def cpu_time():
    own = {str(thread.native_id) for thread in threading.enumerate()}
    tasks = [task for task in Path("/proc/self/task").iterdir() if task.name not in own]
    return {task.name: int((task / "schedstat").read_text().split()[0]) for task in tasks}

torch.set_num_threads(2)
vit = VisionTransformer(img_size=160, patch_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=5)
images = torch.randn(2, 3, 160, 160)
packed = binvit.pack(binvit.calibrate(binvit.binarize(vit, "gsb"), images), mean=(0.5,) * 3, std=(0.5,) * 3)
photo = (255 * torch.rand(160, 160, 3)).byte().numpy()
tried = {"sum": images.sum, "one": lambda: packed(images[:1]), "two": lambda: packed(images)}
tried["photo"] = lambda: packed.predict([photo, photo])
holes = images / 0
tried["nan"] = lambda: packed(holes)
patches._LARGEST_TRIAL = 0
unfolded = binvit.pack(binvit.calibrate(binvit.binarize(vit, "gsb"), images))
tried["unfolded"] = lambda: unfolded(images, threads=1)

def spent(call):
    call()
    threading.Event().wait(0.1)  # what spins falls asleep
    before = cpu_time()
    call()
    threading.Event().wait(0.1)
    return sum(cpu_time().values()) - sum(before.values())

for name, call in tried.items():
    print(name, min(spent(call) for _ in range(3)))  # another may have been awake from before
"""


@pytest.mark.skipif(not Path("/proc/self/schedstat").is_file(), reason="this system does not count threads' time")
def test_a_prediction_wakes_no_thread_of_torch():
    done = subprocess.run([sys.executable, "-c", _TORCH_SLEEPS], capture_output=True, text=True, check=True)
    spent = {name: int(nanoseconds) for name, nanoseconds in map(str.split, done.stdout.splitlines())}
    if not spent.pop("sum"):
        pytest.skip("torch has one thread on this machine")
    assert spent == dict.fromkeys(("one", "two", "photo", "nan", "unfolded"), 0)


@given(st.integers(1, 20), st.lists(st.integers(0, 3), min_size=100, max_size=100))
@settings(deadline=None)
def test_every_part_is_taken_once_and_each_thread_begins_at_its_end(parts, turns):
    """However the threads' turns come."""
    counters, taken = np.zeros(2 * STEP, np.int64), {task: [] for task in range(4)}
    current = {}
    for task in [*turns, *(task for task in range(4) for _ in range(parts + 1))]:
        if current.get(task, 0) < 0:
            continue
        ask = finish_part if task in current else take_part
        current[task] = int(ask(counters, STEP, parts, task))
        if current[task] >= 0:
            taken[task].append(current[task])
    assert sorted(part for places in taken.values() for part in places) == list(range(parts))
    assert all(places == sorted(places, reverse=task % 2 == 1) for task, places in taken.items())
    front, back = taken[0] + taken[2], taken[1] + taken[3]
    assert not front or not back or max(front) < min(back)
    wait_for_parts(counters, STEP, parts)
    assert not counters[:STEP].any()
