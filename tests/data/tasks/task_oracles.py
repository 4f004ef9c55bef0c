"""What every task's labels must be, in plain Python that shares no code with the library."""

from itertools import permutations

import torch

NONE = -100
OPERATORS = {"+": 0, "-": 1, "*": 2, "(": 3, ")": 4}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_frequencies(counts: list[int], weights: list[float]) -> None:
    """Pearson's statistic is no larger than chance makes it, six standard deviations allowed."""
    total, share = sum(counts), sum(weights)
    expected = [total * weight / share for weight in weights]
    assert min(expected) >= 5, "too few draws for the test"
    statistic = sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))
    freedom = len(counts) - 1
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5


def assert_uniform(values: torch.Tensor, size: int) -> None:
    assert_frequencies(torch.bincount(values.reshape(-1), minlength=size).tolist(), [1.0] * size)


def parity(x: list[int]) -> list[int]:
    return [sum(x[: t + 1]) % 2 for t in range(len(x))]


def num_cycles(permutation: tuple[int, ...]) -> int:
    left, cycles = set(range(len(permutation))), 0
    while left:
        point, cycles = left.pop(), cycles + 1
        while permutation[point] in left:
            point = permutation[point]
            left.remove(point)
    return cycles


def elements(degree: int, *, even: bool) -> list[tuple[int, ...]]:
    """A permutation is even if points minus cycles is."""
    ordered = sorted(permutations(range(degree)))
    return [p for p in ordered if not even or (degree - num_cycles(p)) % 2 == 0]


def word(x: list[int], group: list[tuple[int, ...]]) -> list[int]:
    state, labels = list(range(len(group[0]))), []
    for symbol in x:
        state = [state[point] for point in group[symbol]]
        labels.append(group.index(tuple(state)))
    return labels


def written(x: list[int], modulus: int) -> list[str]:
    signs = {modulus + code: sign for sign, code in OPERATORS.items()}
    return [signs.get(symbol, str(symbol)) for symbol in x]


def evaluate(tokens: list[str]) -> int:
    """A recursive descent parser: sum of products of signed digits and brackets."""
    value, end = _sum(tokens, 0)
    assert end == len(tokens), "something follows the expression"
    return value


def _sum(tokens: list[str], place: int) -> tuple[int, int]:
    value, place = _product(tokens, place)
    while place < len(tokens) and tokens[place] in "+-":
        sign = 1 if tokens[place] == "+" else -1
        term, place = _product(tokens, place + 1)
        value += sign * term
    return value, place


def _product(tokens: list[str], place: int) -> tuple[int, int]:
    value, place = _factor(tokens, place)
    while place < len(tokens) and tokens[place] == "*":
        factor, place = _factor(tokens, place + 1)
        value *= factor
    return value, place


def _factor(tokens: list[str], place: int) -> tuple[int, int]:
    if tokens[place] == "-":
        value, place = _factor(tokens, place + 1)
        return -value, place
    if tokens[place] == "(":
        value, place = _sum(tokens, place + 1)
        assert tokens[place] == ")"
        return value, place + 1
    return int(tokens[place]), place + 1


def arithmetic(x: list[int], modulus: int) -> list[int]:
    tokens = written(x, modulus)
    return [evaluate(tokens[: t + 1]) % modulus if t % 2 == 0 else NONE for t in range(len(tokens))]


def brackets(x: list[int], modulus: int) -> list[int]:
    """Evaluates what stands between the innermost open bracket and each token."""
    tokens, labels = written(x, modulus), []
    begins = [0]
    for t, token in enumerate(tokens):
        if token == "(":
            begins.append(t + 1)
        if token == ")":
            begins.pop()
        is_complete = token == ")" or token.isdigit()
        read = tokens[begins[-1] : t + 1]
        labels.append(evaluate(read) % modulus if is_complete else NONE)
    assert begins == [0], "brackets do not match"
    return labels


def recall(x: list[int], num_pairs: int, labelled: list[int]) -> list[int]:
    """Labels at the places given, which must hold one of the keys each."""
    value_of = {x[2 * k]: x[2 * k + 1] for k in range(num_pairs)}
    return [value_of[x[t]] if t in labelled else NONE for t in range(len(x))]


def copy(x: list[int], num_tokens: int) -> list[int]:
    return [NONE] * (len(x) - num_tokens) + x[:num_tokens]


def selective_copy(x: list[int], num_tokens: int) -> list[int]:
    context = x[: len(x) - num_tokens]
    return [NONE] * len(context) + [symbol for symbol in context if symbol != 0]


def induction(x: list[int], special: int) -> list[int]:
    return [NONE] * (len(x) - 1) + [x[x.index(special) + 1]]


def bindings(tokens: list[list[int]], num_keys: int, ask: int, release: int):
    """What is bound in the end, and the label of every token; a key that is unbound is an error."""
    bound: dict[int, int] = {}
    labels = []
    for key, value in tokens:
        labels.append(bound[key] if value == ask else NONE)
        if value == ask or key >= num_keys:
            continue
        if value == release:
            del bound[key]
        else:
            bound[key] = value
    return bound, labels
