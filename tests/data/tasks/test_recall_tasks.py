"""Associative recall, copying, selective copying, induction heads."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from task_oracles import (
    NONE,
    assert_frequencies,
    assert_uniform,
    copy,
    generator,
    induction,
    recall,
    selective_copy,
)

from nsm_graph.data.tasks import Copy, Induction, MultiQueryRecall, SelectiveCopy
from nsm_graph.data.tasks import base as base_module

SEEDS = st.integers(0, 2**32)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(0, 20), st.integers(14, 60), SEEDS)
@pytest.mark.parametrize("filler", ["random", "zero"])
def test_mqar(filler, num_pairs, extra, vocab_size, seed):
    task = MultiQueryRecall(vocab_size, num_pairs, filler=filler)
    length = 4 * num_pairs + 2 * extra
    x, y = task.sample(3, length, generator(seed))
    for tokens, labels in zip(x.tolist(), y.tolist(), strict=True):
        asked = [t for t, label in enumerate(labels) if label != NONE]
        assert labels == recall(tokens, num_pairs, asked)
        keys, values = tokens[: 2 * num_pairs : 2], tokens[1 : 2 * num_pairs : 2]
        assert len(set(keys)) == len(set(values)) == num_pairs
        assert all(1 <= key < vocab_size // 2 for key in keys)
        assert all(vocab_size // 2 <= value < vocab_size for value in values)
        # Every key is asked once, at an even place after the pairs.
        assert sorted(tokens[t] for t in asked) == sorted(keys)
        assert all(t >= 2 * num_pairs and t % 2 == 0 for t in asked)
        if filler == "zero":
            rest = set(range(2 * num_pairs, length)) - set(asked)
            assert all(tokens[t] == 0 for t in rest)


def test_mqar_published_settings():
    for length, num_pairs in ((64, 4), (128, 8), (256, 16), (512, 64)):
        x, y = MultiQueryRecall(num_pairs=num_pairs).sample(2, length, generator())
        assert ((y != NONE).sum(dim=1) == num_pairs).all()
        assert x.max() > 4096


def test_mqar_distributions():
    task = MultiQueryRecall(vocab_size=12, num_pairs=2, filler="random")
    x, y = task.sample(4000, 12, generator())
    assert_uniform(x[:, 0] - 1, 5)
    assert_uniform(x[:, 3] - 6, 6)
    assert_uniform(x[y == NONE].view(4000, -1)[:, 4:], 12)

    # The first query takes slot i with weight w_i, the second with what is left.
    weights = [i**-0.99 for i in range(1, 5)]
    is_query = (y != NONE)[:, 4::2]
    first = (x[:, 4::2] == x[:, :1]) & is_query
    second = (x[:, 4::2] == x[:, 2:3]) & is_query
    pair = first.int().argmax(dim=1) * 4 + second.int().argmax(dim=1)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    counts = torch.bincount(pair, minlength=16).tolist()
    expected = [
        weights[i] / sum(weights) * weights[j] / (sum(weights) - weights[i]) for i, j in pairs
    ]
    assert_frequencies([counts[4 * i + j] for i, j in pairs], expected)


def test_mqar_uniform_places():
    _, y = MultiQueryRecall(20, num_pairs=1, power=1).sample(2000, 14, generator())
    assert_uniform((y != NONE).int().argmax(dim=1) // 2 - 1, 6)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(0, 30), st.integers(3, 20), SEEDS)
def test_copy(num_tokens, extra, vocab_size, seed):
    task = Copy(num_tokens, vocab_size)
    length = task.min_length + extra
    x, y = task.sample(3, length, generator(seed))
    for tokens, labels in zip(x.tolist(), y.tolist(), strict=True):
        assert labels == copy(tokens, num_tokens)
        assert all(0 < token < vocab_size - 1 for token in tokens[:num_tokens])
        blanks = [0] * extra + [vocab_size - 1] + [0] * num_tokens
        assert tokens[num_tokens:] == blanks


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(0, 60), st.integers(3, 20), SEEDS)
def test_selective_copy(num_tokens, extra, vocab_size, seed):
    task = SelectiveCopy(num_tokens, vocab_size)
    length = task.min_length + extra
    x, y = task.sample(3, length, generator(seed))
    for tokens, labels in zip(x.tolist(), y.tolist(), strict=True):
        assert labels == selective_copy(tokens, num_tokens)
        assert tokens[-num_tokens:] == [vocab_size - 1] * num_tokens
        assert vocab_size - 1 not in tokens[:-num_tokens]


def test_selective_copy_published_setting():
    task = SelectiveCopy()
    assert (task.num_symbols, task.min_length) == (16, 32)
    x, y = task.sample(4, 4096 + 16, generator())
    assert ((x[:, :4096] != 0).sum(dim=1) == 16).all()
    assert (y != NONE).sum() == 4 * 16


def test_copy_distributions():
    x, _ = Copy().sample(500, 21, generator())
    assert_uniform(x[:, :10] - 1, 8)
    x, y = SelectiveCopy(num_tokens=2, vocab_size=5).sample(2000, 6, generator())
    assert_uniform(y[:, -2:] - 1, 3)
    subsets = list(combinations(range(4), 2))
    places = (x[:, :4] != 0).nonzero()[:, 1].view(-1, 2).tolist()
    assert_uniform(torch.tensor([subsets.index(tuple(pair)) for pair in places]), 6)


@settings(deadline=None, max_examples=40)
@given(st.integers(3, 60), st.integers(3, 20), SEEDS, st.sampled_from([8, 14, 4096]))
def test_induction(length, vocab_size, seed, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_module, "BLOCK", block)
        x, y = Induction(vocab_size).sample(4, length, generator(seed))
    special = vocab_size - 1
    for tokens, labels in zip(x.tolist(), y.tolist(), strict=True):
        assert labels == induction(tokens, special)
        assert tokens.count(special) == 2 and tokens[-1] == special
        assert labels[-1] != special


def test_induction_across_the_real_blocks():
    for length in (4095, 4096, 4097, 4098, 12_288):
        x, y = Induction().sample(64, length, generator())
        for tokens, label in zip(x.tolist(), y[:, -1].tolist(), strict=True):
            assert label == induction(tokens, 15)[-1] and tokens.count(15) == 2


def test_induction_distributions():
    x, y = Induction().sample(3000, 12, generator())
    assert_uniform((x == 15).int().argmax(dim=1), 10)
    assert_uniform(y[:, -1], 15)
    assert_uniform(x[x != 15], 15)


def test_chance():
    assert MultiQueryRecall().chance == 1 / 4096
    assert Copy().chance == 1 / 8
    assert SelectiveCopy().chance == 1 / 14
    assert Induction().chance == 1 / 15


@pytest.mark.parametrize(
    ("task", "options", "match"),
    [
        (MultiQueryRecall, {"num_pairs": 0}, "mqar: num_pairs is 0; give an integer of at least 1"),
        (MultiQueryRecall, {"num_pairs": True}, "mqar: num_pairs is True; give an integer"),
        (MultiQueryRecall, {"vocab_size": 3}, "mqar: vocab_size is 3; give an integer"),
        (
            MultiQueryRecall,
            {"vocab_size": 16, "num_pairs": 8},
            "8 pairs need as many keys, but a vocabulary of 16 has 7; use vocab_size=18 or more",
        ),
        (MultiQueryRecall, {"power": -1}, "power is -1; give a number of at least 0"),
        (MultiQueryRecall, {"power": float("nan")}, "power is nan; give a number of at least 0"),
        (MultiQueryRecall, {"filler": "ones"}, "unknown filler 'ones'; choose one of random, zero"),
        (Copy, {"num_tokens": 0}, "copy: num_tokens is 0; give an integer of at least 1"),
        (SelectiveCopy, {"vocab_size": 2}, "selective_copy: vocab_size is 2; give an integer"),
        (Induction, {"vocab_size": 2.0}, "induction: vocab_size is 2.0; give an integer"),
    ],
)
def test_bad_options(task, options, match):
    with pytest.raises(ValueError, match=match):
        task(**options)


@pytest.mark.parametrize(
    ("task", "length", "match"),
    [
        (MultiQueryRecall(num_pairs=8), 30, "mqar needs a length of at least 32, got 30"),
        (MultiQueryRecall(), 65, "mqar has no sequences of length 65; use 64, the nearest"),
        (Copy(), 20, "copy needs a length of at least 21, got 20"),
        (SelectiveCopy(), 31, "selective_copy needs a length of at least 32, got 31"),
        (Induction(), 2, "induction needs a length of at least 3, got 2"),
    ],
)
def test_bad_lengths(task, length, match):
    with pytest.raises(ValueError, match=match):
        task.sample(1, length, generator())
