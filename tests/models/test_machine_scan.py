"""A machine with an ordered scan: streams, edits, snapping, drivers, and what the gates may see."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from machine_oracle import (
    Options,
    affine,
    attend,
    communicate,
    norm,
    propagate,
    routing,
    weights_of,
)
from small_machines import batch_of, make_machine, run
from torch._dynamo.testing import CompileCounterWithBackend

from nsm_graph import NeuralStateMachine, Relation, topology
from nsm_graph.models.baselines import RecurrentBaseline, TransformerBaseline
from nsm_graph.models.delta_net import DeltaNetBaseline
from nsm_graph.nn import SegmentScan
from nsm_graph.testing import assert_batch_invariant, assert_close_to_norm

#: Scans over 4 heads of 2 channels.
SCANS = {
    "transition": {"gated_heads": 1},
    "memory": {"memory_heads": 3},
    "both": {"memory_heads": 1, "gated_heads": 2, "decay": True, "write": True},
    "layers": {"memory_heads": 1, "layers": 2, "read": "routed"},
    "routed": {"memory_heads": 1, "routed": True},
    "all written": {"gated_heads": None, "write": True},
}
scans = pytest.mark.parametrize("scan", SCANS.values(), ids=SCANS)
heads = pytest.mark.parametrize("head", ["example", "token", "next_token"])


def make(scan, seed=0, dtype=torch.float, beta=None, channels=8, **options):
    """A machine with a scan; every number is drawn from the seed."""
    torch.manual_seed(seed)
    num_slots = options.get("max_states") or options.get("num_states", 3)
    scan = SegmentScan(channels, channels, num_slots, 4, **scan)
    machine = make_machine(seed, dtype, scan=scan, state_channels=channels, **options)
    with torch.no_grad():  # away from the neutral start, where mistakes could hide
        for p in machine.cell.scan.convolution.parameters():
            p.normal_(0.0, 0.4)
        if getattr(machine.head, "gains", None) is not None:
            machine.head.gains.normal_()
        if beta is not None:
            set_gates(machine, beta)
    return machine


@torch.no_grad()
def set_gates(machine, beta):
    for layer in machine.cell.scan.layers:
        for part in filter(None, (layer.transition, layer.memory)):
            part.lin_beta.weight.zero_()
            part.lin_beta.bias.fill_(beta)


def kept(machine, state):
    return state.states[:, : machine.cell.kept_channels]


# The equations ##################################################################


def read_by_hand(machine, x, head, cell):
    """Two segments of one example: the scan as a layer, the rest from its equations."""
    w, o = weights_of(machine), Options(3, cell=cell)
    scan, kept = machine.cell.scan, machine.cell.kept_channels
    x = affine(w, "embedding.lin", x)
    s, tail, outs = w["manager.bank"], None, []
    c = torch.zeros_like(s[:, kept:]) if cell == "lstm" else None
    for segment in x.split(3):
        before = s
        weights, _ = routing(w, o, segment, range(3))
        relation = Relation.complete([0, len(segment)], [0, 3])
        s, reads = scan(
            (segment, s),
            relation,
            weights=weights.T.flatten(),
            tail=tail,
        )
        tail = segment[-1:]
        u = affine(w, "cell.router.lin_out", weights.T @ segment)
        key = affine(w, "cell.attention.lin_token", segment)
        query = affine(w, "cell.attention.lin_query", s)
        u = u + affine(w, "cell.attention.lin_out", attend(query, key, key, o.heads))
        u = torch.cat([u, s[:, :kept]], 1)
        gated, c = propagate(w, o, s[:, kept:], c, u)
        # Two heads of four channels each: two gated channels are less than one of them.
        gated = communicate(w, replace(o, heads=1 if kept > 0 else 2), gated)
        s = torch.cat([s[:, :kept], gated], 1)
        if head != "example":
            seen = (before if head == "next_token" else s).clone()
            seen[:, :kept] = 0
            key, value = affine(w, "head.readout.lin_state", seen).chunk(2, 1)
            read = attend(affine(w, "head.readout.lin_query", segment), key, value, o.heads)
            read = affine(w, "head.readout.lin_out", read)
            gains = w["head.gains"]
            token = norm(w, "head.norm", gains[0] * segment + gains[1] * read + reads)
            outs.append(affine(w, "head.lin_out", token))
    out = affine(w, "head.lin_out", s.mean(0)[None]) if head == "example" else torch.cat(outs)
    return out, s, c


@scans
@heads
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_machine_is_the_scan_then_the_documented_update_of_the_gated_heads(cell, head, scan):
    machine = make(scan, dtype=torch.double, head=head, cell=cell)
    x = torch.randn(5, 3, dtype=torch.double)
    result = machine.run(x)
    out, s, c = read_by_hand(machine, x, head, cell)
    torch.testing.assert_close(result.out, out, rtol=0, atol=1e-10)
    torch.testing.assert_close(result.state.states, s, rtol=0, atol=1e-10)
    if cell == "lstm":
        torch.testing.assert_close(result.state.cell, c, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("mix", ["sum", "bias", "attention", "routing"])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
@heads
def test_closed_gates_are_the_documented_machine_to_the_last_bit(head, backend, mix, cell):
    options = {"cell": cell, "mix": mix, "head": head, "segment_length": 3}
    machine = make({"gated_heads": None, "backend": backend}, beta=-100.0, **options)
    plain = make_machine(state_channels=8, position=None, **options)
    plain.cell.fuse = False  # one kernel for the whole loop rounds differently
    weights = machine.state_dict()
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    x, counts = torch.randn(11, 3), [7, 0, 4]
    actual, expected = run(machine, x, counts), run(plain, x, counts)
    assert torch.equal(actual.state.states, expected.state.states)
    if cell == "lstm":
        assert torch.equal(actual.state.cell, expected.state.cell)
    if head == "example":
        assert torch.equal(actual.out, expected.out)
    set_gates(machine, 0.0)
    assert not torch.equal(run(machine, x, counts).state.states, expected.state.states)


@scans
@heads
def test_every_parameter_of_the_scan_learns(head, scan):
    machine = make(scan, head=head).train()
    out = run(machine, torch.randn(12, 3), [7, 5]).out
    (out * torch.randn_like(out)).sum().backward()
    for name, p in machine.cell.scan.named_parameters():
        # Without token heads the last reads go nowhere.
        reads = name.startswith(("lin_read", "norms", "mixers")) or "lin_query" in name
        if head == "example" and reads and not name.startswith(("norms.0", "mixers.0")):
            continue
        if head == "example" and reads and len(machine.cell.scan.layers) == 1:
            continue
        assert p.grad is not None and p.grad.abs().sum() > 0, name


# Streams ########################################################################


@settings(max_examples=25)
@given(
    scan=st.sampled_from(list(SCANS.values())),
    head=st.sampled_from(["example", "token", "next_token"]),
    cell=st.sampled_from(["gru", "lstm"]),
    is_double=st.booleans(),
    pieces=st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=1, max_size=3),
    last=st.lists(st.integers(0, 5), min_size=2, max_size=2),
)
def test_pieces_with_carried_state_equal_the_whole(scan, head, cell, is_double, pieces, last):
    # Single precision asks for heads of a usual width: a LayerNorm of two numbers is a sign.
    dtype, tolerance, channels = (torch.double, 1e-10, 8) if is_double else (torch.float, 1e-6, 32)
    options = {"head": head, "cell": cell, "segment_length": 2, "channels": channels}
    machine = make(scan, dtype=dtype, beta=1.0, **options)
    pieces = [*([2 * n for n in counts] for counts in pieces), last]
    lengths = [sum(counts[b] for counts in pieces) for b in range(2)]
    if sum(lengths) == 0:
        return
    xs = [torch.randn(n, 3, dtype=dtype) for n in lengths]
    whole = run(machine, torch.cat(xs), lengths)
    state, read, outs = None, [0, 0], [[], []]
    for counts in pieces:
        part = torch.cat([xs[b][read[b] : read[b] + counts[b]] for b in range(2)])
        result = run(machine, part, counts, state=state)
        state = result.state
        read = [read[b] + counts[b] for b in range(2)]
        if head != "example":
            for b, out in enumerate(result.out.split(counts)):
                outs[b].append(out)
    out = result.out if head == "example" else torch.cat(outs[0] + outs[1])
    assert_close_to_norm(state.states, whole.state.states, tolerance, "states")
    assert_close_to_norm(state.tail, whole.state.tail, tolerance, "tail")
    assert_close_to_norm(out, whole.out, tolerance, "out")
    assert state.num_tokens.tolist() == lengths
    if cell == "lstm":
        assert_close_to_norm(state.cell, whole.state.cell, tolerance, "cell")


@scans
@pytest.mark.parametrize("head", ["example", "next_token"])
def test_what_the_scan_keeps_does_not_depend_on_where_segments_end(head, scan):
    machine = make(scan, beta=1.0, head=head)
    x, counts = torch.randn(40, 3), [25, 15]
    whole = run(machine, x, counts, segment_length=25)
    results = [run(machine, x, counts, segment_length=n) for n in (1, 2, 7, 16, 17, 20)]
    # And from call to call in pieces that are no whole segments.
    state = None
    for (first, last), n in zip(((0, 1), (1, 12), (12, 25)), (4, 5, 9), strict=True):
        part = torch.cat([x[first:last], x[25:][first:last]])
        counts = [last - first, len(part) - (last - first)]
        result = run(machine, part, counts, state=state, segment_length=n)
        state = result.state
    results.append(result)
    gated = machine.cell.kept_channels
    for result in results:
        if gated > 0:
            assert_close_to_norm(kept(machine, result.state), kept(machine, whole.state), 1e-5)
        other = (result.state.states - whole.state.states)[:, gated:]
        assert other.norm() > 1e-3  # what gates write may depend on it


@scans
def test_what_tokens_read_from_the_scan_does_not_depend_on_where_segments_end(scan):
    if scan.get("gated_heads", 1) is None:
        pytest.skip("the gates write every head")
    machine = make(scan, dtype=torch.double, head="next_token")
    with torch.no_grad():
        machine.head.gains.zero_()  # the scan alone
    x = torch.randn(25, 3, dtype=torch.double)
    whole = machine(x, segment_length=25)
    for n in (1, 2, 7, 16, 17, 20):
        torch.testing.assert_close(machine(x, segment_length=n), whole, rtol=1e-10, atol=1e-10)


@scans
def test_neighbours_in_the_batch_make_no_difference(scan):
    machine = make(scan, beta=1.0)
    examples = [torch.randn(n, 3) for n in (9, 1, 4, 13)]
    assert_batch_invariant(lambda x, batch: machine(x, batch), examples)
    token = make(scan, dtype=torch.double, head="token")
    x, counts = torch.randn(14, 3, dtype=torch.double), [9, 0, 5]
    together = run(token, x, counts).out
    alone = torch.cat([token(x[:9]), token(x[9:])])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


@scans
def test_a_token_sees_nothing_of_what_follows(scan):
    machine = make(scan, dtype=torch.double, head="next_token", segment_length=4)
    x = torch.randn(10, 3, dtype=torch.double, requires_grad=True)
    out = machine(x)
    for i in range(10):
        (grad,) = torch.autograd.grad(out[i].sum(), x, retain_graph=True)
        seen = (grad.abs().sum(1) > 1e-12).nonzero().flatten().tolist()
        assert seen[-1] == i


@scans
def test_a_tick_without_tokens_changes_nothing(scan):
    machine = make(scan, head="token")
    state = machine.run(torch.randn(6, 3)).state
    idle = machine.run(torch.zeros(0, 3), state=state)
    assert torch.equal(idle.state.states, state.states)
    assert torch.equal(idle.state.tail, state.tail)
    assert idle.out.shape == (0, 2)
    assert run(machine, torch.zeros(0, 3), [0, 0]).out.shape == (0, 2)


@scans
def test_gradients_flow_through_the_carried_state_and_its_tail(scan):
    machine = make(scan, dtype=torch.double, head="token")
    x = torch.randn(9, 3, dtype=torch.double, requires_grad=True)
    first = machine.run(x[:6])
    pieces = machine.run(x[6:], state=first.state).out.square().sum()
    (actual,) = torch.autograd.grad(pieces, x, retain_graph=True)
    (whole,) = torch.autograd.grad(machine(x)[6:].square().sum(), x)
    torch.testing.assert_close(actual, whole, rtol=1e-9, atol=1e-11)
    (cut,) = torch.autograd.grad(
        machine.run(x[6:], state=first.state.detach()).out.square().sum(), x
    )
    assert (cut[:6] == 0).all()
    torch.testing.assert_close(cut[6:], whole[6:], rtol=1e-9, atol=1e-11)


@scans
@torch.no_grad()
def test_twenty_thousand_tokens_stay_finite(scan):
    machine = make(scan, segment_length=125, head="token", routing_reduce="mean")
    state = None
    for _ in range(4):
        result = machine.run(3 * torch.randn(5_000, 3), state=state)
        state = result.state.detach()
        assert result.out.isfinite().all()
        assert state.states.isfinite().all()
    assert state.num_tokens.tolist() == [20_000]
    channels = machine.cell.scan.transition_channels
    if not scan.get("write"):  # reflections and decays never grow
        before = machine.manager.bank[:, :channels].unflatten(1, (-1, 2)).norm(dim=2)
        after = state.states[:, :channels].unflatten(1, (-1, 2)).norm(dim=2)
        assert (after <= before * (1 + 1e-3)).all()


def test_the_tail_is_part_of_the_state():
    machine = make(SCANS["transition"])
    x = torch.randn(7, 3)
    state = run(machine, x, [3, 0, 4]).state
    tokens = machine.embedding(x)
    expected = torch.stack([tokens[2], torch.zeros(8), tokens[6]])
    assert torch.equal(state.tail, expected)
    assert state.tail.requires_grad and not state.detach().tail.requires_grad
    assert torch.equal(state.detach().tail, expected)
    assert state.to("meta").tail.device.type == "meta"
    assert torch.equal(state.to("cpu").tail, expected)
    later = run(machine, x[:2], [0, 2, 0], state=state).state
    assert torch.equal(later.tail[[0, 2]], expected[[0, 2]])
    assert torch.equal(later.tail[1], tokens[1])
    forgot = run(machine, x[:2], [1, 1, 0], state=replace(state, tail=None)).state
    assert not torch.equal(forgot.states, run(machine, x[:2], [1, 1, 0], state=state).state.states)
    assert make_machine().run(x).state.tail is None


@pytest.mark.parametrize("scan", [SCANS["both"], SCANS["all written"]], ids=["some", "all"])
def test_an_lstm_carries_cells_of_the_gated_channels_only(scan):
    machine = make(scan, cell="lstm", max_states=4)
    gated = 8 if scan["gated_heads"] is None else 4
    state = run(machine, torch.randn(9, 3), [5, 4]).state
    assert state.states.shape == (6, 8)
    assert state.cell.shape == (6, gated)
    edited = state.edit(machine.manager.allocate(1), machine.manager)
    assert edited.cell.shape == (8, gated)
    assert torch.equal(edited.cell.view(2, 4, gated)[:, :3], state.cell.view(2, 3, gated))
    result = run(machine, torch.randn(4, 3), [2, 2], state=edited)
    assert result.state.cell.shape == (8, gated)


# Hiding gated heads in training ######################################################


@heads
def test_gated_heads_are_hidden_in_training_for_a_share_of_the_examples(head):
    x, counts = torch.randn(60, 3), [3] * 20
    shares = []
    for dropout in (0.0, 0.5, 0.99):
        machine = make({"gated_dropout": dropout}, head=head)
        evaluated = run(machine, x, counts).out
        machine.train()
        torch.manual_seed(1)
        first = run(machine, x, counts).out.view(20, -1)
        changed = (first - evaluated.view(20, -1)).abs().amax(1) > 1e-6
        if head == "next_token":
            # The first segment of a stream meets the bank, which is hidden, too.
            assert changed.any() == (dropout > 0)
        shares.append(changed.float().mean().item())
        machine.eval()
        assert torch.equal(run(machine, x, counts).out, evaluated)
    assert shares[0] == 0 and 0.2 < shares[1] < 0.8 and shares[2] > 0.8


def test_a_hidden_example_is_read_without_its_gated_heads():
    machine = make({"gated_heads": 2, "gated_dropout": 0.5})
    x, counts = torch.randn(60, 3), [3] * 20
    state = run(machine, x, counts).state
    w = weights_of(machine)
    rows = state.states.view(20, 3, 8)
    shown = affine(w, "head.lin_out", rows.mean(1))
    hidden = rows.clone()
    hidden[..., 4:] = 0
    hidden = affine(w, "head.lin_out", hidden.mean(1))
    result = run(machine.train(), x, counts)
    is_shown = (result.out - shown).abs().amax(1) < 1e-5
    is_hidden = (result.out - hidden).abs().amax(1) < 1e-5
    assert (is_shown ^ is_hidden).all()
    assert is_shown.any() and is_hidden.any()
    # The states themselves, and what is carried, are whole.
    torch.testing.assert_close(result.state.states, state.states)


def test_where_gates_write_every_head_nothing_is_hidden():
    machine = make({"gated_heads": None, "gated_dropout": 0.9})
    x = torch.randn(9, 3)
    expected = run(machine, x, [3] * 3).out
    assert torch.equal(run(machine.train(), x, [3] * 3).out, expected)


# Predictions for some tokens ########################################################


def predictor(kind, head):
    torch.manual_seed(0)
    if kind == "machine":
        return make(SCANS["both"], head=head)
    if kind == "plain machine":
        return make_machine(head=head)
    if kind == "graphs":
        return make_machine(head=head, segment_length=None)
    if kind == "transformer":
        return TransformerBaseline(3, 8, 2, heads=2, head=head).eval()
    if kind == "delta_net":
        return DeltaNetBaseline(3, 8, 2, heads=2, head=head).eval()
    return RecurrentBaseline(3, 8, 2, cell=kind, head=head).eval()


PREDICTORS = ("machine", "plain machine", "graphs", "gru", "lstm", "transformer", "delta_net")


@pytest.mark.parametrize("kind", PREDICTORS)
@pytest.mark.parametrize("head", ["token", "next_token"])
def test_predictions_for_some_tokens_are_those_rows_of_all(head, kind):
    if kind == "graphs" and head == "next_token":
        pytest.skip("graphs have no order")
    model = predictor(kind, head)
    x, batch = torch.randn(12, 3), batch_of([7, 1, 4])
    full = model(x, batch)
    for at in ([11, 0, 7, 3], [5], [2, 2, 2], list(range(12)), []):
        at = torch.tensor(at, dtype=torch.long)
        torch.testing.assert_close(model(x, batch, at=at), full[at], rtol=1e-5, atol=1e-6)
        result = model.run(x, batch, at=at)
        assert result.out.shape == (len(at), 2)
    if isinstance(model, NeuralStateMachine):
        assert torch.equal(result.tokens, model.run(x, batch).tokens)
    grads = []
    for out in (model(x, batch, at=torch.tensor([3, 9])), model(x, batch)[[3, 9]]):
        model.zero_grad()
        out.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", PREDICTORS)
@pytest.mark.parametrize(
    ("at", "message"),
    [
        (torch.tensor([4]), "at names tokens 4 to 4, but x has 4 rows"),
        (torch.tensor([1, -1]), "at names tokens -1 to 1, but x has 4 rows"),
        (torch.tensor([1.0]), r"at must hold the numbers of tokens.*\(1,\).*torch.float32"),
        (torch.ones(4, dtype=torch.bool), "torch.bool; use mask.nonzero"),
        (torch.zeros(1, 1, dtype=torch.long), r"integers \(P,\), but has shape \(1, 1\)"),
        ([0, 1], "at must .*list"),
    ],
    ids=["too large", "negative", "float", "mask", "matrix", "list"],
)
def test_tokens_that_do_not_exist_are_refused(kind, at, message):
    model = predictor(kind, "token")
    with pytest.raises(ValueError, match=message):
        model(torch.randn(4, 3), at=at)


@pytest.mark.parametrize("kind", PREDICTORS)
def test_heads_for_examples_have_no_tokens_to_name(kind):
    with pytest.raises(ValueError, match=r"at= names tokens, but head=\"example\" predicts for"):
        predictor(kind, "example")(torch.randn(4, 3), at=torch.tensor([0]))


# Edits of the node set ##############################################################


def smaller(machine, slots, scan, **options):
    """A machine of these slots alone, with the same weights."""
    small = make(scan, num_states=len(slots), **options)
    weights = machine.state_dict()
    per_slot = {"cell.router.lin_logits": 2, "cell.scan.layers.0.memory.lin_key": 1}
    per_slot["cell.scan.layers.0.memory.lin_query"] = 1
    num_slots = machine.manager.max_states
    for name, value in weights.items():
        owner = name.rpartition(".")[0]
        if name.startswith("manager."):
            weights[name] = value[list(slots)]
        elif owner in per_slot:
            assert value.size(0) % num_slots == 0
            weights[name] = value.unflatten(0, (num_slots, -1))[list(slots)].flatten(0, 1)
    small.load_state_dict(weights)
    return small


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_after_edits_a_stream_goes_on_as_in_a_machine_of_the_slots_that_are_left(cell):
    options = {"dtype": torch.double, "head": "token", "cell": cell}
    scan = {"memory_heads": 2, "gated_heads": 1, "write": True}
    machine = make(scan, num_states=3, max_states=5, **options)
    x, counts = torch.randn(9, 3, dtype=torch.double), [5, 4]
    first = run(machine, x, counts)
    # Slots that are not active count for nothing.
    small = smaller(machine, [0, 1, 2], scan, **options)
    torch.testing.assert_close(first.out, run(small, x, counts).out, rtol=1e-10, atol=1e-10)
    machine.manager.importance_ema.copy_(torch.tensor([0.5, 0.1, 0.5, 0.0, 0.0]))
    edit = machine.manager.prune(lowest=1)
    state = first.state.edit(edit, machine.manager)
    assert state.tail is first.state.tail
    assert torch.equal(state.states.view(2, 2, 8), first.state.states.view(2, 3, 8)[:, [0, 2]])
    small = smaller(machine, [0, 2], scan, **options)
    result = run(machine, x, counts, state=state)
    expected = run(small, x, counts, state=replace(state, slots=torch.arange(2)))
    torch.testing.assert_close(result.out, expected.out, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.state.states, expected.state.states, rtol=1e-10, atol=1e-10)
    for _ in range(2):
        state = state.edit(machine.manager.allocate(1), machine.manager)
    assert state.slots.tolist() == [0, 1, 2, 3]
    small = smaller(machine, [0, 1, 2, 3], scan, **options)
    result = run(machine, x, counts, state=state)
    expected = run(small, x, counts, state=state)
    torch.testing.assert_close(result.out, expected.out, rtol=1e-10, atol=1e-10)


def test_edits_reach_memory_heads_and_their_optimizer_state():
    machine = make({"memory_heads": 2}, num_states=3, max_states=5, head="token").train()
    optimizer = torch.optim.AdamW(machine.parameters(), lr=0.01)
    machine.manager.register_optimizer(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        machine(torch.randn(9, 3)).square().sum().backward()
        optimizer.step()
    memory = machine.cell.scan.layers[0].memory
    tensors = [memory.lin_key.weight, memory.lin_key.bias, memory.lin_query.weight]
    tensors += [t for p in tensors for n, t in optimizer.state[p].items() if n != "step"]
    before = [t.detach().clone().unflatten(0, (5, 2)) for t in tensors]
    machine.manager.importance_ema.copy_(torch.tensor([0.5, 0.1, 0.5, 0.0, 0.0]))
    machine.manager.prune(lowest=1)
    machine.manager.allocate(2)
    for t, old in zip(tensors, before, strict=True):
        new = t.detach().unflatten(0, (5, 2))
        assert torch.equal(new[[0, 2, 4]], old[[0, 2, 4]])
        assert not torch.equal(new[1], old[1])
    optimizer.zero_grad()
    machine(torch.randn(9, 3)).square().sum().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in machine.parameters())


# Snapping #######################################################################


def snappable(head="token", **options):
    scan = {"gated_heads": 2, "reflections": 1}
    machine = make(scan, head=head, out_channels=3, segment_length=3, **options)
    x = torch.randn(120, 3)
    return machine, x, [4] * 30


def predicted(machine, x, counts):
    result = run(machine, x, counts)
    out = result.out
    if out.size(0) != len(counts):
        out = out[torch.tensor(counts).cumsum(0) - 1]
    return out.argmax(1), result.state.states.view(len(counts), 3, 8)[..., :4]


@heads
@torch.no_grad()
def test_codes_are_the_means_over_what_the_machine_itself_predicts(head):
    machine, x, counts = snappable(head)
    labels, states = predicted(machine, x, counts)
    assert labels.unique().numel() > 1
    before = copy.deepcopy(machine.state_dict())
    snap = machine.fit_snap(x, batch_of(counts))
    assert snap is machine.cell.snap
    classes = labels.unique().tolist()
    assert (snap.num_states, snap.num_codes, snap.channels) == (3, len(classes), 4)
    for k, label in enumerate(classes):
        torch.testing.assert_close(snap.codes[:, k], states[labels == label].mean(0))
    for name, value in before.items():  # reading to fit it changes nothing
        assert torch.equal(machine.state_dict()[name], value), name


@heads
@torch.no_grad()
def test_states_are_codes_after_every_segment_and_margins_are_recorded(head):
    machine, x, counts = snappable(head)
    plain = run(machine, x, counts, record=True)
    assert plain.record.margins == [None] * len(plain.record.states)
    snap = machine.fit_snap(x, batch_of(counts))
    counts = [7, 0, 113]
    result = run(machine, x, counts, record=True)
    assert len(result.record.margins) == len(result.record.states) == 38
    codes = snap.codes.transpose(0, 1)
    for step, (states, margin) in enumerate(
        zip(result.record.states, result.record.margins, strict=True)
    ):
        rows = states.view(-1, 3, 8)[..., :4]
        assert len(rows) == len(margin) == (2 if step < 3 else 1)
        assert ((margin >= 0) & (margin <= 1)).all()
        for row in rows:
            assert any(torch.equal(row, code) for code in codes)
    # Snapping what is snapped changes nothing; an example without tokens was not snapped.
    final = result.state.states.view(3, 3, 8)
    again = snap(final[[0, 2]][..., :4])
    assert torch.equal(again.states, final[[0, 2]][..., :4])
    assert (again.margin == 1).all()
    assert torch.equal(final[1], machine.manager.bank)
    # The gated heads are left to the gates.
    assert not torch.equal(final[0, :, 4:], final[2, :, 4:])


@torch.no_grad()
def test_small_errors_end_with_the_segment():
    machine, x, counts = snappable()
    machine.fit_snap(x, batch_of(counts))
    state = machine.run(x[:6]).state
    noisy = state.states.clone()
    noisy[:, :4] += 1e-4 * torch.randn(3, 4)
    result = machine.run(x[6:12], state=replace(state, states=noisy))
    expected = machine.run(x[6:12], state=state)
    assert torch.equal(kept(machine, result.state), kept(machine, expected.state))
    machine.cell.snap = None
    result = machine.run(x[6:12], state=replace(state, states=noisy))
    expected = machine.run(x[6:12], state=state)
    assert not torch.equal(kept(machine, result.state), kept(machine, expected.state))


@torch.no_grad()
def test_taking_the_snap_off_restores_the_machine_bit_for_bit():
    machine, x, counts = snappable()
    before = run(machine, x, counts).out
    machine.fit_snap(x, batch_of(counts))
    assert not torch.equal(run(machine, x, counts).out, before)
    first = machine.cell.snap.codes.clone()
    # A second fit reads without the first.
    assert torch.equal(machine.fit_snap(x, batch_of(counts)).codes, first)
    machine.cell.snap = None
    assert torch.equal(run(machine, x, counts).out, before)


def test_drawing_all_parameters_anew_takes_the_snap_off():
    machine, x, counts = snappable()
    machine.fit_snap(x, batch_of(counts))
    machine.reset_parameters()
    assert machine.cell.snap is None


@torch.no_grad()
def test_fitting_leaves_the_mode_and_the_codes_follow_in_training():
    machine, x, counts = snappable()
    assert not machine.fit_snap(x, batch_of(counts), decay=0.5).training
    assert not machine.training
    machine.train()
    snap = machine.fit_snap(x, batch_of(counts), decay=0.5)
    assert machine.training and snap.training and snap.decay == 0.5
    before = snap.codes.clone()
    run(machine, x, counts)
    assert not torch.equal(snap.codes, before)


def test_gradients_pass_through_a_snapped_segment():
    machine, x, counts = snappable()
    machine.fit_snap(x, batch_of(counts))
    with torch.no_grad():
        expected = machine(x[:9])
    x = x[:9].clone().requires_grad_()
    out = machine(x)
    assert torch.equal(out, expected)
    (grad,) = torch.autograd.grad(out[-1].sum(), x)
    assert (grad.abs().sum(1) > 0).all()


@torch.no_grad()
def test_a_snapped_stream_in_pieces_equals_the_whole():
    machine, x, counts = snappable()
    machine.fit_snap(x, batch_of(counts))
    whole, state = machine.run(x[:24]), None
    for part in x[:24].split(6):
        state = machine.run(part, state=state).state
    assert_close_to_norm(state.states, whole.state.states, 1e-6)
    assert torch.equal(kept(machine, state), kept(machine, whole.state))


@torch.no_grad()
def test_a_snap_follows_edits_of_the_node_set():
    machine, x, counts = snappable()
    snap = machine.fit_snap(x, batch_of(counts))
    codes = snap.codes.clone()
    state = machine.run(x[:6]).state
    machine.manager.importance_ema.copy_(torch.tensor([0.5, 0.1, 0.5]))
    state = state.edit(machine.manager.prune(lowest=1), machine.manager)
    state = machine.run(x[6:12], state=state).state
    assert any(torch.equal(state.states[:, :4], codes[[0, 2], k]) for k in range(3))
    state = state.edit(machine.manager.allocate(1), machine.manager)
    assert torch.equal(snap.codes[[0, 2]], codes[[0, 2]])
    assert (snap.codes[1] == 0).all()
    assert machine.run(x[12:18], state=state).state.states[1, :4].tolist() == [0.0] * 4


def test_what_cannot_be_snapped_says_so():
    x, batch = torch.randn(8, 3), batch_of([4, 4])
    message = "fit_snap draws transition heads to codes; build the machine with one"
    with pytest.raises(ValueError, match=message):
        make_machine().fit_snap(x, batch)
    with pytest.raises(ValueError, match=message):
        make({"memory_heads": 3}).fit_snap(x, batch)
    with pytest.raises(ValueError, match="needs all slots active, but 3 of 5 are; fit it before"):
        make({}, max_states=5).fit_snap(x, batch)
    machine = make({}, head="token").train()
    with pytest.raises(ValueError, match="needs a token of every example; leave out empty ones"):
        machine.fit_snap(x, batch, batch_size=3)
    assert machine.training and machine.cell.snap is None
    with pytest.raises(ValueError, match="x must have shape"):
        machine.fit_snap(x[:, :2], batch)
    assert machine.training and machine.cell.snap is None


# Drivers and compilation ############################################################


def gradients(machine, x, counts):
    x = x.clone().requires_grad_()
    machine.zero_grad()
    out = run(machine, x, counts).out
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    grads = {n: p.grad for n, p in machine.named_parameters() if p.grad is not None}
    return out, grads | {"x": x.grad}


@scans
@pytest.mark.parametrize(
    "options",
    [{"checkpoint_segments": 1}, {"checkpoint_segments": "sqrt"}, {"bptt_segments": 9}],
    ids=str,
)
def test_every_driver_gives_the_plain_gradients(options, scan):
    x, counts = torch.randn(12, 3, dtype=torch.double), [7, 5]
    given = {"dtype": torch.double, "head": "token", "segment_length": 2}
    plain, expected = gradients(make(scan, **given), x, counts)
    out, actual = gradients(make(scan, **given, **options), x, counts)
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-12)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


@scans
@pytest.mark.parametrize("checkpoint_segments", [None, 1, 3])
def test_truncation_cuts_the_recurrence_and_nothing_else(checkpoint_segments, scan):
    options = {
        "segment_length": 2,
        "checkpoint_segments": checkpoint_segments,
        "dtype": torch.double,
    }
    x = torch.randn(12, 3, dtype=torch.double)
    whole, full = gradients(make(scan, **options), x, [12])
    cut, truncated = gradients(make(scan, bptt_segments=2, **options), x, [12])
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-12)
    # Six segments, cut before the third and the fifth: the last four tokens remain, and the one
    # before them, which the first of them knows.
    assert (truncated["x"][:7] == 0).all()
    assert truncated["x"][7].abs().sum() > 0
    assert (full["x"][:7].abs().sum(1) > 0).all()
    torch.testing.assert_close(truncated["x"][8:], full["x"][8:], rtol=1e-10, atol=1e-12)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled(machine):
    counter, compile_module = CompileCounterWithBackend("eager"), machine.cell.compile
    machine.cell.compile = lambda **options: compile_module(backend=counter, **options)
    machine.compile_cell()
    return counter


# What Dynamo warns of while it falls back is not what is asked here.
quiet = pytest.mark.filterwarnings("ignore")


@quiet
@pytest.mark.parametrize(
    "scan",
    [
        SCANS["both"],
        *(pytest.param(SCANS[n], marks=pytest.mark.slow) for n in ("layers", "memory", "routed")),
    ],
    ids=["both", "layers", "memory", "routed"],
)
def test_the_compiled_cell_has_no_graph_break_and_the_same_numbers(scan, fresh_dynamo):
    options = {"head": "token", "segment_length": 3}
    machine, reference = make(scan, **options), make(scan, **options)
    compiled(machine)
    x, counts = torch.randn(9, 3), [5, 4]
    (out, actual), (plain, expected) = (gradients(m, x, counts) for m in (machine, reference))
    torch.testing.assert_close(out, plain)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=name, rtol=1e-4, atol=1e-5)
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0


@quiet
@pytest.mark.parametrize(
    "scan",
    [
        SCANS["both"],
        pytest.param(
            SCANS["layers"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["both", "layers"],
)
def test_recompiles_at_most_twice_over_batches_of_all_sizes(scan, fresh_dynamo):
    # Sizes of which no two are equal by chance: Dynamo would take that for a rule.
    machine = make(scan, segment_length=4, num_states=13)
    counter = compiled(machine)
    for counts in ([8, 8], [8, 7, 6, 5], [16] * 5, [7, 8, 12, 11], [12] * 9, [20, 18, 30, 30]):
        run(machine, torch.randn(sum(counts), 3), counts)
    assert counter.frame_count <= 3


@quiet
@pytest.mark.slow
@torch.no_grad()
def test_segments_of_ever_new_lengths_end_uncompiled_and_right(fresh_dynamo):
    machine = make(SCANS["both"], segment_length=4)
    x, counts = torch.randn(26, 3), [14, 12]
    expected = [run(machine, x, counts, segment_length=s) for s in range(1, 14)]
    counter = compiled(machine)
    for segment_length, one in enumerate(expected, 1):
        actual = run(machine, x, counts, segment_length=segment_length)
        torch.testing.assert_close(actual.out, one.out)
    assert 3 < counter.frame_count <= torch._dynamo.config.recompile_limit


@quiet
@pytest.mark.slow
@torch.no_grad()
def test_a_snapped_cell_compiles(fresh_dynamo):
    machine, x, counts = snappable()
    machine.fit_snap(x, batch_of(counts))
    expected = run(machine, x, counts)
    compiled(machine)
    actual = run(machine, x, counts)
    torch.testing.assert_close(actual.out, expected.out)
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0


# Precision ######################################################################


@pytest.mark.filterwarnings("error")
@scans
def test_autocast_keeps_states_in_single_precision(scan):
    machine = make(scan, head="token")
    x = torch.randn(18, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = run(machine, x, [10, 8])
        second = run(machine, x, [10, 8], state=first.state)
    assert first.state.states.dtype == torch.float
    assert second.state.states.dtype == torch.float
    assert second.out.isfinite().all()
    exact = run(machine, x, [10, 8])
    assert (first.out - exact.out).norm() < 0.2 * exact.out.norm()


# What is refused ################################################################


def test_scans_are_for_sequences():
    with pytest.raises(ValueError, match="scan needs ordered tokens, but the nodes of a graph"):
        make({}, segment_length=None)


@pytest.mark.parametrize(
    ("scan", "options", "message"),
    [
        (SegmentScan(4, 8, 3), {}, "token_channels=4, but the machine has 8; build it with token_"),
        (SegmentScan(8, 16, 3), {}, "scan was built with state_channels=16, but the machine has 8"),
        (SegmentScan(8, 8, 4), {}, r"num_states=4, but the machine has 3 \(max_states\)"),
        (
            SegmentScan(8, 8, 3, memory_heads=1),
            {"max_states": 5},
            r"num_states=3, but the machine has 5 \(max_states\); build it with num_states=5",
        ),
        (torch.nn.Identity(), {}, "scan must be an nn.SegmentScan.*Identity has no convolve"),
    ],
    ids=["token_channels", "state_channels", "num_states", "max_states", "no scan"],
)
def test_a_scan_of_other_sizes_is_refused(scan, options, message):
    with pytest.raises(ValueError, match=message):
        make_machine(state_channels=8, scan=scan, **options)


def test_a_scan_that_needs_weights_needs_a_router():
    machine = make({"write": True}, mix="attention")
    with pytest.raises(ValueError, match=r"need routing weights.*mix='attention'"):
        machine(torch.randn(4, 3))
    assert make({"write": False}, mix="attention")(torch.randn(4, 3)).shape == (1, 2)


def test_a_tail_from_another_machine_is_refused():
    x = torch.randn(4, 3)
    with_scan, without = make({}), make_machine(state_channels=8)
    state = with_scan.run(x).state
    with pytest.raises(ValueError, match=r"tail of shape \(1, 8\), but this machine has no scan"):
        without.run(x, state=state)
    with pytest.raises(
        ValueError, match=r"tail of shape \(1, 7\), but this machine needs \(1, 8\)"
    ):
        with_scan.run(x, state=replace(state, tail=torch.zeros(1, 7)))
    for cell, message in (("lstm", "must hold a cell"), ("gru", "must hold no cell")):
        other = make({}, cell="gru" if cell == "lstm" else "lstm").run(x).state
        with pytest.raises(ValueError, match=message):
            make({}, cell=cell).run(x, state=other)


def test_cells_of_another_width_are_refused():
    x = torch.randn(4, 3)
    state = make({"gated_heads": 2}, cell="lstm").run(x).state
    with pytest.raises(ValueError, match=r"cell.*\(3, 2\).*\(3, 4\)"):
        make({"gated_heads": 1}, cell="lstm").run(x, state=state)


def test_dynamic_topologies_see_what_the_scan_keeps():
    seen = []

    @topology.rule(is_dynamic=True)
    def watch(nodes):
        seen.append(nodes.x)
        return topology.complete()(nodes)

    machine = make({"gated_heads": 1}, communication=watch)
    state = machine.run(torch.randn(3, 3)).state
    assert seen[0].shape == (3, 8)
    assert torch.equal(seen[0][:, :6], state.states[:, :6])
