"""Biases on edges: their algebra, and that attention adds them."""

import pytest
import torch
from edge_sets import fixed
from hypothesis import given, settings
from hypothesis import strategies as st

import nsm_graph as nsm
from nsm_graph import Relation, ops, topology
from nsm_graph.nn import StateCommunication
from nsm_graph.topology import DistanceBias, NodeSet, TypeBias


def as_dict(relation):
    bias = torch.zeros(relation.num_edges, 1) if relation.bias is None else relation.bias
    edges = map(tuple, relation.edge_index.T.tolist())
    return dict(zip(edges, bias.squeeze(1).tolist(), strict=True))


def biased(values):
    """A rule of these edges, each with the number that stands by it."""
    rule = fixed(list(values))
    return rule.biased(lambda edges: torch.tensor(list(values.values())).view(-1).float())


edges = st.tuples(st.integers(0, 4), st.integers(0, 4))
valued = st.dictionaries(edges, st.integers(-8, 8), max_size=10)


@settings(max_examples=40)
@given(valued, valued, valued)
def test_biases_are_functions_on_edges(a, b, c):
    five = NodeSet.from_counts([5])
    left, right, third = biased(a), biased(b), biased(c)

    def both(keys):
        return {edge: a.get(edge, 0) + b.get(edge, 0) for edge in keys}

    assert as_dict((left | right)(five)) == both(a.keys() | b.keys())
    assert as_dict((left & right)(five)) == both(a.keys() & b.keys())
    assert as_dict((left - right)(five)) == {e: v for e, v in a.items() if e not in b}
    assert as_dict((right | left)(five)) == as_dict((left | right)(five))
    assert as_dict(((left | right) | third)(five)) == as_dict((left | (right | third))(five))
    assert as_dict(((left & right) & third)(five)) == as_dict((left & (right & third))(five))
    assert as_dict(left.reverse()(five)) == {(j, i): v for (i, j), v in a.items()}
    assert as_dict((left | topology.ring())(five)) == {
        **dict.fromkeys(as_dict(topology.ring()(five)), 0),
        **a,
    } | {e: v for e, v in a.items()}
    assert (~left)(five).bias is None
    assert left.power(2)(five).bias is None


