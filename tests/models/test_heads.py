"""Heads: what a prediction may see, and what reaches it."""

import pytest
import torch
from small_machines import make_machine, run


def sees(machine, x, i):
    """Which tokens the prediction of token i depends on."""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(machine(x)[i].square().sum(), x)
    return (grad.abs().sum(1) > 0).tolist()


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("mix", ["sum", "bias", "attention", "routing"])
def test_a_causal_head_sees_earlier_segments_and_its_own_token_only(cell, mix):
    machine = make_machine(head="next_token", cell=cell, mix=mix)
    x = torch.randn(8, 3)
    for i in range(8):
        segment = i // 3
        assert sees(machine, x, i) == [t < 3 * segment or t == i for t in range(8)]


def test_with_one_token_a_segment_a_causal_head_sees_all_that_came_before():
    machine = make_machine(head="next_token", segment_length=1)
    x = torch.randn(5, 3)
    for i in range(5):
        assert sees(machine, x, i) == [t <= i for t in range(5)]


def test_a_token_head_sees_its_whole_segment_and_no_later_one():
    machine = make_machine(head="token")
    x = torch.randn(8, 3)
    for i in range(8):
        end = 3 * (i // 3) + 3
        assert sees(machine, x, i) == [t < end for t in range(8)]


@pytest.mark.parametrize("head", ["token", "next_token"])
def test_token_outputs_stand_in_the_order_of_the_input(head):
    machine = make_machine(head=head)
    parts = torch.randn(12, 3).split([2, 7, 3])
    whole = run(machine, torch.cat(parts), [2, 7, 3])
    assert whole.out.shape == (12, 2)
    assert whole.tokens.shape == (12, 4)
    for part, out in zip(parts, whole.out.split([2, 7, 3]), strict=True):
        torch.testing.assert_close(out, machine(part))


def test_an_example_head_gives_one_row_an_example_and_no_tokens():
    for pool in ("mean", "flatten", "attention"):
        result = run(make_machine(pool=pool), torch.randn(6, 3), [2, 0, 4])
        assert result.out.shape == (3, 2)
        assert result.tokens is None


def test_flatten_keeps_its_width_when_states_go():
    machine = make_machine(pool="flatten", max_states=5)
    width = machine.head.lin_out.in_channels
    machine.manager.prune(lowest=1)
    assert machine.head.lin_out.in_channels == width == 20
    assert machine(torch.randn(4, 3)).shape == (1, 2)


def test_allocation_gives_a_flattening_head_fresh_columns():
    machine = make_machine(pool="flatten", max_states=5)
    weight = machine.head.lin_out.weight
    before = weight.detach().clone().unflatten(1, (5, 4))
    machine.manager.allocate(1)
    after = weight.detach().unflatten(1, (5, 4))
    assert torch.equal(after[:, [0, 1, 2, 4]], before[:, [0, 1, 2, 4]])
    assert not torch.equal(after[:, 3], before[:, 3])


def test_dropout_acts_in_training_only():
    machine, x = make_machine(dropout=0.5), torch.randn(4, 3)
    assert torch.equal(machine(x), machine(x))
    machine.train()
    assert not torch.equal(machine(x), machine(x))
