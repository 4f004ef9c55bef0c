"""The loop over segments on several threads, called from several, and after a fork."""

import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from segment_loop_oracle import (
    CROWD,
    assert_close,
    assert_same,
    gradients,
    gradients_of,
    keeps,
    make_case,
)

from nsm_graph.testing import assert_close_to_norm


@keeps
@pytest.mark.parametrize(("num_states", "channels", "heads"), [(1, 3, 1), (5, 14, 2), (33, 32, 2)])
def test_any_number_of_threads_gives_the_same_states(
    num_states, channels, heads, keep, num_threads
):
    case = make_case(num_states, channels, heads, counts=CROWD, dtype=torch.float32)
    results = []
    for count in (1, 2, 3, 16, 100):
        num_threads(count)
        outs = [case.run(keep=keep) for _ in range(2)]
        grads = [gradients(out, case) for out in outs]
        assert_same(*outs)
        assert_same(*grads)
        results.append((outs[0], grads[0]))
    for out, found in results[1:]:
        assert_same(out, results[0][0])
        wanted = results[0][1]
        wanted = results[0][1]
        for name in ("states", "routed", "key"):  # what belongs to an example
            assert torch.equal(found[name], wanted[name]), name
        # Sums over examples depend on which are added up first.
        sums = [[g[name].flatten().double() for name in g] for g in (found, wanted)]
        assert_close_to_norm(*(torch.cat(parts) for parts in sums), 1e-6)
        assert_close(found, wanted, 1e-5)


def test_another_number_of_threads_in_backward(num_threads):
    case = make_case(counts=CROWD)
    wanted = gradients(case.run(), case)
    for forward, backward in ((1, 3), (3, 1)):
        num_threads(forward)
        out = case.run()
        num_threads(backward)
        assert_close(gradients(out, case), wanted, 1e-10)


def test_many_python_threads_may_call_at_once(num_threads):
    cases = [make_case(counts=CROWD, seed=seed, dtype=torch.float32) for seed in range(4)]
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
    case = make_case(counts=CROWD, dtype=torch.float32)
    given, noise = list(case.given.values()), make_case(counts=CROWD, dtype=torch.float32, seed=1)
    out = case.run()
    wanted = gradients_of(out, *given, retain_graph=True)
    wrong, start = [], threading.Barrier(4)

    def work(index):
        start.wait()
        for _ in range(10):
            if index == 0:  # takes what a backward gives back
                gradients(noise.run(), noise)
                continue
            found = gradients_of(out, *given, retain_graph=True)
            wrong.extend(a for a, b in zip(found, wanted, strict=True) if not torch.equal(a, b))

    with ThreadPoolExecutor(4) as pool:
        for call in [pool.submit(work, i) for i in range(4)]:
            call.result()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_gets_the_same(num_threads):
    case = make_case(counts=CROWD, dtype=torch.float32)
    num_threads(2)

    def step():
        # Our threads only: those that torch itself would start in a child never answer.
        out = case.run()
        directions = [torch.ones_like(x) for x in out]
        return [*out, *torch.autograd.grad(out, list(case.given.values()), directions)]

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
