"""A stream in pieces equals the whole, and edits in its midst keep what survives."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from machine_oracle import Options, read_example, weights_of
from small_machines import batch_of, machine_options, make_machine, run

from nsm_graph.memory import NodeEdit
from nsm_graph.testing import assert_close_to_norm


@st.composite
def streams(draw, segment_length):
    """Token counts of two streams in each piece: all but the last are whole segments."""
    pieces = draw(
        st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=1, max_size=3)
    )
    pieces = [[segment_length * n for n in counts] for counts in pieces]
    last = draw(st.lists(st.integers(0, 2 * segment_length), min_size=2, max_size=2))
    return [*pieces, last]


@given(options=machine_options(), seed=st.integers(0, 999), data=st.data())
def test_pieces_with_carried_state_equal_the_whole(options, seed, data):
    pieces = data.draw(streams(options["segment_length"]))
    machine = make_machine(seed, **options)
    lengths = [sum(counts[b] for counts in pieces) for b in range(2)]
    if sum(lengths) == 0:
        return
    xs = [torch.randn(n, 3) for n in lengths]
    whole = run(machine, torch.cat(xs), lengths)
    state, read, outs = None, [0, 0], [[], []]
    for counts in pieces:
        part = torch.cat([xs[b][read[b] : read[b] + counts[b]] for b in range(2)])
        result = run(machine, part, counts, state=state)
        state = result.state
        if options["head"] != "example":
            for b, out in enumerate(result.out.split(counts)):
                outs[b].append(out)
        read = [read[b] + counts[b] for b in range(2)]
    assert state.num_tokens.tolist() == whole.state.num_tokens.tolist() == lengths
    assert_close_to_norm(state.states, whole.state.states, 1e-6, "states")
    if state.cell is not None:
        assert_close_to_norm(state.cell, whole.state.cell, 1e-6, "cell")
    if options["head"] == "example":
        assert_close_to_norm(result.out, whole.out, 1e-6, "out")
    else:
        assert_close_to_norm(torch.cat(outs[0] + outs[1]), whole.out, 1e-6, "token outputs")


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "relative"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_gradients_flow_through_the_carried_state(position, cell):
    machine = make_machine(dtype=torch.double, position=position, cell=cell)
    x = torch.randn(9, 3, dtype=torch.double, requires_grad=True)
    first = machine.run(x[:6])
    split = machine.run(x[6:], state=first.state).out
    (whole,) = torch.autograd.grad(machine(x).square().sum(), x)
    (pieces,) = torch.autograd.grad(split.square().sum(), x, retain_graph=True)
    torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=1e-12)
    assert (whole[:6].abs().sum(1) > 0).all()
    detached = machine.run(x[6:], state=first.state.detach()).out
    (cut,) = torch.autograd.grad(detached.square().sum(), x)
    assert (cut[:6] == 0).all()
    torch.testing.assert_close(cut[6:], whole[6:])


def test_the_sinusoidal_index_goes_on_in_the_next_piece():
    machine = make_machine(position="sinusoidal", dtype=torch.double)
    x = torch.randn(8, 3, dtype=torch.double)
    state = machine.run(x[:3]).state
    oracle, w = Options(3, position="sinusoidal"), weights_of(machine)
    _, s, _ = read_example(w, oracle, x[:3])
    out, _, _ = read_example(w, oracle, x[3:], s, offset=3)
    torch.testing.assert_close(machine.run(x[3:], state=state).out, out, rtol=0, atol=1e-10)
    wrong, _, _ = read_example(w, oracle, x[3:], s)
    assert (wrong - out).abs().max() > 1e-4


def test_two_hundred_segments_stay_finite_and_bounded():
    for cell in ("gru", "lstm"):
        machine = make_machine(cell=cell, segment_length=4, routing_reduce="mean")
        state = None
        for _ in range(20):
            result = run(machine, 10 * torch.randn(80, 3), [40, 40], state=state)
            state = result.state.detach()
            assert result.out.isfinite().all()
        assert state.num_tokens.tolist() == [800, 800]
        assert state.states.isfinite().all()
        assert state.states.abs().max() < 10


def test_a_tick_without_new_tokens_changes_nothing():
    machine = make_machine()
    state = machine.run(torch.randn(6, 3)).state
    idle = machine.run(torch.zeros(0, 3), state=state)
    assert torch.equal(idle.state.states, state.states)
    assert idle.state.num_tokens.tolist() == [6]


# Edits of the node set ########################################################


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_allocation_mid_stream_keeps_survivors_and_starts_the_rest_from_the_bank(cell):
    machine = make_machine(cell=cell, max_states=5)
    state = run(machine, torch.randn(8, 3), [5, 3]).state
    edit = machine.manager.allocate(2)
    edited = state.edit(edit, machine.manager)
    rows = edited.states.view(2, 5, 4)
    assert torch.equal(rows[:, :3], state.states.view(2, 3, 4))
    for b in range(2):
        assert torch.equal(rows[b, 3:], machine.manager.bank[3:])
    if cell == "lstm":
        assert torch.equal(edited.cell.view(2, 5, 4)[:, :3], state.cell.view(2, 3, 4))
        assert (edited.cell.view(2, 5, 4)[:, 3:] == 0).all()
    result = run(machine, torch.randn(4, 3), [2, 2], state=edited)
    assert result.state.states.shape == (10, 4)
    assert result.state.num_tokens.tolist() == [7, 5]


def test_after_an_edit_the_stream_goes_on_as_the_equations_say():
    machine = make_machine(dtype=torch.double, max_states=4, position=None, cell="lstm")
    x, w = torch.randn(9, 3, dtype=torch.double), weights_of(machine)
    state = machine.run(x[:6]).state
    _, s, c = read_example(w, Options(4, slots=(0, 1, 2), cell="lstm"), x[:6])
    machine.manager.importance_ema.copy_(torch.tensor([0.5, 0.1, 0.5, 0.0]))
    state = state.edit(machine.manager.prune(lowest=1), machine.manager)
    s, c = s[[0, 2]], c[[0, 2]]
    edit = machine.manager.allocate(1)  # takes the lowest free slot, 1
    assert edit.slots_after.tolist() == [0, 1, 2]
    state = state.edit(edit, machine.manager)
    bank = machine.manager.bank
    s, c = torch.stack([s[0], bank[1], s[1]]), torch.stack([c[0], torch.zeros_like(c[0]), c[1]])
    out, _, _ = read_example(w, Options(4, slots=(0, 1, 2), cell="lstm"), x[6:], s, c)
    torch.testing.assert_close(machine.run(x[6:], state=state).out, out, rtol=0, atol=1e-10)


def test_gradients_flow_through_an_edit():
    machine = make_machine(max_states=4)
    x = torch.randn(6, 3, requires_grad=True)
    state = machine.run(x[:3]).state
    state = state.edit(machine.manager.allocate(1), machine.manager)
    machine.run(x[3:], state=state).out.square().sum().backward()
    assert (x.grad[:3].abs().sum(1) > 0).all()
    assert machine.manager.bank.grad[3].abs().sum() > 0


def test_a_merge_mid_stream_averages():
    machine = make_machine()
    state = run(machine, torch.randn(6, 3), [3, 3]).state
    edit = NodeEdit(torch.tensor([[0, 1], [2, -1]]), torch.arange(3), torch.tensor([0, 2]))
    machine.manager.edit(edit)
    edited = state.edit(edit, machine.manager).states.view(2, 2, 4)
    before = state.states.view(2, 3, 4)
    torch.testing.assert_close(edited[:, 0], before[:, :2].mean(1))
    assert torch.equal(edited[:, 1], before[:, 2])


def test_a_state_from_before_an_edit_is_refused():
    machine = make_machine(max_states=4)
    x = torch.randn(3, 3)
    state = machine.run(x).state
    edit = machine.manager.allocate(1)
    with pytest.raises(ValueError, match=r"carried from slots \[0, 1, 2\], but now \[0, 1, 2, 3\]"):
        machine.run(x, state=state)
    later = machine.manager.prune(lowest=1)
    with pytest.raises(ValueError, match="apply edits in the order they were made"):
        state.edit(later, machine.manager)
    state = state.edit(edit, machine.manager).edit(later, machine.manager)
    assert machine.run(x, state=state).out.shape == (1, 2)


def test_eval_leaves_the_memory_and_training_feeds_the_moving_average():
    machine = make_machine()
    before = {k: v.clone() for k, v in machine.state_dict().items()}
    machine.run(torch.randn(6, 3))
    assert all(torch.equal(v, before[k]) for k, v in machine.state_dict().items())
    machine.train().run(torch.randn(6, 3))
    changed = {k for k, v in machine.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"manager.importance_ema"}


def test_examples_without_tokens_say_nothing_about_importance():
    x = torch.randn(4, 3)
    for segment_length in (3, None):
        machines = [make_machine(segment_length=segment_length).train() for _ in range(2)]
        run(machines[0], x, [4])
        run(machines[1], x, [0, 4, 0])
        torch.testing.assert_close(
            machines[1].manager.importance_ema, machines[0].manager.importance_ema
        )


def test_segment_length_can_change_from_call_to_call():
    machine = make_machine(dtype=torch.double, position="sinusoidal")
    x = torch.randn(7, 3, dtype=torch.double)
    result = machine.run(x, segment_length=5)
    oracle = Options(3, segment_length=5, position="sinusoidal")
    expected, _, _ = read_example(weights_of(machine), oracle, x)
    torch.testing.assert_close(result.out, expected, rtol=0, atol=1e-10)


def test_state_moves_between_devices_and_keeps_everything():
    machine = make_machine(cell="lstm")
    state = machine.run(torch.randn(4, 3)).state
    meta = state.to("meta")
    assert {t.device.type for t in (meta.states, meta.cell, meta.num_tokens, meta.slots)} == {
        "meta"
    }
    same = state.to("cpu")
    assert torch.equal(same.states, state.states)
    assert same.num_examples == 1


def test_batch_of_is_sorted():
    assert batch_of([2, 0, 1]).tolist() == [0, 0, 2]


def test_a_cell_of_another_batch_is_refused():
    machine = make_machine(cell="lstm")
    state = run(machine, torch.randn(5, 3), [3, 2]).state
    twice = replace(state, cell=torch.cat([state.cell, state.cell]))
    with pytest.raises(ValueError, match="must hold a cell of shape"):
        run(machine, torch.randn(5, 3), [3, 2], state=twice)
