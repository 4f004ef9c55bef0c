"""A node set for every example: equations, gradients, ragged batches, streams, what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import node_set_oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from machine_oracle import weights_of
from small_machines import COUNTS, batch_of, make_machine, run

from nsm_graph import NeuralStateMachine, topology
from nsm_graph.nn import SegmentScan, StateAllocator
from nsm_graph.testing import assert_close_to_norm

SLOTS, INITIAL, CHANNELS, ADDRESS = 6, 2, 6, 2


def machine_of(seed=0, dtype=torch.float64, *, gate="straight_through", prune=True, **options):
    """A machine whose examples found states and lose some again."""
    torch.manual_seed(seed)
    allocator = StateAllocator(
        CHANNELS, CHANNELS, address_channels=ADDRESS, gate=gate, prune=prune, match_scale=6.0
    )
    options = {"state_channels": CHANNELS, "num_states": INITIAL, "max_states": SLOTS} | options
    options = {"mix": "routing", "position": None} | options
    machine = make_machine(seed, dtype, allocator=allocator, **options)
    if prune:
        with torch.no_grad():
            allocator.lin_keep.weight.normal_(0, 1.5)
            allocator.lin_keep.bias.fill_(0.3)
    return machine


@st.composite
def options_of(draw):
    head = draw(st.sampled_from(["example", "token", "next_token"]))
    return {
        "cell": draw(st.sampled_from(["gru", "lstm"])),
        "mix": draw(st.sampled_from(["sum", "routing"])),
        "position": draw(st.sampled_from(["learned", None])),
        "routing_reduce": draw(st.sampled_from(["sum", "mean"])),
        "communication": draw(st.sampled_from([topology.complete(), None])),
        "head": head,
        "pool": draw(st.sampled_from(["mean", "flatten", "attention"]))
        if head == "example"
        else "mean",
        "segment_length": draw(st.sampled_from([1, 2, 5])),
        "gate": draw(st.sampled_from(["straight_through", "continuous"])),
        "prune": draw(st.booleans()),
        "min_states": draw(st.sampled_from([1, 2])),
    }


def oracle_options(machine, options):
    return SimpleNamespace(
        num_slots=SLOTS, heads=2, talk_heads=1,
        **{key: options[key] for key in (
            "segment_length", "cell", "mix", "position", "head", "pool", "routing_reduce",
            "min_states",
        )},
        communication=options["communication"] is not None,
    )  # fmt: skip


@given(options=options_of(), counts=COUNTS, seed=st.integers(0, 99))
def test_equals_the_equations_and_their_gradients(options, counts, seed):
    machine = machine_of(seed, **options)
    x = torch.randn(sum(counts), 3, dtype=torch.float64)
    result = run(machine, x, counts)

    w, o = weights_of(machine), oracle_options(machine, options)
    outs, examples = [], []
    for part in x.split(counts):
        out, example = node_set_oracle.read_example(
            w, o, machine.cell.allocator, range(INITIAL), part
        )
        outs.append(out)
        examples.append(example)
    assert result.state.num_states.tolist() == [len(e.states) for e in examples]
    assert result.state.slots.tolist() == [m for e in examples for m in e.states]
    expected_states = torch.stack([s for e in examples for s in e.states.values()])
    assert_close_to_norm(result.state.states, expected_states, 1e-10, "states")
    expected = torch.cat(outs)
    assert_close_to_norm(result.out, expected, 1e-10, "out")

    lost = [sum(e.losses) for e in examples]
    presences = [e.presence(m) for e in examples for m in e.states]
    lasting = [e.lasts[m] for e in examples for m in e.states]
    state = result.state
    presence = result.state.log_presence.exp()
    assert_close_to_norm(presence, torch.stack(presences), 1e-10, "presence")
    direction = torch.randn(expected.shape, dtype=torch.float64)
    parameters = [p for p in machine.parameters() if p.requires_grad]
    results = []
    for out, cost in (
        (result.out, 0.2 * state.expected_states.sum() + len(counts) * state.memory_cost(0.1, 5.0)),
        (expected, 0.2 * sum(presences) + 0.1 * sum(lasting) + 0.5 * sum(lost)),
    ):
        loss = (out * direction).sum() + cost
        results.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for (name, _), ours, theirs in zip(machine.named_parameters(), *results, strict=False):
        if ours is None or theirs is None:
            assert ours is None or not ours.any() or len(parameters) != len(w), name
            continue
        assert_close_to_norm(ours, theirs, 1e-8, name)


@given(options=options_of(), counts=COUNTS, seed=st.integers(0, 99))
def test_an_example_does_not_depend_on_its_neighbours(options, counts, seed):
    machine = machine_of(seed, torch.float, **options)
    x = torch.randn(sum(counts), 3)
    together = run(machine, x, counts)
    states = together.state.states.split(together.state.num_states.tolist())
    first = 0
    for b, (part, count) in enumerate(zip(x.split(counts), counts, strict=True)):
        alone = run(machine, part, [count])
        assert alone.state.num_states.tolist() == together.state.num_states[b : b + 1].tolist()
        assert_close_to_norm(states[b], alone.state.states, 1e-5)
        rows = 1 if options["head"] == "example" else count
        if rows:
            assert_close_to_norm(together.out[first : first + rows], alone.out, 1e-5)
        first += rows


@given(options=options_of(), cuts=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_a_stream_in_pieces_is_the_stream(options, cuts):
    machine = machine_of(3, torch.float64, **options)
    length = options["segment_length"]
    x = torch.randn(2, length * sum(cuts), 3, dtype=torch.float64)
    batch = batch_of([x.size(1)] * 2)
    whole = machine.run(x.flatten(0, 1), batch)
    state, outs = None, []
    for piece in x.split([length * n for n in cuts], dim=1):
        result = machine.run(piece.flatten(0, 1), batch_of([piece.size(1)] * 2), state)
        state = result.state
        outs.append(result.out.view(2, -1, result.out.size(-1)))
    assert state.slots.tolist() == whole.state.slots.tolist()
    assert_close_to_norm(state.states, whole.state.states, 1e-12)
    torch.testing.assert_close(state.log_presence, whole.state.log_presence, atol=1e-10, rtol=1e-10)
    out = outs[-1] if options["head"] == "example" else torch.cat(outs, 1)
    assert_close_to_norm(out.flatten(0, 1), whole.out, 1e-12)


@given(seed=st.integers(0, 99), segment_length=st.integers(2, 9))
def test_who_founds_does_not_depend_on_where_segments_end(seed, segment_length):
    # Without pruning, addresses and who came before decide, and both are the same.
    options = {"prune": False, "max_states": 12}
    one = machine_of(seed, segment_length=1, **options)
    many = machine_of(seed, segment_length=segment_length, **options)
    many.load_state_dict(one.state_dict())
    counts = [9, 4, 0]
    x = torch.randn(sum(counts), 3, dtype=torch.float64)
    a, b = run(one, x, counts).state, run(many, x, counts).state
    assert a.slots.tolist() == b.slots.tolist()
    addresses = [state.states[:, :ADDRESS] for state in (a, b)]
    assert torch.equal(*addresses)


def test_equal_tokens_found_one_state_and_new_ones_another():
    machine = machine_of(prune=False, num_states=1, segment_length=4, max_states=SLOTS)
    with torch.no_grad():
        machine.manager.bank.zero_()  # nobody's address
    known, new = torch.randn(2, 3, dtype=torch.float64)
    x = torch.stack([known, known, known, known, known, new, new, known])
    result = machine.run(x, record=True)
    founded = [(event.segment, event.slot) for event in result.record.events]
    allocator = machine.cell.allocator
    with torch.no_grad():
        first, second = allocator.address(machine.embedding(torch.stack([known, new])))
        is_far = bool(allocator.log_scale.exp() * (first @ second) < allocator.novelty - 0.5)
    assert founded == [(0, 1), (1, 2)][: 1 + is_far]
    assert torch.equal(result.state.states[1, :ADDRESS], first)  # bit for bit


def test_a_full_bank_takes_no_more():
    machine = machine_of(prune=False, max_states=3, segment_length=2)
    with torch.no_grad():
        machine.cell.allocator.novelty.fill_(50.0)  # everything is new
    state = run(machine, torch.randn(9, 3, dtype=torch.float64), [7, 2]).state
    assert state.num_states.tolist() == [3, 3]
    assert state.slots.tolist() == [0, 1, 2, 0, 1, 2]


def test_the_best_state_always_stays():
    machine = machine_of(segment_length=2, min_states=1)
    with torch.no_grad():
        machine.cell.allocator.lin_keep.bias.fill_(-50.0)
    state = run(machine, torch.randn(9, 3, dtype=torch.float64), [7, 2]).state
    assert state.num_states.tolist() == [1, 1]
    out = run(machine, torch.randn(2, 3, dtype=torch.float64), [1, 1], state=state).out
    assert out.isfinite().all()


def test_edits_change_the_graph_and_are_events():
    machine = machine_of(seed=1, segment_length=1)
    result = run(machine, torch.randn(12, 3, dtype=torch.float64), [12], record=True)
    record, num_states = result.record, INITIAL
    kinds = [event.kind for event in record.events]
    assert "allocate" in kinds and "prune" in kinds
    for step, relation in enumerate(record.relations):
        events = [event for event in record.events if event.segment == step]
        num_states += sum(event.kind == "allocate" for event in events)
        assert relation.num_dst == num_states == record.slots[step].numel()
        num_states -= sum(event.kind == "prune" for event in events)
    assert result.state.num_states.tolist() == [num_states]
    for event in record.events:
        assert (event.score > 0) == (event.kind == "allocate")
    assert record.events[-1].num_states == result.state.num_states.item()
    assert record.events[0].to_dict()["scope"] == "example"


@pytest.mark.parametrize("checkpoint_segments", [1, 2, "sqrt"])
def test_recomputed_chunks_give_the_same_gradients(checkpoint_segments):
    grads = []
    for chunk in (None, checkpoint_segments):
        machine = machine_of(seed=2, segment_length=1, checkpoint_segments=chunk).train()
        torch.manual_seed(5)  # of the decisions that training draws
        result = run(machine, torch.randn(12, 3, dtype=torch.float64), [8, 4])
        (result.out.sum() + result.state.expected_states.sum()).backward()
        grads.append({n: p.grad for n, p in machine.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_truncated_history_stops_gradients():
    machine = machine_of(seed=2, segment_length=1, bptt_segments=2)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    machine.run(x).out.sum().backward()
    assert not x.grad[:4].any()
    assert x.grad[4:].any()


def test_training_draws_decisions_and_is_repeatable():
    machine = machine_of(seed=2, segment_length=1, dtype=torch.float).train()
    x = torch.randn(200, 3)
    sizes = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        sizes.append(run(machine, x, [20] * 10).state.slots.tolist())
    assert sizes[0] == sizes[1] != sizes[2]


def test_reads_are_lost_by_those_who_ask():
    machine = machine_of(seed=4, segment_length=2, head="next_token")
    x, counts = torch.randn(13, 3, dtype=torch.float64), [8, 5]
    bias = machine.cell.allocator.lin_keep.bias
    (everybody,) = torch.autograd.grad(run(machine, x, counts).state.lost_reads[1], bias)
    parts = [
        torch.autograd.grad(
            run(machine, x, counts, at=torch.tensor([token])).state.lost_reads[1], bias,
            allow_unused=True, materialize_grads=True,
        )[0]
        for token in range(8, 13)
    ]  # fmt: skip
    assert everybody < 0  # the more stay, the less is lost
    assert_close_to_norm(torch.stack(parts).sum(0), everybody, 1e-10)


def test_a_cost_lowers_the_number_of_states():
    machine = machine_of(seed=4, segment_length=1, dtype=torch.float, max_states=6).train()
    optimizer = torch.optim.Adam(machine.parameters(), lr=0.02)
    x = torch.randn(160, 3)
    before = machine.eval().run(x, batch_of([16] * 10)).state.num_states.float().mean()
    machine.train()
    for _ in range(40):
        optimizer.zero_grad()
        machine.run(x, batch_of([16] * 10)).state.expected_states.mean().backward()
        optimizer.step()
    after = machine.eval().run(x, batch_of([16] * 10)).state.num_states.float().mean()
    assert after < before - 0.5


def test_a_budget_holds_the_average():
    machine = machine_of(seed=4, segment_length=1, dtype=torch.float, prune=False)
    machine.cell.allocator.budget = 3.0
    machine.train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        machine.run(torch.randn(320, 3, generator=generator), batch_of([16] * 20))
    machine.eval()
    x = torch.randn(3200, 3, generator=generator)
    bounded = machine.run(x, batch_of([16] * 200)).state.num_states.float().mean()
    machine.cell.allocator.restraint.zero_()
    free = machine.run(x, batch_of([16] * 200)).state.num_states.float().mean()
    assert bounded <= 3.0 < free


def test_signals_of_importance_are_fed_by_slot():
    machine = machine_of(
        seed=1, segment_length=2, dtype=torch.float, watch={"gradient": 10}
    ).train()
    before = machine.manager.importance_ema.clone()
    run(machine, torch.randn(20, 3), [12, 8]).out.sum().backward()
    assert not torch.equal(machine.manager.importance_ema, before)
    assert (machine.manager.signal_ema("gradient") > 0).any()


def test_a_carried_memory_outlives_edits_of_the_bank():
    machine = machine_of(seed=1, segment_length=2)
    state = run(machine, torch.randn(20, 3, dtype=torch.float64), [12, 8]).state
    edit = machine.manager.prune(lowest=1)
    moved = state.edit(edit, machine.manager)
    assert moved is state
    result = run(machine, torch.randn(4, 3, dtype=torch.float64), [2, 2], state=moved)
    assert result.out.isfinite().all()
    fresh = run(machine, torch.randn(0, 3, dtype=torch.float64), [0], record=True)
    assert fresh.state.num_states.tolist() == [INITIAL - 1]


def test_slots_that_examples_use_keep_their_rows_when_they_become_active():
    machine = machine_of(seed=1, segment_length=2, pool="flatten")
    optimizer = torch.optim.AdamW(machine.parameters(), lr=0.01)
    machine.manager.register_optimizer(optimizer)
    x = torch.randn(20, 3, dtype=torch.float64)
    run(machine, x, [12, 8]).out.sum().backward()
    optimizer.step()
    state = run(machine, x, [12, 8]).state
    before = {name: value.clone() for name, value in machine.state_dict().items()}
    moments = {name: value.clone() for name, value in optimizer.state[machine.manager.bank].items()}
    after = run(machine, x, [12, 8], state=state).out
    machine.manager.allocate(1)
    for name, value in machine.state_dict().items():
        assert torch.equal(value, before[name]) or name == "manager.active", name
    for name, value in optimizer.state[machine.manager.bank].items():
        assert torch.equal(value, moments[name])
    assert torch.equal(run(machine, x, [12, 8], state=state).out, after)


@pytest.mark.parametrize("dtype", [torch.float, torch.half])
@pytest.mark.parametrize("scale", [20.0, 200.0, 2000.0])
def test_sharp_matches_found_as_in_double_precision(dtype, scale):
    machine = machine_of(seed=1, segment_length=3, prune=False)
    with torch.no_grad():
        machine.cell.allocator.log_scale.fill_(scale).log_()
        machine.cell.allocator.novelty.fill_(scale / 2)
    x = torch.randn(9, 3, dtype=torch.float64)
    expected = run(machine, x, [5, 4]).state.slots
    assert expected.numel() > 2 * INITIAL
    assert torch.equal(run(machine.to(dtype), x.to(dtype), [5, 4]).state.slots, expected)


@pytest.mark.parametrize("gate", ["straight_through", "continuous"])
def test_long_streams_keep_finite_gradients(gate):
    machine = machine_of(seed=1, dtype=torch.float, segment_length=1, gate=gate)
    with torch.no_grad():
        machine.cell.allocator.lin_keep.weight.zero_()
        machine.cell.allocator.lin_keep.bias.fill_(0.2)
    result = machine.run(torch.randn(900, 3))
    (result.out.sum() + result.state.memory_cost(0.1)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in machine.parameters())
    with torch.no_grad():
        machine.cell.allocator.lin_keep.bias.fill_(-200.0)  # who must stay stays
    assert machine.run(torch.randn(9, 3)).out.isfinite().all()


def test_events_know_the_segment_of_their_stream():
    machine = machine_of(prune=False, segment_length=1)
    with torch.no_grad():
        machine.cell.allocator.novelty.fill_(50.0)  # everything is new
    first = run(machine, torch.randn(2, 3, dtype=torch.float64), [2, 0]).state
    record = run(machine, torch.randn(3, 3, dtype=torch.float64), [1, 2], state=first, record=True)
    events = [(event.example, event.segment) for event in record.record.events]
    assert sorted(events) == [(0, 2), (1, 0), (1, 1)]


def test_an_unreachable_budget_does_not_wind_up():
    machine = machine_of(seed=4, segment_length=1, dtype=torch.float, prune=False)
    allocator = machine.cell.allocator
    allocator.budget = 1.0  # every example starts with two
    for _ in range(2000):
        allocator.restrain(2.0)
    assert allocator.restraint.item() == pytest.approx(2 * allocator.initial_scale)


def test_state_dict_round_trip_and_state_to_device():
    machine, other = machine_of(seed=1), machine_of(seed=2)
    machine.cell.allocator.restraint.fill_(0.25)
    other.load_state_dict(machine.state_dict())
    x = torch.randn(9, 3, dtype=torch.float64)
    assert torch.equal(run(machine, x, [5, 4]).out, run(other, x, [5, 4]).out)
    state = run(machine, x, [5, 4]).state.to("cpu").detach()
    assert not state.states.requires_grad and not state.log_presence.requires_grad
    assert state.num_examples == 2


def test_hetero_data_has_as_many_states_as_there_are():
    from torch_geometric.data import HeteroData

    machine = machine_of(seed=1, segment_length=2)
    data = HeteroData()
    data["token"].x = torch.randn(12, 3, dtype=torch.float64)
    data["token"].batch = batch_of([8, 4])
    out = machine.from_hetero(data)
    num_states = torch.bincount(out["state"].batch).tolist()
    assert out["state"].x.size(0) == sum(num_states) == out["state"].slot.numel()
    source, target = out["token", "routes", "state"].edge_index
    assert torch.equal(data["token"].batch[source], out["state"].batch[target])


def refuse(match, num_states=1, **options):
    with pytest.raises(ValueError, match=match):
        NeuralStateMachine(3, 8, num_states, 2, **({"segment_length": 2} | options))


def test_refuses_what_does_not_fit():
    refuse(
        "token_channels=4, but the machine has 8",
        allocator=StateAllocator(4, 8, address_channels=2),
    )
    refuse("must be an nn.StateAllocator", allocator=torch.nn.Linear(2, 2))
    allocator = StateAllocator(8, 8, address_channels=2)
    refuse("nodes of a graph have none", allocator=allocator, segment_length=None)
    refuse("both own the first channels", allocator=allocator, scan=SegmentScan(8, 8, 1))
    refuse('mix="attention" has none', allocator=allocator, mix="attention")
    refuse("budget=2 states cannot be met", num_states=4, allocator=StateAllocator(
        8, 8, address_channels=2, budget=2))  # fmt: skip
    with pytest.raises(ValueError, match="built with prune=False"):
        StateAllocator(8, 8, address_channels=2, prune=False).prune = True
    refuse("these are not the same ones", allocator=allocator, watch={"update": 10})
    for options, match in (
        ({"address_channels": 8}, r"1\.\.7, but is 8"),
        ({"gate": "hard"}, "gate must be one of"),
        ({"match_scale": 0.0}, "match_scale must be a finite number above 0"),
        ({"match_scale": float("nan")}, "match_scale must be a finite number above 0"),
        ({"novelty": "x"}, "novelty must be a finite number"),
        ({"budget": 0.5}, "budget must be a finite number of at least 1"),
        ({"budget": True}, "budget must be a finite number of at least 1"),
        ({"prune": "no"}, "prune must be one of True, False"),
        ({"address_channels": 2.5}, "address_channels must be an integer"),
        ({"token_channels": 0}, "token_channels"),
    ):
        arguments = {"token_channels": 8, "state_channels": 8, "address_channels": 4} | options
        with pytest.raises(ValueError, match=match):
            StateAllocator(**arguments)


def test_refuses_states_of_other_machines():
    machine, plain = machine_of(), make_machine(dtype=torch.float64, state_channels=CHANNELS)
    x = torch.randn(4, 3, dtype=torch.float64)
    state = machine.run(x).state
    with pytest.raises(ValueError, match="this machine has no allocator"):
        plain.run(x, state=state)
    with pytest.raises(ValueError, match="this machine has an allocator"):
        machine.run(x, state=plain.run(x).state)
    with pytest.raises(ValueError, match="one entry of log_lasting"):
        machine.run(x, state=replace(state, log_lasting=state.log_lasting[:1]))
    with pytest.raises(ValueError, match="one entry of log_presence"):
        machine.run(x, state=replace(state, log_presence=None))
    with pytest.raises(ValueError, match="must ascend"):
        machine.run(x, state=replace(state, slots=state.slots.flip(0)))
