"""A machine runs, trains and streams with every rule."""

import pytest
import torch
from torch.testing import assert_close

import nsm_graph as nsm
from nsm_graph import topology
from nsm_graph.topology import NodeSet

RULES = [
    topology.complete(),
    topology.self_loops(),
    topology.ring(2),
    topology.path(),
    topology.grid(2, 3),
    topology.torus(2, 3),
    topology.star(2),
    topology.tree(2),
    topology.hierarchical(2),
    topology.from_parents([-1, 0, 0, 1, 1, 2]),
    topology.band(1),
    topology.window(2),
    topology.causal(),
    topology.dilated(1, 2),
    topology.blocks(2),
    topology.small_world(1, 0.5),
    topology.random_regular(3),
    topology.expander(3),
    topology.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 3]]), 6),
    topology.from_adjacency(torch.eye(6).roll(1, 0)),
    topology.knn(2),
    topology.knn(2, metric="cosine"),
    topology.top_k(3),
    topology.radius(2.0),
    topology.threshold(0.0),
    topology.random(2),
    topology.scheduled({0: topology.ring(), 2: topology.complete()}),
    topology.learned(6, 2),
    topology.ring().biased(topology.DistanceBias(2)),
    topology.knn(2) | topology.ring() - topology.star(),
    ~topology.ring(),
    topology.window(2).reverse(),
    topology.path().power(2).with_self(),
]


def make(rule, **options):
    torch.manual_seed(0)
    return nsm.NeuralStateMachine(
        2, 8, 6, 1, segment_length=3, heads=2, communication=rule, **options
    )


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_rule_in_a_machine(rule):
    machine = make(rule)
    x, batch = torch.randn(17, 2), torch.tensor([0] * 11 + [1] * 6)
    machine(x, batch).sum().backward()
    for name, parameter in machine.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    machine.eval()
    # Examples do not depend on each other, and streams not on where they are cut.
    out = machine(x, batch)
    assert_close(out, torch.cat([machine(x[:11]), machine(x[11:])]), rtol=1e-4, atol=1e-5)
    whole = machine.run(x[:11])
    first = machine.run(x[:6])
    rest = machine.run(x[6:11], state=first.state)
    assert_close(rest.state.states, whole.state.states, rtol=1e-4, atol=1e-5)


def test_the_machine_records_who_talked_to_whom():
    machine = make(topology.scheduled({0: topology.ring(), 2: topology.complete()}))
    record = machine.run(torch.randn(9, 2), record=True).record
    assert [relation.num_edges for relation in record.topologies] == [12, 12, 36]


def test_a_causal_machine_makes_no_edges():
    machine = make(topology.causal())
    record = machine.run(torch.randn(9, 2), record=True).record
    for relation in record.topologies:
        assert relation.is_causal
        assert relation._edge_index is relation._csr is None


def test_states_choose_whom_they_attend_to_most():
    machine = make(topology.complete())
    score = machine.cell.communication.scores
    machine.cell.topology = topology.top_k(2, score)
    record = machine.eval().run(torch.randn(9, 2), record=True).record
    layer = machine.cell.communication
    assert [relation.degree for relation in record.topologies] == [2, 2, 2]
    x = torch.randn(6, 8)
    query, key, _ = layer.lin_qkv(x).chunk(3, dim=1)
    scores = (query.view(6, 2, 4).transpose(0, 1) @ key.view(6, 2, 4).permute(1, 2, 0) / 2).mean(0)
    assert_close(score(x.unsqueeze(0), x.unsqueeze(0))[0], scores)
    relation = machine.cell.topology(topology.NodeSet.from_counts([6], x))
    best = scores.topk(2).indices.sort(1).values
    assert relation.edge_index[0].view(6, 2).equal(best)


def test_a_sparse_rule_is_the_masked_complete_one():
    """The documented layer, with a mask instead of a topology."""
    layer = nsm.nn.StateCommunication(8, heads=2)
    x = torch.randn(6, 8)
    rules = topology.ring(), topology.window(2), topology.expander(3), topology.star()
    for rule in (*rules, topology.causal()):
        relation = rule(topology.NodeSet.from_counts([6]))
        mask = torch.ones(6, 6, dtype=torch.bool)
        mask[relation.edge_index[1], relation.edge_index[0]] = False
        query, key, value = layer.lin_qkv(x).view(6, 3, 2, 4).permute(1, 2, 0, 3)
        scores = (query @ key.mT / 2).masked_fill(mask, -torch.inf)
        heard = (scores.softmax(-1) @ value).transpose(0, 1).reshape(6, 8)
        assert_close(layer(x, relation), layer.norm(x + layer.lin_out(heard)))


@pytest.mark.parametrize(
    "rule",
    [
        topology.window(2),
        topology.ring() | topology.star(),
        topology.band(1).biased(topology.DistanceBias(heads=2)),
        topology.causal(),
    ],
    ids=repr,
)
def test_training_after_an_evaluation_in_inference_mode(rule):
    machine = nsm.NeuralStateMachine(2, 8, 6, 1, segment_length=3, heads=2, communication=rule)
    x, batch = torch.randn(8, 2), torch.tensor([0] * 5 + [1] * 3)
    with torch.inference_mode():
        machine(x, batch)
    machine(x, batch).sum().backward()
    assert all(parameter.grad is not None for parameter in machine.parameters())


def test_what_is_written_into_an_answer_is_no_answer():
    rule, nodes = topology.window(1), NodeSet.from_counts([3])
    expected = rule(nodes).edge_index.clone()
    kept = rule(nodes)
    assert rule(nodes) is kept  # lists that it made by itself are no change
    for change in (
        lambda relation: relation.edge_index.add_(1),
        lambda relation: relation.csr.index.zero_(),
        lambda relation: relation.csc.perm.zero_(),
        lambda relation: relation.sources.ptr.zero_(),
    ):
        change(rule(nodes))
        assert rule(nodes).edge_index.equal(expected)
        assert rule(nodes).csr.index.tolist() == [0, 0, 1, 1, 2]
        assert rule(nodes).sources.ptr.tolist() == [0, 3]
