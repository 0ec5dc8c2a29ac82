import itertools
import sys
import threading
from contextlib import ExitStack, contextmanager

import pytest
import torch
from packed_models import images, trained

import binvit
from binvit.packed.fast import threads
from binvit.packed.fast.threads import Pool


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
