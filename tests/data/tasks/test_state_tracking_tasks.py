"""Parity, word problems, and modular arithmetic without brackets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from task_oracles import (
    arithmetic,
    assert_frequencies,
    assert_uniform,
    elements,
    evaluate,
    generator,
    parity,
    word,
    written,
)

from nsm_graph.data.tasks import (
    Group,
    ModularArithmetic,
    Parity,
    WordProblem,
    alternating_group,
    make_task,
    symmetric_group,
)
from nsm_graph.data.tasks import base as base_module

LENGTHS, SEEDS, BLOCKS = st.integers(1, 70), st.integers(0, 2**32), st.sampled_from([8, 14, 4096])
GROUPS = {
    "s3": elements(3, even=False),
    "a5": elements(5, even=True),
    "s5": elements(5, even=False),
}


def sampled(task, length, seed, block):
    """Examples as lists, drawn in blocks of another size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_module, "BLOCK", block)
        x, y = task.sample(3, length, generator(seed))
    return list(zip(x.tolist(), y.tolist(), strict=True))


@settings(deadline=None, max_examples=30)
@given(LENGTHS, SEEDS, BLOCKS)
def test_parity(length, seed, block):
    for x, y in sampled(Parity(), length, seed, block):
        assert y == parity(x)


@pytest.mark.parametrize("name", GROUPS)
@settings(deadline=None, max_examples=20)
@given(LENGTHS, SEEDS, BLOCKS)
def test_word_problem(name, length, seed, block):
    task = make_task(name)
    assert task.num_symbols == task.num_classes == len(GROUPS[name])
    for x, y in sampled(task, length, seed, block):
        assert y == word(x, GROUPS[name])


@settings(deadline=None, max_examples=40)
@given(LENGTHS, SEEDS, BLOCKS, st.sampled_from([2, 4, 5, 6]))
def test_arithmetic(length, seed, block, modulus):
    task = ModularArithmetic(modulus)
    for x, y in sampled(task, task.valid_length(length), seed, block):
        assert all((symbol < modulus) == (t % 2 == 0) for t, symbol in enumerate(x))
        assert y == arithmetic(x, modulus)


def test_long_sequences():
    """Across the real blocks; the truth is a loop that is as long as the sequence."""
    x, y = Parity().sample(1, 9000, generator())
    assert y[0].tolist()[::100] == [int(x[0, : t + 1].sum()) % 2 for t in range(0, 9000, 100)]
    x, y = make_task("s5").sample(1, 9000, generator())
    assert y[0].tolist() == word(x[0].tolist(), GROUPS["s5"])
    x, y = ModularArithmetic().sample(1, 4199, generator())
    # A term that goes over the end of the block is evaluated whole.
    tokens = written(x[0].tolist(), 5)
    for t in range(4080, 4120, 2):
        assert y[0, t] == evaluate(tokens[: t + 1]) % 5


def test_written_and_read():
    task = ModularArithmetic()
    x, _ = task.sample(4, 31, generator())
    for example in x.tolist():
        text = "".join(task.symbols[symbol] for symbol in example)
        assert arithmetic(example, 5)[-1] == eval(text) % 5


def test_distributions():
    assert_uniform(Parity().sample(100, 100, generator())[0], 2)
    x, y = make_task("s3").sample(100, 100, generator())
    assert_uniform(x, 6)
    assert_uniform(y, 6)
    x, _ = ModularArithmetic().sample(100, 101, generator())
    assert_uniform(x[:, ::2], 5)
    assert_uniform(x[:, 1::2] - 5, 3)
    # Neighbours are independent.
    assert_uniform(x[:, 0:-2:2] * 5 + x[:, 2::2], 25)


def test_examples_differ():
    x, _ = make_task("s5").sample(50, 20, generator())
    assert len(set(map(tuple, x.tolist()))) == 50


def test_groups():
    assert symmetric_group(5).elements == tuple(GROUPS["s5"])
    assert alternating_group(5).elements == tuple(GROUPS["a5"])
    assert [symmetric_group(n).order for n in range(1, 5)] == [1, 2, 6, 24]
    table = symmetric_group(4).table
    steps = torch.arange(24)
    assert torch.equal(table[0], steps) and torch.equal(table[:, 0], steps)
    assert torch.equal(table[table[:, :, None], steps], table[steps[:, None, None], table])


def test_a_group_of_your_own():
    rotations = Group("z3", ((0, 1, 2), (1, 2, 0), (2, 0, 1)))
    task = WordProblem(rotations)
    assert (task.name, task.num_symbols, task.chance) == ("z3", 3, 1 / 3)
    x, y = task.sample(2, 30, generator())
    assert torch.equal(y, x.cumsum(dim=1) % 3)
    assert_frequencies(torch.bincount(x.view(-1)).tolist(), [1, 1, 1])


@pytest.mark.parametrize(
    ("permutations", "match"),
    [
        ((), "the first element must be the identity"),
        (((1, 0), (0, 1)), "the first element must be the identity"),
        (((0, 1), (0, 0)), r"\(0, 0\) is no permutation of \(0, 1\)"),
        (((0, 1, 2), (1, 0)), r"\(1, 0\) is no permutation of \(0, 1, 2\)"),
        (((0, 1), (1, 0), (1, 0)), "an element is given twice"),
        (((0, 1, 2), (1, 2, 0)), r"is \(2, 0, 1\), which is not an element"),
    ],
)
def test_bad_groups(permutations, match):
    with pytest.raises(ValueError, match=match):
        Group("mine", permutations)


def test_bad_options():
    with pytest.raises(ValueError, match="degree is 7; give at most 6"):
        symmetric_group(7)
    with pytest.raises(ValueError, match="degree is 0; give an integer of at least 1"):
        alternating_group(0)
    with pytest.raises(ValueError, match="modular_arithmetic: modulus is 1; give an integer"):
        ModularArithmetic(1)
    with pytest.raises(ValueError, match="no sequences of length 40; use 39, the nearest"):
        ModularArithmetic().sample(1, 40, generator())
