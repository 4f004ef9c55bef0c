"""The assertions for users: they pass what is right and fail what is wrong."""

import math

import pytest
import torch

from nsm_graph import Relation
from nsm_graph.ops import edge_attention
from nsm_graph.ops.edge_attention import BACKENDS
from nsm_graph.testing import (
    assert_batch_invariant,
    assert_close_to_norm,
    assert_matches_reference,
    random_relation,
)

# Closeness ########################################################################


def test_differences_within_the_tolerance_pass():
    expected = torch.tensor([3.0, 4.0])
    assert_close_to_norm(expected + torch.tensor([0.04, 0.0]), expected, 0.01)
    assert_close_to_norm(expected, expected, 0.0)
    assert_close_to_norm(torch.zeros(3), torch.zeros(3), 1e-5)
    assert_close_to_norm(torch.zeros(0), torch.zeros(0), 1e-5)


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        ([3.06, 4.0], [3.0, 4.0], "thing: differs by .*, but at most 5.000e-02 is allowed"),
        ([1e-9, 0.0], [0.0, 0.0], "differs by 1.000e-09"),
        ([math.nan, 4.0], [3.0, 4.0], "differs by nan"),
        ([3.0, 4.0], [math.nan, 4.0], "differs by nan"),
        ([math.inf, 4.0], [3.0, 4.0], "differs by inf"),
        ([3.0], [3.0, 4.0], r"thing: expected shape \(2,\), but got \(1,\)"),
    ],
)
def test_differences_beyond_the_tolerance_fail(actual, expected, message):
    with pytest.raises(AssertionError, match=message):
        assert_close_to_norm(torch.tensor(actual), torch.tensor(expected), 0.01, "thing")


def test_differences_are_measured_in_double_precision():
    # In bfloat16 itself the difference would be rounded.
    actual = torch.tensor([257.0], dtype=torch.float32)
    expected = torch.tensor([256.0], dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match=r"differs by 1\.000e\+00"):
        assert_close_to_norm(actual, expected, 1e-3)


# Backends #########################################################################


def given_inputs(relation):
    return [torch.randn(n, 2, 4) for n in (relation.num_dst, relation.num_src, relation.num_src)]


@pytest.mark.parametrize("normalise", ["target", "source"])
def test_a_right_backend_passes(normalise):
    relation = Relation.complete([0, 5, 7], [0, 2, 3])
    q, k, v = given_inputs(relation)
    bias = torch.randn(relation.num_edges)
    assert_matches_reference("dense", q, k, v, relation, bias=bias, normalise=normalise)
    assert q.grad is None
    assert bias.grad is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda q, k, v, out: out * 1.001, "broken, output: differs"),
        (lambda q, k, v, out: out + 0 * q.sum() * math.nan, "broken, output: differs by nan"),
        (lambda q, k, v, out: out + q - q.detach(), "broken, query gradient: differs"),
        (lambda q, k, v, out: out + k.sum() - k.sum().detach(), "broken, key gradient: differs"),
        (lambda q, k, v, out: out + v.sum() - v.sum().detach(), "broken, value gradient: differs"),
        (lambda q, k, v, out: out[:1], "broken, output: expected shape"),
    ],
)
def test_a_wrong_backend_fails(monkeypatch, wrong, message):
    def broken(q, k, v, relation, *, bias_EH, normalise, scale):
        out = BACKENDS["reference"](
            q, k, v, relation, bias_EH=bias_EH, normalise=normalise, scale=scale
        )
        return wrong(q, k, v, out)

    use(monkeypatch, broken)
    relation = random_relation(5, 4, 12)
    with pytest.raises(AssertionError, match=message):
        assert_matches_reference("broken", *given_inputs(relation), relation)


def test_a_backend_without_a_bias_gradient_fails(monkeypatch):
    def forgetful(q, k, v, relation, *, bias_EH, normalise, scale):
        return BACKENDS["reference"](
            q, k, v, relation, bias_EH=bias_EH.detach(), normalise=normalise, scale=scale
        )

    use(monkeypatch, forgetful)
    relation = random_relation(5, 4, 12)
    bias = torch.randn(relation.num_edges, 2)
    with pytest.raises(AssertionError, match="bias gradient: a backend gave none"):
        assert_matches_reference("broken", *given_inputs(relation), relation, bias=bias)


def use(monkeypatch, backend):
    """Makes ``backend="broken"`` a name that the operation knows."""
    module = edge_attention.__globals__
    monkeypatch.setitem(BACKENDS, "broken", backend)
    choose = module["choose_backend"]

    def choose_broken(relation, dtype, forced=None, **options):
        if forced == "broken":
            return module["BackendChoice"]("broken", "test")
        return choose(relation, dtype, forced, **options)

    monkeypatch.setitem(module, "choose_backend", choose_broken)


# Batch invariance #################################################################


def sum_of_examples(x, batch):
    return torch.zeros(int(batch.max()) + 1, x.size(1)).index_add(0, batch, x)


def test_a_function_of_examples_passes():
    examples = [torch.randn(n, 3) for n in (1, 5, 2)]
    assert_batch_invariant(sum_of_examples, examples)


def test_a_function_that_mixes_examples_fails():
    def mixing(x, batch):
        return sum_of_examples(x, batch) - x.mean(0)

    with pytest.raises(AssertionError, match="example 0: differs"):
        assert_batch_invariant(mixing, [torch.randn(n, 3) for n in (1, 5, 2)])


def test_a_function_that_pads_into_later_examples_fails():
    def last_is_wrong(x, batch):
        out = sum_of_examples(x, batch)
        out[-1] += 1e-2 * (len(out) > 1)
        return out

    with pytest.raises(AssertionError, match="example 2: differs"):
        assert_batch_invariant(last_is_wrong, [torch.ones(n, 3) for n in (1, 5, 2)])


@pytest.mark.parametrize("examples", [[], [torch.zeros(2, 3), torch.zeros(0, 3)]])
def test_examples_without_tokens_are_refused(examples):
    with pytest.raises(ValueError, match="at least one token each"):
        assert_batch_invariant(sum_of_examples, examples)


# Relations ########################################################################


def test_random_relations():
    relation = random_relation(6, 4, 50, seed=3)
    assert relation.size == (6, 4)
    assert relation.num_edges == 50
    edges = [tuple(edge) for edge in relation.edge_index.T.tolist()]
    assert len(set(edges)) < 50
    assert torch.equal(random_relation(6, 4, 50, seed=3).edge_index, relation.edge_index)
    assert not torch.equal(random_relation(6, 4, 50, seed=4).edge_index, relation.edge_index)


def test_random_relations_without_duplicates():
    relation = random_relation(6, 4, 50, is_unique=True)
    edges = [tuple(edge) for edge in relation.edge_index.T.tolist()]
    assert len(set(edges)) == len(edges) == relation.num_edges > 0


@pytest.mark.parametrize("size", [(0, 3), (3, 0), (0, 0)])
def test_random_relations_between_empty_sides(size):
    relation = random_relation(*size, 9)
    assert relation.size == size
    assert relation.num_edges == 0
