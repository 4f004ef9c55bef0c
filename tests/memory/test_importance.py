"""Importance signals against plain loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsm_graph import Relation, ops
from nsm_graph.memory import attention_sharpness, gradient_signal, routing_mass, update_norm


def edges_of(relation):
    return list(zip(*relation.edge_index.tolist(), strict=True))


def cumulate(counts):
    return torch.tensor([0, *counts]).cumsum(0)


# Routing mass #####################################################################


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), max_size=4), st.booleans())
def test_routing_mass_is_the_share_inside_the_example(pairs, is_subset):
    relation = Relation.complete(cumulate([a for a, _ in pairs]), cumulate([b for _, b in pairs]))
    if is_subset:
        relation = relation.subset(torch.arange(0, relation.num_edges, 2))
    weights = torch.rand(relation.num_edges, dtype=torch.float64) + 0.1
    mass = routing_mass(weights, relation)
    assert mass.shape == (relation.num_dst,)
    example = [b for b, (_, n) in enumerate(pairs) for _ in range(n)]
    received = [0.0] * relation.num_dst
    for e, (_, state) in enumerate(edges_of(relation)):
        received[state] += float(weights[e])
    for b in range(len(pairs)):
        states = [j for j in range(relation.num_dst) if example[j] == b]
        total = sum(received[j] for j in states)
        for j in states:
            assert float(mass[j]) == pytest.approx(received[j] / total if total else 0.0)
        assert float(mass[states].sum()) == pytest.approx(1.0 if total else 0.0)


def test_routing_mass_of_real_weights_is_a_share_of_tokens():
    relation = Relation.complete([0, 8, 9], [0, 3, 6])
    _, weights = ops.route(torch.randn(9, 2, 3), torch.randn(9, 4), relation)
    mass = routing_mass(weights, relation)
    dense = torch.zeros(9, 6)
    dense[tuple(relation.edge_index)] = weights
    torch.testing.assert_close(mass, torch.cat([dense[:8, :3].mean(0), dense[8, 3:]]))


def test_routing_mass_of_general_edges_is_one_example():
    relation = Relation.from_edge_index(torch.tensor([[0, 0, 1], [1, 2, 2]]), (2, 3))
    mass = routing_mass(torch.tensor([1.0, 2.0, 5.0]), relation)
    assert mass.tolist() == [0, 0.125, 0.875]


def test_routing_mass_of_nothing_is_zero():
    for relation in (
        Relation.complete([0, 0], [0, 2]),
        Relation.from_edge_index(torch.zeros(2, 0, dtype=torch.long), (2, 2)),
    ):
        assert routing_mass(torch.zeros(0), relation).tolist() == [0, 0]


def test_routing_mass_carries_no_gradient():
    relation = Relation.complete([0, 2], [0, 2])
    assert not routing_mass(torch.rand(4, requires_grad=True), relation).requires_grad


# Attention sharpness ##############################################################


def test_sharpness_extremes():
    # Targets: all alike; one token of three; one token, the only one; no token; all masked.
    edges = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 0, 1], [0, 0, 0, 1, 1, 1, 2, 4, 4]])
    relation = Relation.from_edge_index(edges, (3, 5))
    weights = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0, 1, 0, 1, 0, 0]).unsqueeze(1)
    sharpness = attention_sharpness(weights, relation)
    torch.testing.assert_close(sharpness, torch.tensor([0.0, 1, 1, 0, 0]), atol=1e-6, rtol=0)


def test_sharpness_is_the_mean_over_heads_of_one_minus_normalised_entropy():
    relation = Relation.complete([0, 5, 7], [0, 2, 3])
    edges = edges_of(relation)
    scores = torch.randn(relation.num_edges, 3, dtype=torch.float64)
    weights = torch.zeros_like(scores)
    for state in range(3):
        members = [e for e, (_, target) in enumerate(edges) if target == state]
        weights[members] = scores[members].softmax(0)
    sharpness = attention_sharpness(weights, relation)
    for state in range(3):
        members = [e for e, (_, target) in enumerate(edges) if target == state]
        values = []
        for h in range(3):
            p = [float(weights[e, h]) for e in members]
            values.append(1 + sum(q * math.log(q) for q in p) / math.log(len(p)))
        assert float(sharpness[state]) == pytest.approx(sum(values) / 3)


def test_a_masked_head_counts_as_zero():
    relation = Relation.complete([0, 2], [0, 1])
    weights = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert attention_sharpness(weights, relation).tolist() == [0.5]


def test_sharpness_ranks_what_looks_sharper():
    relation = Relation.complete([0, 4], [0, 2])
    q = torch.tensor([[[0.1]], [[5.0]]])
    weights = ops.edge_attention_weights(q, torch.randn(4, 1, 1), relation)
    dull, sharp = attention_sharpness(weights, relation)
    assert 0 <= dull < sharp <= 1


# Gradient and update ##############################################################


def test_gradient_signal_is_the_change_of_a_linear_loss():
    states = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(5, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((states * direction).sum(), states)
    signal = gradient_signal(states, gradient)
    for j in range(5):
        zeroed = states.detach().clone()
        zeroed[j] = 0
        change = (states.detach() * direction).sum() - (zeroed * direction).sum()
        torch.testing.assert_close(signal[j], change.abs())
    assert not signal.requires_grad


def test_update_norm():
    before = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    after = torch.tensor([[3.0, -4.0], [1.0, 1.0]], requires_grad=True)
    moved = update_norm(before, after)
    assert moved.tolist() == [5, 0]
    assert not moved.requires_grad


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"states have shape \(2, 3\), but gradient has \(3, 2\)"):
        gradient_signal(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"before has shape \(1, 3\), but after has \(2, 3\)"):
        update_norm(torch.zeros(1, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="has 4 edges, but values has 3 rows"):
        routing_mass(torch.zeros(3), Relation.complete([0, 2], [0, 2]))
