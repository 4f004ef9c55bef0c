"""The nearest sources against plain loops in double precision, by both backends."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsm_graph import Partition
from nsm_graph.ops.nearest import MEASURES, alike, nearest

BACKENDS = ["cpu", "reference"]


def partition(counts):
    return Partition.from_ptr(torch.tensor([0, *counts]).cumsum(0))


def similarity(x, y, name):
    x, y = x.double(), y.double()
    if name == "attention":
        return float((x * y).sum())
    return -float((x - y).square().sum())


def by_hand(x, y, k, name, x_counts, y_counts, without_self):
    chosen, row, first = [], 0, 0
    for num_x, num_y in zip(x_counts, y_counts, strict=True):
        for n in range(row, row + num_x):
            others = [m for m in range(first, first + num_y) if not (without_self and m == n)]
            others.sort(key=lambda m: (-similarity(x[n], y[m], name), m))
            chosen.append(sorted(others[:k]))
        row, first = row + num_x, first + num_y
    return chosen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["euclidean", "attention"])
@given(
    counts=st.lists(st.tuples(st.integers(0, 4), st.integers(3, 6)), max_size=3),
    seed=st.integers(0, 99),
)
def test_small_examples_full_of_ties(backend, name, counts, seed):
    x_counts, y_counts = [n for n, _ in counts], [m for _, m in counts]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-1, 2, (sum(x_counts), 2), generator=generator).float()
    y = torch.randint(-1, 2, (sum(y_counts), 2), generator=generator).float()
    nodes = partition(x_counts), partition(y_counts)
    chosen = nearest(x, y, 3, MEASURES[name], *nodes, backend=backend)
    assert chosen.tolist() == by_hand(x, y, 3, name, x_counts, y_counts, False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("counts", [[130], [257, 3, 0, 320], [1023]])
def test_many_sources(backend, name, counts):
    measure = MEASURES[name]
    x = measure.prepare(torch.randn(sum(counts), 5))
    counts = [count for count in counts if count != 3] if name == "attention" else counts
    x, nodes = x[: sum(counts)], partition(counts)
    k = 2
    chosen = nearest(x, x, k, measure, nodes, nodes, without_self=True, backend=backend)
    full = measure.exact(x.double().unsqueeze(1), x.double()).fill_diagonal_(-torch.inf)
    full.masked_fill_(nodes.batch.unsqueeze(1) != nodes.batch, -torch.inf)
    best = full.argsort(dim=1, descending=True, stable=True)[:, :k].sort(1).values
    # In single precision the order of almost equal ones may differ.
    missed = full.gather(1, best).sum(1) - full.gather(1, chosen).sum(1)
    assert missed.abs().max() < 1e-5
    assert (chosen == best).float().mean() > 0.99


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_ties_among_many_go_to_the_lowest(backend, levels):
    x = torch.randint(0, levels, (400, 2)).float()
    nodes = partition([400])
    chosen = nearest(
        x, x, 3, MEASURES["euclidean"], nodes, nodes, without_self=True, backend=backend
    )
    distance = (x.unsqueeze(1) - x).square().sum(-1).fill_diagonal_(torch.inf)
    for row in range(0, 400, 57):
        order = sorted(range(400), key=lambda m: (float(distance[row, m]), m))
        assert chosen[row].tolist() == sorted(order[:3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_close_states_far_from_the_origin_are_told_apart(backend):
    # |a|^2 - 2ab + |b|^2 would cancel to nothing here.
    x = (1e4 + torch.arange(300.0) / 4).unsqueeze(1)
    nodes = partition([300])
    chosen = nearest(
        x, x, 2, MEASURES["euclidean"], nodes, nodes, without_self=True, backend=backend
    )
    assert chosen[1:-1].tolist() == [[i - 1, i + 1] for i in range(1, 299)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num", [20, 400])
def test_states_that_are_not_numbers_choose_something(backend, num):
    x = torch.randn(num, 3)
    x[num // 2] = torch.nan
    nodes = partition([num])
    chosen = nearest(
        x, x, 3, MEASURES["euclidean"], nodes, nodes, without_self=True, backend=backend
    )
    assert ((chosen >= 0) & (chosen < num)).all()
    assert (chosen.diff(dim=1) > 0).all()


def test_results_do_not_depend_on_threads():
    x, nodes = torch.randn(700, 16), partition([400, 300])
    arguments = (x, x, 4, MEASURES["euclidean"], nodes, nodes)
    alone = nearest(*arguments)
    torch.set_num_threads(3)
    together = nearest(*arguments)
    torch.set_num_threads(1)
    assert torch.equal(alone, together)


@pytest.mark.parametrize("channels", [1, 130, 300])
def test_any_width(channels):
    x, nodes = torch.randn(300, channels), partition([300])
    arguments = (x, x, 4, MEASURES["euclidean"], nodes, nodes)
    fast, full = (nearest(*arguments, backend=backend) for backend in BACKENDS)
    assert (fast == full).float().mean() > 0.99


@pytest.mark.parametrize("num", [9, 300])
@pytest.mark.parametrize("name", MEASURES)
def test_all_that_are_alike_enough(num, name):
    measure = MEASURES[name]
    x, nodes = measure.prepare(torch.randn(num, 3)), partition([num - 4, 4])
    least = -0.3 if measure.is_distance else 0.4
    target, source = alike(x, x, least, measure, nodes, nodes, without_self=True)
    full = measure.exact(x.double().unsqueeze(1), x.double()).numpy()
    example = nodes.batch.numpy()
    is_alike = (full >= least) & (example[:, None] == example) & ~np.eye(num, dtype=bool)
    assert np.array_equal(np.stack([target, source]), np.stack(is_alike.nonzero()))


def test_a_limit_that_is_reached_counts():
    x, nodes = torch.arange(200.0).unsqueeze(1) + 500, partition([200])
    target, source = alike(x, x, -4.0, MEASURES["euclidean"], nodes, nodes, without_self=True)
    assert (source - target).abs().max() == 2
    assert len(target) == 2 * (199 + 198)
