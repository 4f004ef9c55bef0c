"""Drawing without replacement, and running products."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from task_oracles import assert_uniform, generator

from nsm_graph.data.tasks.draws import distinct, weighted_distinct
from nsm_graph.data.tasks.scan import running_product


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 40), st.data(), st.integers(0, 2**32))
def test_distinct(num_examples, size, data, seed):
    count = data.draw(st.integers(1, size))
    rows = distinct(num_examples, count, size, generator(seed))
    assert rows.shape == (num_examples, count) and rows.dtype == torch.int64
    for row in rows.tolist():
        assert len(set(row)) == count and min(row) >= 0 and max(row) < size


# Drawn again until distinct, and as part of a permutation.
@pytest.mark.parametrize(("count", "size"), [(2, 5), (3, 6), (3, 4), (3, 3)])
def test_all_rows_are_equally_likely(count, size):
    every = {row: k for k, row in enumerate(permutations(range(size), count))}
    rows = distinct(60 * len(every), count, size, generator()).tolist()
    assert_uniform(torch.tensor([every[tuple(row)] for row in rows]), len(every))


def test_weighted_distinct_takes_all_in_the_end():
    rows = weighted_distinct(50, 6, torch.arange(1.0, 7.0), generator())
    assert rows.dtype == torch.int64
    assert torch.equal(rows.sort(dim=1).values, torch.arange(6).expand(50, 6))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text("ab", max_size=3), min_size=1, max_size=40))
def test_running_product_keeps_the_order(words):
    # An affine map a x + b modulo a prime, composed from the left: no two orders agree.
    modulus = 10_007
    maps = [(3 + len(word), 1 + sum(map(ord, word))) for word in words]

    def combine(f, g):
        return f[0] * g[0] % modulus, (g[0] * f[1] + g[1]) % modulus

    a, b = (torch.tensor([column]) for column in zip(*maps, strict=True))
    scales, shifts = running_product(combine, (a, b))
    scale, shift = 1, 0
    for t, (a_t, b_t) in enumerate(maps):
        scale, shift = scale * a_t % modulus, (a_t * shift + b_t) % modulus
        assert (scales[0, t], shifts[0, t]) == (scale, shift)