@pytest.mark.parametrize("rule", [topology.complete(), topology.ring(1), topology.window(2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_adds_what_the_relation_carries(rule, dtype):
    nodes = NodeSet.from_counts([5, 3])
    layer = StateCommunication(8, heads=2).to(dtype)
    x = torch.randn(8, 8, dtype=dtype)
    weight = DistanceBias(2, max_distance=3).to(dtype)
    torch.nn.init.normal_(weight.weight)
    relation = rule.biased(weight)(nodes)
    plain = rule(nodes)
    src, dst = plain.edge_index
    expected_bias = weight.weight[(src - dst).clamp(-3, 3) + 3]
    expected = layer(x, plain, bias=expected_bias)
    torch.testing.assert_close(layer(x, relation), expected)
    torch.testing.assert_close(
        layer(x, relation, bias=expected_bias), layer(x, plain, bias=2 * expected_bias)
    )
    # An edge_index, and a layer that is watched, run message by message.
    torch.testing.assert_close(layer(x, plain.edge_index, bias=expected_bias), expected)
    layer.register_message_forward_hook(lambda *_: None)
    torch.testing.assert_close(layer(x, relation), expected)


def test_gradients_reach_the_bias():
    nodes = NodeSet.from_counts([4])
    bias = DistanceBias(1).double()
    relation = topology.band(2).biased(bias)(nodes)
    q = torch.randn(4, 1, 3, dtype=torch.double)

    def attend(weight):
        offset = relation.edge_index[0] - relation.edge_index[1]
        plain = topology.band(2)(nodes).with_bias(weight[offset + 16])
        return ops.edge_attention(q, q, q, plain)

    assert torch.autograd.gradcheck(attend, bias.weight)


def test_relations_keep_their_bias_with_their_edges():
    relation = topology.window(1)(NodeSet.from_counts([3])).with_bias(torch.arange(5.0))
    back = relation.reverse()
    expected = {(j, i): v for (i, j), v in as_dict(relation).items()}
    assert as_dict(back) == expected
    kept = relation.subset(torch.tensor([0, 3]))
    assert kept.bias.flatten().tolist() == [0, 3]
    complete = Relation.complete([0, 2], [0, 2]).with_bias(torch.arange(4.0))
    assert complete.is_complete
    assert as_dict(complete.reverse()) == {(j, i): v for (i, j), v in as_dict(complete).items()}
    assert relation.to("cpu").bias is not None


def test_attributes_of_edges_and_nodes():
    edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
    rule = topology.from_edge_index(edge_index, edge_attr=torch.tensor([2, 0, 1]))
    bias = TypeBias(1, num_types=3)
    with torch.no_grad():
        bias.weight.copy_(torch.tensor([[10.0], [20.0], [30.0]]))
    relation = rule.biased(bias)(NodeSet.from_counts([3, 3]))
    one = {(0, 1): 30, (1, 2): 10, (2, 0): 20}
    assert as_dict(relation) == one | {(i + 3, j + 3): v for (i, j), v in one.items()}

    nodes = NodeSet.from_counts([3], attributes={"pos": torch.tensor([0.0, 2.0, 7.0])})

    def far(edges):
        pos = edges.sources.attributes["pos"]
        return pos[edges.source] - pos[edges.target]

    relation = topology.path().biased(far)(nodes)
    assert as_dict(relation) == {(0, 1): -2, (1, 0): 2, (1, 2): -5, (2, 1): 5}


def test_a_bias_may_read_the_states():
    def close(edges):
        return -(edges.sources.x[edges.source] - edges.targets.x[edges.target]).norm(dim=1)

    rule = topology.complete().biased(close, is_dynamic=True)
    assert rule.is_dynamic
    machine = nsm.NeuralStateMachine(2, 8, 4, 1, segment_length=2, heads=2, communication=rule)
    machine(torch.randn(6, 2)).sum().backward()
    assert repr(rule) == "complete().biased(close)"


def test_between_two_sets():
    tokens, states = NodeSet.from_counts([4]), NodeSet.from_counts([3])
    relation = topology.band(1).biased(lambda edges: -edges.distance.float())(tokens, states)
    assert as_dict(relation) == {
        (i, j): -abs(i - j) for i in range(4) for j in range(3) if abs(i - j) <= 1
    }


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (lambda edges: torch.zeros(3), r"ring\(1\).biased\(.*bias must have shape \(8,\) or \(8, "),
        (lambda edges: 0.5, "the bias must be a tensor, but is float"),
        (lambda edges: edges.attr, r"ring\(1\) knows no attributes of its edges; give edge_attr"),
    ],
)
def test_wrong_biases(bias, message):
    with pytest.raises(ValueError, match=message):
        topology.ring().biased(bias)(NodeSet.from_counts([4]))


def test_wrong_types():
    edge_index = torch.tensor([[0, 1], [1, 0]])
    rule = topology.from_edge_index(edge_index, edge_attr=torch.tensor([3, 0]))
    with pytest.raises(ValueError, match=r"knows the types 0\.\.1, but edges.attr has row 1: 3"):
        rule.biased(TypeBias(1, 2))(NodeSet.from_counts([2]))
    rule = topology.from_edge_index(edge_index, edge_attr=torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match=r"one integer for each edge, but edges\.attr has shape"):
        rule.biased(TypeBias(1, 2))(NodeSet.from_counts([2]))
    with pytest.raises(ValueError, match="takes a function of edges, but got Tensor"):
        topology.ring().biased(torch.zeros(3))


def test_a_bias_of_other_heads_is_refused():
    relation = topology.ring().biased(DistanceBias(3))(NodeSet.from_counts([4]))
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\), \(8, 1\) or \(8, 2\)"):
        StateCommunication(8, heads=2)(torch.randn(4, 8), relation)
