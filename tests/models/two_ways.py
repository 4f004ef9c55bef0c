"""Machines read in one kernel and step by step, and why one or the other."""

import contextlib
import copy
from dataclasses import replace
from unittest import mock

import torch
from small_machines import run

from nsm_graph.models import fused, sequence
from nsm_graph.testing import assert_close_to_norm


@contextlib.contextmanager
def step_by_step():
    """Every loop goes step by step."""
    with (
        mock.patch.object(sequence, "why_not_fused", return_value="asked for"),
        mock.patch.object(sequence, "say_why_not"),
    ):
        yield


@contextlib.contextmanager
def in_one_kernel():
    """Fails unless every loop ran in one kernel."""
    with (
        mock.patch.object(sequence, "read_fused", wraps=fused.read_fused) as kernel,
        mock.patch.object(sequence, "read_segments") as loop,
    ):
        yield
    assert kernel.called and not loop.called


@contextlib.contextmanager
def reasons():
    """What :func:`why_not_fused` answers; only where it is a reason may the loop be used."""
    found = []

    def ask(*args, **options):
        found.append(fused.why_not_fused(*args, **options))
        return found[-1]

    with (
        mock.patch.object(sequence, "why_not_fused", ask),
        mock.patch.object(sequence, "read_fused", wraps=fused.read_fused) as kernel,
        mock.patch.object(sequence, "read_segments", wraps=sequence.read_segments) as loop,
    ):
        yield found
    assert kernel.call_count == found.count(None)
    assert loop.call_count == len(found) - found.count(None)


def both_ways(function):
    """Results of a function whose loops run in one kernel, and of the same step by step."""
    with in_one_kernel():
        actual = function()
    with step_by_step():
        return actual, function()


def results(machine, x, counts, **options):
    """Everything that a call and its backward give, by name."""
    x = x.clone().requires_grad_()
    machine.zero_grad()
    result = run(machine, x, counts, **options)
    found = {"out": result.out, "states": result.state.states}
    if result.state.cell is not None:
        found["cell"] = result.state.cell
    if result.tokens is not None:
        found["tokens"] = result.tokens
    # The state that is carried on has gradients, too.
    direction = torch.cos(torch.arange(result.out.numel())).view_as(result.out)
    loss = (result.out * direction).sum() + 0.1 * result.state.states.square().sum()
    if result.state.cell is not None:
        loss = loss + 0.1 * result.state.cell.square().sum()
    loss.backward()
    grads = {name: p.grad for name, p in machine.named_parameters() if p.grad is not None}
    return {name: x.detach() for name, x in found.items()}, {"x": x.grad} | grads


def assert_same(actual, expected):
    for name, wanted in expected[0].items():
        assert_close_to_norm(actual[0][name], wanted, 1e-5, name)
    assert actual[0].keys() == expected[0].keys() and actual[1].keys() == expected[1].keys()
    # What cancels to nothing, as the slope of a score may, is held to all the others.
    whole = torch.cat([x.flatten() for x in expected[1].values()]).norm()
    for name, wanted in expected[1].items():
        assert (actual[1][name] - wanted).norm() <= 1e-5 * max(wanted.norm(), 1e-2 * whole), name


def assert_is_right(machine, counts=(5, 0, 7, 2), state=None, **options):
    """One kernel in float32 gives what single steps in float64 give."""
    x = torch.randn(sum(counts), 3)
    exact, exact_state = copy.deepcopy(machine).double(), state
    if state is not None:
        carried = {"states": state.states, "cell": state.cell, "tail": state.tail}
        carried = {name: None if x is None else x.double() for name, x in carried.items()}
        exact_state = replace(state, **carried)
    with in_one_kernel():
        actual = results(machine, x, list(counts), state=state, **options)
    with step_by_step():
        wanted = results(exact, x.double(), list(counts), state=exact_state, **options)
    assert_same(actual, wanted)


def assert_is_right_after_edits(machine):
    """The same of a machine of three states and five slots after it grew, and after it shrank."""
    assert_is_right(machine)
    state = run(machine, torch.randn(8, 3), [5, 3]).state.detach()
    manager = machine.manager
    for change, num_states in (
        (lambda: manager.allocate(2), 5),
        (lambda: manager.prune(lowest=3), 2),
    ):
        state = state.edit(change(), manager).detach()
        assert state.states.size(0) == 2 * num_states
        assert_is_right(machine)
        assert_is_right(machine, (4, 2), state=state)


def reason_of(machine, counts=(5, 0, 7), **options):
    """Why the machine does not read in one kernel; None where it does."""
    x = torch.randn(sum(counts), 3, dtype=machine.manager.bank.dtype)
    with reasons() as found:
        run(machine, x, list(counts), **options)
    (reason,) = found
    return reason
