"""One loop, several ways to keep its history: all compute the same numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_machines import COUNTS, machine_options, make_machine, run


def gradients(machine, x, counts):
    x = x.clone().requires_grad_()
    machine.zero_grad()
    out = run(machine, x, counts).out
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out, {"x": x.grad} | {
        n: p.grad.clone() for n, p in machine.named_parameters() if p.grad is not None
    }


@given(
    counts=COUNTS,
    options=machine_options(),
    chunk=st.sampled_from([1, 2, 100, "sqrt"]),
    seed=st.integers(0, 999),
)
def test_checkpointed_equals_plain(counts, options, chunk, seed):
    x = torch.randn(sum(counts), 3, dtype=torch.double)
    results = []
    for checkpoint_segments in (None, chunk):
        machine = make_machine(
            seed, torch.double, checkpoint_segments=checkpoint_segments, **options
        )
        results.append(gradients(machine, x, counts))
    (plain, expected), (checkpointed, actual) = results
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-12)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-10, atol=1e-12)


def saved_bytes(machine, x):
    """Bytes that autograd keeps between forward and backward, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = machine(x)
    return sum(storages.values()), out


def test_checkpointing_keeps_less():
    # In float64, where the loop goes step by step.
    x = torch.randn(64, 3, dtype=torch.float64)
    plain, _ = saved_bytes(make_machine(segment_length=1, num_states=16).double(), x)
    options = {"segment_length": 1, "num_states": 16, "checkpoint_segments": "sqrt"}
    checkpointed, _ = saved_bytes(make_machine(**options).double(), x)
    assert checkpointed < 0.5 * plain


def test_dropout_is_the_same_in_the_recomputation():
    x, grads = torch.randn(12, 3), []
    for chunk in (None, 2):
        machine = make_machine(dropout=0.5, checkpoint_segments=chunk).train()
        torch.manual_seed(7)
        grads.append(gradients(machine, x, [12])[1])
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("checkpoint_segments", [None, 1, 3])
def test_bptt_segments_cuts_the_recurrence_and_nothing_else(cell, checkpoint_segments):
    options = {"segment_length": 2, "cell": cell, "checkpoint_segments": checkpoint_segments}
    x = torch.randn(12, 3)
    whole, full = gradients(make_machine(**options), x, [12])
    cut, truncated = gradients(make_machine(bptt_segments=2, **options), x, [12])
    torch.testing.assert_close(cut, whole)  # the whole in one kernel, the cut step by step
    assert (full["x"].abs().sum(1) > 0).all()
    # Six segments, cut before the third and the fifth: the last four tokens remain.
    assert (truncated["x"][:8] == 0).all()
    torch.testing.assert_close(truncated["x"][8:], full["x"][8:])
    assert "manager.bank" not in truncated or (truncated["manager.bank"] == 0).all()


def test_what_was_hoisted_keeps_its_gradient_across_the_cut():
    options = {"segment_length": 2, "bptt_segments": 1, "head": "token"}
    machine = make_machine(**options)
    x = torch.randn(6, 3, requires_grad=True)
    out = machine(x)
    # The outputs of each segment depend on its own tokens, and on no earlier ones any more.
    for first in (0, 2, 4):
        (grad,) = torch.autograd.grad(out[first].sum(), x, retain_graph=True)
        reached = grad.abs().sum(1) > 0
        assert reached.tolist() == [first <= i < first + 2 for i in range(6)]


def test_the_cut_counts_from_the_start_of_the_call():
    x = torch.randn(6, 3, requires_grad=True)
    machine = make_machine(segment_length=2, bptt_segments=3)
    (grad,) = torch.autograd.grad(machine(x).sum(), x)
    assert (grad.abs().sum(1) > 0).all()


def test_no_grad_takes_no_checkpoints():
    machine = make_machine(checkpoint_segments=1)
    with torch.no_grad():
        out = machine(torch.randn(6, 3))
    assert not out.requires_grad
