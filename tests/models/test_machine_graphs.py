"""The machine on graphs: passes, convolutions between them, encodings, edge features."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from machine_oracle import Options, read_graph, weights_of
from small_machines import batch_of, make_machine
from torch import nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GINEConv, SAGEConv
from torch_geometric.transforms import AddRandomWalkPE

from nsm_graph import topology
from nsm_graph.testing import assert_close_to_norm


def graph(num_nodes, dtype=torch.float, channels=3):
    num_edges = 2 * num_nodes if num_nodes > 0 else 0
    edge_index = torch.randint(max(num_nodes, 1), (2, num_edges))
    return Data(x=torch.randn(num_nodes, channels, dtype=dtype), edge_index=edge_index)


def make_graph_machine(seed=0, dtype=torch.float, **options):
    return make_machine(seed, dtype, segment_length=None, **options)


@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    steps=st.integers(1, 3),
    convs=st.sampled_from([None, "one", "each"]),
    cell=st.sampled_from(["gru", "lstm"]),
    head=st.sampled_from(["example", "token"]),
    top_k=st.sampled_from([None, 2]),
    has_pe=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_its_equations_and_their_gradients(
    counts, steps, convs, cell, head, top_k, has_pe, seed
):
    torch.manual_seed(seed)
    conv = None
    if convs is not None:
        conv = [SAGEConv(4, 4).double() for _ in range(1 if convs == "one" else steps)]
    options = {"num_steps": steps, "cell": cell, "head": head, "top_k": top_k}
    machine = make_graph_machine(
        seed, torch.double, conv=conv, pe_channels=2 if has_pe else None, **options
    )
    graphs = [graph(n, torch.double) for n in counts]
    for g in graphs:
        g.pe = torch.randn(g.num_nodes, 2, dtype=torch.double)
    batch = Batch.from_data_list(graphs)
    x = batch.x.requires_grad_()
    given_edges = batch.edge_index if conv is not None else None
    out = machine(x, batch.batch, edge_index=given_edges, pe=batch.pe if has_pe else None)
    w, oracle = weights_of(machine), Options(3, **options)
    parts = zip(x.split(counts), graphs, strict=True)
    expected = torch.cat(
        [
            read_graph(w, oracle, part, g.edge_index, conv, g.pe if has_pe else None)[0]
            for part, g in parts
        ]
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    probe = torch.randn_like(out)
    leaves = [x, *machine.parameters()]
    ours = torch.autograd.grad((out * probe).sum(), leaves, materialize_grads=True)
    theirs = torch.autograd.grad((expected * probe).sum(), leaves, materialize_grads=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(lambda c: sum(c) > 0),
    head=st.sampled_from(["example", "token"]),
    seed=st.integers(0, 99),
)
def test_a_graph_does_not_see_its_batch(counts, head, seed):
    torch.manual_seed(seed)
    conv = SAGEConv(4, 4)
    machine = make_graph_machine(seed, num_steps=2, conv=conv, head=head)
    graphs = [graph(n) for n in counts]
    batch = Batch.from_data_list(graphs)
    whole = machine.run(batch.x, batch.batch, batch_size=len(counts), edge_index=batch.edge_index)
    outs = whole.out.split(counts) if head == "token" else whole.out.split(1)
    for b, g in enumerate(graphs):
        alone = machine.run(g.x, batch_of([len(g.x)]), batch_size=1, edge_index=g.edge_index)
        assert_close_to_norm(outs[b], alone.out, 1e-5)
        states = whole.state.states[3 * b : 3 * b + 3]
        assert_close_to_norm(states, alone.state.states, 1e-5)
    if counts == [0] * len(counts):
        return
    empty = [b for b, n in enumerate(counts) if n == 0]
    for b in empty:  # nothing was read; the states of the graph only talked
        s = machine.manager.bank
        for _ in range(2):
            s = machine.cell.communication(
                s, topology.complete()(topology.NodeSet.from_counts([3]))
            )
        assert_close_to_norm(whole.state.states[3 * b : 3 * b + 3], s, 1e-5)


@given(seed=st.integers(0, 99))
def test_permuting_nodes_permutes_their_outputs(seed):
    torch.manual_seed(seed)
    machine = make_graph_machine(seed, num_steps=2, conv=SAGEConv(4, 4), head="token")
    g, order = graph(6), torch.randperm(6)
    place = torch.argsort(order)
    out = machine(g.x, edge_index=g.edge_index)
    permuted = machine(g.x[order], edge_index=place[g.edge_index])
    assert_close_to_norm(permuted, out[order], 1e-5)


def test_the_memory_carries_what_edges_do_not():
    conv = SAGEConv(4, 4)
    machine = make_graph_machine(num_steps=2, conv=conv, head="token")
    x = torch.randn(4, 3, requires_grad=True)
    machine(x, edge_index=torch.zeros(2, 0, dtype=torch.long))[0].sum().backward()
    assert (x.grad.abs().sum(1) > 0).all()


def test_edge_features_and_symbols_reach_the_conv():
    g = graph(5)
    conv = GINEConv(nn.Linear(4, 4))
    by_symbol = make_graph_machine(conv=conv, edge_embeddings=3)
    symbols = torch.randint(3, (g.num_edges,))
    out = by_symbol(g.x, edge_index=g.edge_index, edge_attr=symbols)
    other = by_symbol(g.x, edge_index=g.edge_index, edge_attr=(symbols + 1) % 3)
    assert (out - other).abs().max() > 1e-5
    by_feature = make_graph_machine(conv=conv, edge_channels=2)
    features = torch.randn(g.num_edges, 2)
    out = by_feature(g.x, edge_index=g.edge_index, edge_attr=features)
    other = by_feature(g.x, edge_index=g.edge_index, edge_attr=-features)
    assert (out - other).abs().max() > 1e-5


def test_pygs_transform_and_loader_fit():
    graphs = [AddRandomWalkPE(2, attr_name="pe")(graph(n)) for n in (3, 5)]
    machine = make_graph_machine(pe_channels=2)
    batch = Batch.from_data_list(graphs)
    assert machine(batch.x, batch.batch, pe=batch.pe).shape == (2, 2)


def test_every_parameter_gets_a_gradient():
    machine = make_graph_machine(num_steps=3, conv=[SAGEConv(4, 4) for _ in range(3)])
    batch = Batch.from_data_list([graph(4), graph(5)])
    machine(batch.x, batch.batch, edge_index=batch.edge_index).square().sum().backward()
    silent = [n for n, p in machine.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_dynamic_topologies_are_asked_at_every_pass():
    seen = []

    @topology.rule(is_dynamic=True)
    def watched(nodes):
        seen.append((nodes.step, nodes.x.shape))
        return topology.ring()(nodes)

    machine = make_graph_machine(num_steps=3, communication=watched)
    machine(torch.randn(5, 3), batch_of([2, 3]))
    assert seen == [(step, (6, 4)) for step in range(3)]


def test_a_graph_state_is_carried_to_its_next_snapshot():
    machine = make_graph_machine()
    x = torch.randn(5, 3)
    twice = make_graph_machine(num_steps=2)
    twice.load_state_dict(machine.state_dict())
    first = machine.run(x)
    second = machine.run(x, state=first.state)
    assert_close_to_norm(second.out, twice(x), 1e-6)
    assert second.state.num_tokens.tolist() == [10]


def test_record_has_one_entry_for_each_pass():
    machine = make_graph_machine(num_steps=2, top_k=2)
    record = machine.run(torch.randn(5, 3), batch_of([2, 3]), record=True).record
    assert [w.shape for w in record.routing] == [(10,), (10,)]
    assert [a.shape for a in record.attention] == [(10, 2), (10, 2)]
    assert [s.shape for s in record.states] == [(6, 4), (6, 4)]


X = torch.zeros(4, 3)
E = torch.zeros(2, 1, dtype=torch.long)
CONV = {"conv": SAGEConv(4, 4)}
BAD = [
    (CONV, lambda m: m(X), "the machine has a conv, which needs edge_index"),
    (CONV, lambda m: m(X, edge_index=E + 4), "edge_index names node 4, but x has 4 rows"),
    (CONV, lambda m: m(X, edge_index=E - 1), "edge_index names node -1"),
    (CONV, lambda m: m(X, edge_index=E.float()), r"edge_index must be integer of shape \(2, E\)"),
    (CONV, lambda m: m(X, edge_index=E[0]), "edge_index must be integer"),
    (CONV, lambda m: m(X, edge_index=E.to("meta")), "edge_index is on meta"),
    ({}, lambda m: m(X, edge_attr=X), "edge_attr was given without edge_index"),
    ({}, lambda m: m(X, edge_index=E, edge_attr=X), r"one row per edge, 1, but has shape \(4, 3\)"),
    ({}, lambda m: m(X, pe=X), "was not built for pe"),
    ({"pe_channels": 2}, lambda m: m(X), "needs pe"),
    ({"pe_channels": 2}, lambda m: m(X, pe=X), r"pe must have shape \(4, 2\)"),
    ({"pe_channels": 3}, lambda m: m(X, pe=X / 0), "pe holds NaN or infinity"),
    ({}, lambda m: m.run(X, segment_length=2), "this machine reads whole graphs"),
    (
        {**CONV, "edge_embeddings": 3},
        lambda m: m(X, edge_index=E, edge_attr=torch.tensor([3])),
        "edge_attr holds the symbol 3, but num_embeddings is 3",
    ),
    (
        {**CONV, "edge_channels": 2},
        lambda m: m(X, edge_index=E, edge_attr=torch.zeros(1, 3)),
        r"edge_attr must have shape \(tokens, 2\)|edge_attr must have shape \(edges, 2\)",
    ),
    ({"conv": SAGEConv(4, 5)}, lambda m: m(X, edge_index=E), "conv must map 4 channels to 4"),
]


@pytest.mark.parametrize(("options", "call", "message"), BAD, ids=[m for _, _, m in BAD])
def test_refuses_bad_input(options, call, message):
    with pytest.raises(ValueError, match=message):
        call(make_graph_machine(**options))


BAD_OPTIONS = [
    ({"num_steps": 0}, "num_steps must be a positive integer"),
    ({"position": "learned"}, "position='learned' is for sequences"),
    ({"head": "next_token"}, 'head="next_token" needs ordered tokens'),
    ({"bptt_segments": 2}, "bptt_segments is for sequences"),
    ({"checkpoint_segments": "sqrt"}, "checkpoint_segments is for sequences"),
    ({"edge_channels": 2}, "are for conv=, which is None"),
    ({"conv": [nn.Identity()] * 2, "num_steps": 3}, "one for each of the 3 passes, but 2"),
    ({"pe_channels": 2, "pe_kind": "degree"}, "kind must be one of 'random_walk', 'laplacian'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[m for _, m in BAD_OPTIONS])
def test_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_graph_machine(**options)


def test_a_scan_needs_an_order():
    class Scan(nn.Module):
        def hoist(self, x):
            return x

    with pytest.raises(ValueError, match="scan needs ordered tokens"):
        make_graph_machine(scan=Scan())
