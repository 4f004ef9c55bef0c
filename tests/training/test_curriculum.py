"""Fresh sequences: lengths, seeds, and how a curriculum grows."""

import itertools

import pytest
import torch

from nsm_graph.data import TaskSequences
from nsm_graph.data.tasks import make_task
from nsm_graph.training.curriculum import FreshSequences


def fresh(length=32, size=8, seed=0, name="parity", count=80, **options):
    split = TaskSequences(make_task(name), count, length, seed=0)
    return FreshSequences(split, size, torch.Generator().manual_seed(seed), **options)


def lengths(loader):
    return [batch.x.numel() // loader.batch_size for batch in loader]


def right_and_wrong(loader, share):
    """Predictions and labels of a batch whose last answers are right for a share of sequences."""
    size = loader.batch_size
    y = torch.zeros(3 * size, dtype=torch.long)
    hit = torch.arange(size) < round(share * size)
    predicted = torch.zeros(size, 3, dtype=torch.long)
    predicted[~hit, -1] = 1
    out = torch.nn.functional.one_hot(predicted.flatten(), 2).float()
    return out, y, torch.arange(size).repeat_interleave(3)


def test_without_a_curriculum_every_sequence_is_as_long_as_it_gets():
    loader = fresh()
    assert len(loader) == 10
    assert lengths(loader) == [32] * 10
    batch = next(iter(loader))
    assert batch.num_graphs == 8
    assert batch.ptr.tolist() == list(range(0, 257, 32))
    assert torch.equal(batch.batch, torch.arange(8).repeat_interleave(32))


def test_a_shortest_length_alone_draws_any_length_from_there():
    seen = lengths(fresh(length=12, count=1600, min_length=9))
    assert set(seen) == {9, 10, 11, 12}


def test_lengths_are_those_that_the_task_has():
    seen = lengths(fresh(length=39, count=1600, min_length=3, name="modular_arithmetic"))
    assert all(length % 2 == 1 and 3 <= length <= 39 for length in seen)
    assert len(set(seen)) > 10


def test_the_same_seed_makes_the_same_batches_and_the_next_epoch_others():
    one, other = fresh(min_length=2), fresh(min_length=2)
    first, second = list(one), list(other)
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, second, strict=True))
    again = list(one)
    assert not all(
        a.x.shape == b.x.shape and torch.equal(a.x, b.x) for a, b in zip(first, again, strict=True)
    )


def test_a_curriculum_grows_when_the_last_answers_are_right():
    loader = fresh(curriculum=0.9)
    assert max(lengths(loader)) == loader.frontier == 2
    for _ in range(200):
        loader.observe(*right_and_wrong(loader, 0.75))
    assert loader.frontier == 2
    loader, grown = fresh(curriculum=0.9), []
    for _ in range(300):
        loader.observe(*right_and_wrong(loader, 1.0))
        grown.append(loader.frontier)
    assert grown[-1] == 32
    steps = sorted(set(grown))
    assert all(b - a == min(max(1, a // 4), 32 - a) for a, b in itertools.pairwise(steps))
    # Each step asks for the accuracy anew: from .5 to .9 takes 16 batches that are all right.
    assert grown.index(3) == 15
    seen = lengths(fresh(curriculum=0.9))
    assert max(seen) == 2


def test_most_batches_stand_at_the_frontier():
    loader = fresh(curriculum=0.9, count=8000)
    loader.frontier = 20
    seen = lengths(loader)
    share = sum(length == 20 for length in seen) / len(seen)
    assert 0.65 < share < 0.8
    assert min(seen) < 4


def test_a_shortest_length_above_the_longest_is_refused():
    with pytest.raises(ValueError, match=r"train.min_length: expected at most .*=32; got 40"):
        fresh(min_length=40)
