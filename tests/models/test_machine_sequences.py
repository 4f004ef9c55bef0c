"""The machine on sequences: equal to its equations, whatever the batch and the options."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from machine_oracle import Options, read_example, weights_of
from small_machines import COUNTS, batch_of, machine_options, make_machine, run

from nsm_graph import MachineState, NeuralStateMachine, topology
from nsm_graph.testing import assert_close_to_norm


def oracle_of(options, num_slots=3, slots=None):
    """The same options for the oracle."""
    has_communication = options["communication"] is not None
    return Options(num_slots, slots=slots, **(options | {"communication": has_communication}))


def assert_equal_gradients(machine, ours, theirs, x):
    probe = torch.randn_like(ours)
    leaves = [x, *(p for p in machine.parameters() if p.requires_grad)]
    actual = torch.autograd.grad((ours * probe).sum(), leaves, materialize_grads=True)
    expected = torch.autograd.grad((theirs * probe).sum(), leaves, materialize_grads=True)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@given(counts=COUNTS, options=machine_options(), separate=st.booleans(), seed=st.integers(0, 999))
def test_equals_its_equations_and_their_gradients(counts, options, separate, seed):
    separate &= options["mix"] != "routing"
    machine = make_machine(seed, torch.double, separate_values=separate, **options)
    x = torch.randn(sum(counts), 3, dtype=torch.double, requires_grad=True)
    result = run(machine, x, counts)
    oracle, w = oracle_of(options), weights_of(machine)
    examples = [read_example(w, oracle, part) for part in x.split(counts)]
    expected = torch.cat([out for out, _, _ in examples])
    torch.testing.assert_close(result.out, expected, rtol=0, atol=1e-10)
    states = torch.cat([s for _, s, _ in examples])
    torch.testing.assert_close(result.state.states, states, rtol=0, atol=1e-10)
    if options["cell"] == "lstm":
        cells = torch.cat([c for _, _, c in examples])
        torch.testing.assert_close(result.state.cell, cells, rtol=0, atol=1e-10)
    assert result.state.num_tokens.tolist() == counts
    both = [torch.cat([a.flatten(), s.flatten()]) for a, s in ((result.out, result.state.states),)]
    assert_equal_gradients(machine, both[0], torch.cat([expected.flatten(), states.flatten()]), x)


@given(counts=COUNTS, options=machine_options(), seed=st.integers(0, 999))
def test_an_example_does_not_see_its_batch(counts, options, seed):
    machine = make_machine(seed, **options)
    parts = torch.randn(sum(counts), 3).split(counts)
    whole = run(machine, torch.cat(parts), counts)
    by_token = options["head"] != "example"
    outs = whole.out.split(counts) if by_token else whole.out.split(1)
    states = whole.state.states.split(3)
    for b, part in enumerate(parts):
        alone = run(machine, part, [len(part)])
        assert_close_to_norm(outs[b], alone.out, 1e-5, "out")
        assert_close_to_norm(states[b], alone.state.states, 1e-5, "states")
    order = torch.randperm(len(counts)).tolist()
    shuffled = run(machine, torch.cat([parts[b] for b in order]), [counts[b] for b in order])
    for place, b in enumerate(order):
        row = shuffled.state.states[3 * place : 3 * place + 3]
        assert_close_to_norm(row, states[b], 1e-5, "states in another order")


@given(counts=COUNTS, options=machine_options(("example",)), seed=st.integers(0, 999))
def test_permuting_states_with_their_slots_changes_no_prediction(counts, options, seed):
    machine = make_machine(seed, **options)
    twin, order = copy.deepcopy(machine), torch.randperm(3)
    with torch.no_grad():
        twin.manager.bank.copy_(machine.manager.bank[order])
        twin.manager.importance.copy_(machine.manager.importance[order])
        if machine.cell.router is not None:
            for old, new in zip(
                machine.cell.router.lin_logits.parameters(),
                twin.cell.router.lin_logits.parameters(),
                strict=True,
            ):
                new.copy_(old.unflatten(0, (3, 2))[order].flatten(0, 1))
        if options["pool"] == "flatten":
            columns = machine.head.lin_out.weight.unflatten(1, (3, 4))[:, order]
            twin.head.lin_out.weight.copy_(columns.flatten(1))
    x = torch.randn(sum(counts), 3)
    ours, theirs = run(machine, x, counts), run(twin, x, counts)
    assert_close_to_norm(theirs.out, ours.out, 1e-5)
    permuted = ours.state.states.view(len(counts), 3, 4)[:, order].flatten(0, 1)
    assert_close_to_norm(theirs.state.states, permuted, 1e-5)


@given(options=machine_options(("example",)), seed=st.integers(0, 999))
def test_order_inside_a_segment_matters_only_with_positions(options, seed):
    options |= {"segment_length": 5}
    x = torch.randn(10, 3)
    order = torch.cat([torch.randperm(5), torch.arange(5, 10)])
    if options["position"] is None:
        machine = make_machine(seed, **options)
        assert_close_to_norm(machine(x[order]), machine(x), 1e-5)
    options |= {"position": None}
    machine = make_machine(seed, **options)
    assert_close_to_norm(machine(x[order]), machine(x), 1e-5)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "relative"])
def test_positions_tell_tokens_of_a_segment_apart(position):
    machine = make_machine(position=position, segment_length=5)
    x = torch.randn(5, 3)
    assert (machine(x.flip(0)) - machine(x)).abs().max() > 1e-4


def test_order_of_segments_always_matters():
    machine = make_machine(position=None, segment_length=2)
    x = torch.randn(4, 3)
    assert (machine(x[[2, 3, 0, 1]]) - machine(x)).abs().max() > 1e-4


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_an_example_without_tokens_keeps_its_states_bit_for_bit(cell):
    machine = make_machine(cell=cell)
    result = run(machine, torch.randn(5, 3), [0, 5, 0])
    for b in (0, 2):
        assert torch.equal(result.state.states[3 * b : 3 * b + 3], machine.manager.bank)
    carried = run(machine, torch.randn(4, 3), [2, 0, 2], state=result.state)
    assert torch.equal(carried.state.states[3:6], result.state.states[3:6])
    if cell == "lstm":
        assert torch.equal(carried.state.cell[3:6], result.state.cell[3:6])
    nothing = machine.run(torch.zeros(0, 3), batch_of([0, 0]), batch_size=2)
    assert torch.equal(nothing.state.states, machine.manager.bank.repeat(2, 1))
    assert nothing.out.shape == (2, 2)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_state_without_in_edges_keeps_its_value_bit_for_bit(cell):
    machine = make_machine(cell=cell, top_k=1, communication=None, segment_length=1)
    states = machine.run(torch.randn(1, 3)).state.states
    is_same = (states == machine.manager.bank).all(1)
    assert is_same.sum() == 2


@given(counts=COUNTS, seed=st.integers(0, 99))
def test_a_pruned_bank_equals_the_equations_on_its_active_slots(counts, seed):
    options = {"pool": "flatten", "top_k": 2, "communication": topology.complete()}
    machine = make_machine(seed, torch.double, num_states=4, max_states=5, **options)
    machine.manager.importance_ema.copy_(torch.tensor([0.4, 0.1, 0.3, 0.2, 0.0]))
    machine.manager.prune(lowest=1)
    x = torch.randn(sum(counts), 3, dtype=torch.double)
    oracle = Options(5, slots=(0, 2, 3), pool="flatten", top_k=2, position="learned")
    w = weights_of(machine)
    expected = [read_example(w, oracle, part)[0] for part in x.split(counts)]
    torch.testing.assert_close(run(machine, x, counts).out, torch.cat(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "rule", [topology.ring(), topology.knn(1), topology.star() | topology.self_loops(), None]
)
def test_custom_topologies_run_and_see_only_their_example(rule):
    machine = make_machine(communication=rule, num_states=4)
    x = torch.randn(9, 3)
    whole = run(machine, x, [5, 4])
    for b, part in enumerate(x.split([5, 4])):
        assert_close_to_norm(whole.out[b : b + 1], machine(part), 1e-5)
    complete = make_machine(num_states=4)
    complete.load_state_dict(machine.state_dict(), strict=False)
    assert (complete(x) - machine(x)).abs().max() > 1e-5


def test_gradcheck_of_a_small_machine():
    machine = make_machine(dtype=torch.double, top_k=2, checkpoint_segments=1)
    x = torch.randn(5, 3, dtype=torch.double, requires_grad=True)
    leaves = [x, *machine.parameters()]
    assert torch.autograd.gradcheck(lambda *_: run(machine, x, [4, 1]).out, leaves)


@pytest.mark.parametrize("head", ["example", "token"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("mix", ["sum", "bias", "attention", "routing"])
@pytest.mark.parametrize("position", ["learned", "relative", "rotary"])
def test_every_parameter_gets_a_gradient(head, cell, mix, position):
    if position in ("relative", "rotary") and mix == "routing":
        pytest.skip("acts on attention, which this mix has not")
    machine = make_machine(head=head, cell=cell, mix=mix, position=position).train()
    run(machine, torch.randn(11, 3), [8, 3]).out.square().sum().backward()
    silent = {
        name
        for name, p in machine.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    }
    assert silent == set()


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("head", ["example", "token"])
def test_copies_give_the_same_result(how, head):
    machine = make_machine(head=head, max_states=5)
    machine.manager.prune(lowest=1)
    x = torch.randn(7, 3)
    if how == "state_dict":
        twin = make_machine(seed=1, head=head, max_states=5)
        twin.load_state_dict(machine.state_dict())
    else:
        twin = copy.deepcopy(machine) if how == "deepcopy" else pickle.loads(pickle.dumps(machine))
    assert torch.equal(twin(x), machine(x))
    # An edit of the copy reaches all of the copy and nothing of the original.
    before = machine(x)
    twin.manager.allocate(2)
    assert torch.equal(machine(x), before)
    assert twin.cell.router is twin.manager._dependents[0].router
    assert twin(x).shape == before.shape


def test_lazy_input_size():
    machine = make_machine(in_channels=-1)
    assert machine(torch.randn(4, 6)).shape == (1, 2)
    with pytest.raises((ValueError, RuntimeError)):
        machine(torch.randn(4, 5))


def test_reset_parameters_starts_over():
    machine = make_machine(num_states=2, max_states=4)
    machine.manager.allocate(1)
    before = {name: p.clone() for name, p in machine.named_parameters()}
    machine.reset_parameters()
    assert machine.manager.num_active == 2
    kept = [n for n, p in machine.named_parameters() if p.numel() > 3 and torch.equal(p, before[n])]
    assert kept == []


def test_repr_names_its_parts():
    text = str(make_machine())
    for part in ("StateManager(4, max_states=3", "HybridAttention((4, 4), heads=2)", "StatePool"):
        assert part in text


def test_record_tells_what_happened_step_by_step():
    machine = make_machine(segment_length=3, position=None)
    x = torch.randn(11, 3)
    result = run(machine, x, [4, 7], record=True)
    record = result.record
    assert [e.tolist() for e in record.examples] == [[1, 0], [1, 0], [1]]
    assert [t.tolist() for t in record.tokens] == [[4, 5, 6, 0, 1, 2], [7, 8, 9, 3], [10]]
    assert [r.num_edges for r in record.relations] == [18, 12, 3]
    for relation, routing, attention in zip(
        record.relations, record.routing, record.attention, strict=True
    ):
        by_token = torch.zeros(relation.num_src).index_add(0, relation.edge_index[0], routing)
        torch.testing.assert_close(by_token, torch.ones(relation.num_src))
        by_state = torch.zeros(relation.num_dst, 2)
        by_state = by_state.index_add(0, relation.edge_index[1], attention)
        torch.testing.assert_close(by_state, torch.ones(relation.num_dst, 2))
    assert sorted(record.gates[0]) == ["candidate", "reset", "update"]
    assert [s.size(0) for s in record.states] == [6, 6, 3]
    torch.testing.assert_close(record.states[2], result.state.states[3:])
    torch.testing.assert_close(record.states[1][3:], result.state.states[:3])
    assert all(r.is_complete for r in record.topologies)
    assert run(machine, x, [4, 7]).record is None


# Bad input ####################################################################

X = torch.zeros(4, 3)
NAN = X.clone()
NAN[2, 1] = torch.nan
BAD = [
    (lambda m: m([1.0]), "x must be a tensor, but is list"),
    (lambda m: m(X[:, :2]), r"x must have shape \(tokens, 3\), but has \(4, 2\)"),
    (lambda m: m(X[0]), r"x must have shape \(tokens, 3\)"),
    (lambda m: m(X.long()), "x must be floating point, but has dtype torch.int64"),
    (lambda m: m(X.double()), "x has dtype torch.float64, but the machine has torch.float32"),
    (lambda m: m(X.to("meta")), "x is on meta, but the machine is on cpu"),
    (lambda m: m(X, batch_of([4]).to("meta")), "batch is on meta"),
    (lambda m: m(NAN), "x holds NaN or infinity, first in row 2"),
    (lambda m: m(-X / 0), "x holds NaN or infinity, first in row 0"),
    (lambda m: m(X, batch_of([3])), "batch must have one entry per row of x, 4"),
    (lambda m: m(X, torch.zeros(4, 1).long()), "batch must have one entry per row"),
    (lambda m: m(X, torch.tensor([0, 1, 0, 1])), "batch must be sorted, but goes back 1 times"),
    (lambda m: m(X, torch.tensor([-1, 0, 0, 0])), "batch holds the example -1"),
    (lambda m: m(X, torch.zeros(4)), "batch must be an integer vector"),
    (lambda m: m(X, batch_of([2, 2]), batch_size=1), "batch holds the example 1, but there are 1"),
    (lambda m: m(X, batch_of([4]), batch_size=0), "batch_size must be positive, but is 0"),
    (lambda m: m(X, batch_size=2), "2 examples need batch="),
    (lambda m: m(X[:0]), "the batch is empty: x has no rows"),
    (lambda m: m(X[:0], batch_of([0])), "the batch is empty"),
    (lambda m: m(X, edge_index=batch_of([4, 4]).view(2, 4)), "this machine reads sequences"),
    (lambda m: m(X, edge_attr=X), "edge_attr was given, but this machine reads sequences"),
    (lambda m: m(X, pe=X), "pe was given, but this machine reads sequences"),
    (lambda m: m.run(X, segment_length=0), "segment_length must be a positive integer, but is 0"),
    (lambda m: m.run(X, segment_length=2.0), "segment_length must be a positive integer"),
    (lambda m: m.run(X, segment_length=4), "longer than the 3 places this machine has learned"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_refuses_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_machine())


def carried(machine, **changes):
    state = run(machine, torch.zeros(4, 3), [2, 2]).state
    fields = {n: getattr(state, n) for n in ("states", "cell", "num_tokens", "slots")}
    return MachineState(**(fields | changes))


BAD_STATES = [
    (lambda m: m.run(X, state=carried(m)), "batch|2 examples"),
    (lambda m: m.run(X, batch_of([1, 1, 2]), carried(m)), "batch holds the example 2"),
    (lambda m: m.run(X, batch_of([2, 2]), carried(m), batch_size=3), "state carries 2 examples"),
    (lambda m: m.run(X, batch_of([2, 2]), carried(m).to("meta")), "state is on meta"),
    (
        lambda m: m.run(X, batch_of([2, 2]), carried(m, states=torch.zeros(6, 5))),
        r"state must hold states of shape \(6, 4\)",
    ),
    (
        lambda m: m.run(X, batch_of([2, 2]), carried(m, cell=torch.zeros(6, 4))),
        r"must hold no cell, but holds a cell of shape \(6, 4\)",
    ),
    (
        lambda m: m.run(X, batch_of([2, 2]), carried(make_machine(num_states=2))),
        r"carried from slots \[0, 1\], but now \[0, 1, 2\]",
    ),
    (
        lambda m: m.run(X, batch_of([2, 2]), carried(m, states=torch.zeros(6, 4).double())),
        "state has dtype torch.float64",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD_STATES, ids=[m for _, m in BAD_STATES])
def test_refuses_a_state_that_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_machine())


BAD_OPTIONS = [
    ({"in_channels": 0}, "in_channels must be positive or -1"),
    ({"state_channels": 0}, "state_channels must be a positive integer, but is 0"),
    ({"out_channels": 0}, "out_channels must be a positive integer"),
    ({"token_channels": -2}, "token_channels must be a positive integer"),
    ({"num_states": 0}, "num_states|initial_states"),
    ({"max_states": 2}, "expected 1 <= min_states <= initial_states <= max_states"),
    ({"min_states": 4}, "expected 1 <= min_states"),
    ({"heads": 3}, "heads must divide the state channels, but 4 channels and 3 heads"),
    ({"heads": 0}, "heads"),
    ({"segment_length": 0}, "segment_length must be a positive integer, but is 0"),
    ({"segment_length": 2.5}, "segment_length must be a positive integer"),
    ({"bptt_segments": 0}, "bptt_segments must be a positive integer"),
    ({"checkpoint_segments": 0}, "checkpoint_segments must be a positive integer"),
    ({"checkpoint_segments": "log"}, "checkpoint_segments must be a positive integer"),
    ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
    ({"cell": "rnn"}, "cell must be one of 'gru', 'lstm'"),
    ({"mix": "product"}, "mix must be one of 'sum', 'bias', 'attention', 'routing'"),
    ({"pool": "max"}, "mode must be one of 'mean', 'flatten', 'attention'|pool must be"),
    ({"head": "node"}, "head must be one of 'example', 'token', 'next_token'"),
    ({"position": "absolute"}, "position must be one of 'learned', 'sinusoidal'"),
    ({"routing_reduce": "max"}, "routing_reduce must be one of 'sum', 'mean'"),
    ({"top_k": 4}, "top_k must lie in 1..3"),
    ({"top_k": 1, "mix": "attention"}, 'top_k acts in the router, but mix="attention" has none'),
    ({"communication": "complete"}, "communication must be a topology or None"),
    ({"communication": topology.ring}, "communication must be a topology or None"),
    (
        {"scan": torch.nn.Linear(4, 4)},
        "scan must be an nn.SegmentScan.*Linear has no convolve, hoist",
    ),
    ({"num_steps": 2}, "num_steps is for graphs, but segment_length=3"),
    ({"conv": torch.nn.Identity()}, "conv is for graphs"),
    ({"pe_channels": 2}, "pe_channels is for graphs"),
    ({"edge_embeddings": 3, "edge_channels": 2}, "exclude another"),
    ({"edge_channels": 2}, "edge_channels"),
    ({"num_embeddings": 0}, "num_embeddings must give one positive size"),
    ({"num_embeddings": [5, 6]}, "for each of the 3 symbol columns"),
    ({"position": "rotary", "heads": 4}, "rotary positions turn pairs of channels"),
    ({"position": "rotary", "mix": "routing"}, "position"),
    ({"separate_values": True, "mix": "routing"}, "separate_values"),
]


@pytest.mark.parametrize(
    ("options", "message"), BAD_OPTIONS, ids=["+".join(o) for o, _ in BAD_OPTIONS]
)
def test_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_machine(**options)


def test_unknown_options_raise():
    with pytest.raises(TypeError, match="unexpected keyword argument 'segments'"):
        NeuralStateMachine(3, 4, 3, 2, segment_length=3, segments=4)
