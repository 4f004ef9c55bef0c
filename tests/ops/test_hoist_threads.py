"""What is hoisted on several threads, called from several, and after a fork."""

import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hoist_oracle import (
    LONG,
    RAGGED,
    RESULTS,
    assert_close,
    assert_equals_the_oracle,
    assert_same,
    gradients,
    make_case,
    sharing,
    sizes,
)

from nsm_graph.ops.cpu import threads


@pytest.fixture(autouse=True)
def any_work_is_shared(monkeypatch):
    monkeypatch.setattr(threads, "MIN_WORK", 1)


@sharing
@sizes
def test_any_number_of_threads_gives_the_same_rows(
    num_states, width, channels, heads, is_shared, num_threads
):
    sizes = (num_states, width, channels, heads)
    for counts in (LONG, [70] * 9, [1] * 40, RAGGED):
        case = make_case(*sizes, counts=counts, is_shared=is_shared, dtype=torch.float32)
        results = []
        for count in (1, 2, 3, 16, 100):
            num_threads(count)
            outs = [case.run() for _ in range(2)]
            grads = [gradients(out, case) for out in outs]
            assert_same(*outs)
            assert_same(*grads)
            results.append((outs[0], grads[0]))
        for out, found in results[1:]:
            assert_same(out, results[0][0])
            wanted = results[0][1]
            assert torch.equal(found["x"], wanted["x"])  # what belongs to a group
            # Sums over tokens depend on which are added up first.
            assert_close(found, wanted, 1e-5)


def test_several_threads_equal_the_oracle(num_threads):
    for count in (2, 5):
        num_threads(count)
        assert_equals_the_oracle(make_case(3, 5, 4, 2, counts=LONG), 1e-10)


def test_another_number_of_threads_in_backward(num_threads):
    case = make_case(counts=LONG)
    wanted = gradients(case.run(), case)
    for forward, backward in ((1, 3), (3, 1)):
        num_threads(forward)
        out = case.run()
        num_threads(backward)
        assert_close(gradients(out, case), wanted, 1e-10)


def test_many_python_threads_may_call_at_once(num_threads):
    cases = [make_case(counts=LONG, seed=seed, dtype=torch.float32) for seed in range(4)]
    num_threads(2)

    def step(case):
        out = case.run()
        return [*out, *gradients(out, case).values()]

    expected = [step(case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        calls = [(i % 4, pool.submit(step, cases[i % 4])) for i in range(64)]
        for i, call in calls:
            assert_same(call.result(), expected[i])


def test_python_threads_may_go_back_through_one_graph_at_once():
    case = make_case(counts=LONG, dtype=torch.float32)
    noise = make_case(counts=LONG, dtype=torch.float32, seed=1)
    out = case.run()
    wanted = gradients(out, case, retain_graph=True)
    start = threading.Barrier(4)

    def work(index):
        start.wait()
        for _ in range(10):
            if index == 0:
                gradients(noise.run(), noise)
            else:
                assert_same(gradients(out, case, retain_graph=True), wanted)

    with ThreadPoolExecutor(4) as pool:
        for call in [pool.submit(work, i) for i in range(4)]:
            call.result()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_gets_the_same(num_threads):
    case = make_case(counts=LONG, dtype=torch.float32)
    num_threads(2)

    def step():
        # Our threads only: those that torch itself would start in a child never answer.
        out = case.run()
        rows = [getattr(out, name) for name in RESULTS]
        directions = [torch.ones_like(x) for x in rows]
        return [*out, *torch.autograd.grad(rows, list(case.given.values()), directions)]

    expected = step()  # its threads exist before the fork
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork
        child = os.fork()
    if child == 0:
        try:
            same = all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))
            os._exit(0 if same else 1)
        finally:  # whatever happened, the child must not go on with the tests
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
