"""Sums and softmaxes over groups, against plain loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsm_graph.ops.segment import (
    HAS_TORCH_SCATTER,
    group_softmax,
    group_sum,
    group_sum_sorted,
    masked_group_softmax,
)
from nsm_graph.relation import Relation

groups = st.lists(st.integers(0, 4), max_size=20)


def loop_sum(values, group, num_groups):
    out = torch.zeros(num_groups, *values.shape[1:], dtype=values.dtype)
    for value, g in zip(values, group.tolist(), strict=True):
        out[g] += value
    return out


def loop_softmax(scores, group):
    """Python floats; a group in which everything is -inf gives zeros."""
    out = torch.zeros_like(scores)
    for g in set(group.tolist()):
        members = [e for e, other in enumerate(group.tolist()) if other == g]
        for h in range(scores.size(1)):
            column = [float(scores[e, h]) for e in members]
            highest = max(column)
            if highest == -math.inf:
                continue
            powers = [math.exp(score - highest) for score in column]
            for e, power in zip(members, powers, strict=True):
                out[e, h] = power / sum(powers)
    return out


@given(groups, st.sampled_from([(), (3,), (2, 3)]))
def test_group_sum(group, rest):
    group = torch.tensor(group, dtype=torch.long)
    values = torch.randn(len(group), *rest, dtype=torch.float64)
    torch.testing.assert_close(group_sum(values, group, 6), loop_sum(values, group, 6))


@given(groups)
def test_group_softmax(group):
    group = torch.tensor(group, dtype=torch.long)
    scores = torch.randn(len(group), 2, dtype=torch.float64) * 5
    torch.testing.assert_close(group_softmax(scores, group, 5), loop_softmax(scores, group))


@given(groups, st.data())
def test_masked_group_softmax(group, data):
    values = st.sampled_from([-math.inf, 0.0, 1.5, 700.0])
    size = 2 * len(group)
    scores = data.draw(st.lists(values, min_size=size, max_size=size))
    scores = torch.tensor(scores, dtype=torch.float64).view(-1, 2)
    group = torch.tensor(group, dtype=torch.long)
    out = masked_group_softmax(scores, group, 5)
    torch.testing.assert_close(out, loop_softmax(scores, group))
    assert (out[scores == -math.inf] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_n12_long_groups_in_sixteen_bits(dtype):
    # In float16 the sum of 100,000 ones is infinite, and every weight would be zero.
    group = torch.zeros(100_000, dtype=torch.long)
    weights = group_softmax(torch.zeros(100_000, 1, dtype=dtype), group, 1)
    assert weights.dtype == dtype
    assert abs(float(weights.double().sum()) - 1) < 1e-2
    total = group_sum(torch.full((100_000,), 0.5, dtype=dtype), group, 1)
    assert total.dtype == dtype
    assert abs(float(total) - 50_000) < 300


def test_whole_numbers_and_truth_values_are_summed_as_they_are():
    group = torch.tensor([0, 2, 2])
    assert group_sum(torch.tensor([2**40, 1, 2]), group, 3).tolist() == [2**40, 0, 3]


@pytest.mark.skipif(not HAS_TORCH_SCATTER, reason="torch-scatter is not installed")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_group_sum_sorted(dtype):
    edges = torch.tensor([[0, 1, 2, 3, 4, 0], [3, 0, 3, 1, 3, 0]])
    relation = Relation.from_edge_index(edges, (5, 5))
    values = torch.randint(-4, 5, (6, 2)).to(dtype)
    out = group_sum_sorted(values, relation.csr)
    assert out.dtype == dtype
    assert torch.equal(out, loop_sum(values, edges[1], 5))
    assert torch.equal(group_sum_sorted(values, relation.csc), loop_sum(values, edges[0], 5))
