"""Modular arithmetic with brackets: grammar, labels, distribution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from task_oracles import NONE, assert_uniform, brackets, evaluate, generator, written

from nsm_graph.data.tasks import ModularArithmeticBrackets

SEEDS = st.integers(0, 2**32)


def matching(tokens: list[str], begin: int) -> int:
    depth = 0
    for place in range(begin, len(tokens)):
        depth += {"(": 1, ")": -1}.get(tokens[place], 0)
        if depth == 0:
            return place
    raise AssertionError("an open bracket stays open")


def split(tokens: list[str]) -> tuple[list[str], str, list[str]]:
    """Left operand, operator and right operand of ``(left op right)``."""
    assert tokens[0] == "(" and matching(tokens, 0) == len(tokens) - 1
    left_end = {"(": matching(tokens, 1), "-": 2}.get(tokens[1], 1)
    place = left_end + 1
    return tokens[1:place], tokens[place], tokens[place + 1 : -1]


def check_grammar(tokens: list[str]) -> None:
    if len(tokens) < 5:
        text = "".join("d" if token.isdigit() else token for token in tokens)
        assert text == ["d", "-d", "(d)", "(-d)"][len(tokens) - 1]
        return
    left, operator, right = split(tokens)
    assert operator in ("+", "-", "*")
    check_grammar(left)
    check_grammar(right)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), SEEDS, st.sampled_from([2, 5, 7]))
def test_dense_labels(length, seed, modulus):
    x, y = ModularArithmeticBrackets(modulus).sample(4, length, generator(seed))
    for tokens, labels in zip(x.tolist(), y.tolist(), strict=True):
        check_grammar(written(tokens, modulus))
        assert labels == brackets(tokens, modulus)


@pytest.mark.parametrize("length", [40, 100, 256])
def test_the_last_label_is_the_answer(length):
    x, y = ModularArithmeticBrackets().sample(8, length, generator())
    answers = [evaluate(written(tokens, 5)) % 5 for tokens in x.tolist()]
    assert y[:, -1].tolist() == answers

    task = ModularArithmeticBrackets(has_dense_labels=False)
    same, sparse = task.sample(8, length, generator())
    assert torch.equal(same, x)
    assert sparse[:, -1].tolist() == answers and (sparse[:, :-1] == NONE).all()


def test_the_example_of_the_docstring():
    task = ModularArithmeticBrackets()
    labels = brackets([task.symbols.index(token) for token in "((1+2)*(-3))"], 5)
    assert [label for label in labels if label != NONE] == [1, 3, 3, 2, 1, 1]


def test_pythons_own_arithmetic_agrees():
    task = ModularArithmeticBrackets()
    x, y = task.sample(20, 57, generator())
    for tokens, answer in zip(x.tolist(), y[:, -1].tolist(), strict=True):
        assert eval("".join(task.symbols[symbol] for symbol in tokens)) % 5 == answer


def test_without_times():
    x, _ = ModularArithmeticBrackets(has_times=False).sample(50, 60, generator())
    assert not (x == 7).any() and (x == 5).any() and (x == 6).any()


def test_distribution():
    x, _ = ModularArithmeticBrackets().sample(2000, 12, generator())
    splits = [split(written(tokens, 5)) for tokens in x.tolist()]
    # 1 to 8 tokens on the left, three operators.
    assert_uniform(torch.tensor([len(left) - 1 for left, _, _ in splits]), 8)
    assert_uniform(torch.tensor(["+-*".index(operator) for _, operator, _ in splits]), 3)
    assert_uniform(x[x < 5], 5)
    # Inside, too: the right operand of a left operand of one token has eight.
    inner = [split(right) for left, _, right in splits if len(left) == 1]
    assert_uniform(torch.tensor([len(left) - 1 for left, _, _ in inner]), 4)


def test_bad_options():
    with pytest.raises(ValueError, match="modulus is 0; give an integer of at least 2"):
        ModularArithmeticBrackets(0)
    with pytest.raises(ValueError, match="has_times is 'no'; give True or False"):
        ModularArithmeticBrackets(has_times="no")
    with pytest.raises(ValueError, match="has_dense_labels is 1; give True or False"):
        ModularArithmeticBrackets(has_dense_labels=1)
