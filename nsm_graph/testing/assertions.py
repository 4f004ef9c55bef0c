"""Assertions that users can call on layers of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nsm_graph.ops.edge_attention import Normalise, edge_attention
from nsm_graph.relation import Relation


def assert_close_to_norm(
    actual: Tensor, expected: Tensor, tolerance: float, name: str = ""
) -> None:
    """Raises unless ``|actual - expected| <= tolerance * |expected|``, in the euclidean norm."""
    if actual.shape != expected.shape:
        raise AssertionError(
            f"{name}: expected shape {tuple(expected.shape)}, but got {tuple(actual.shape)}"
        )
    error = (actual.double() - expected.double()).norm()
    bound = tolerance * expected.double().norm()
    # A NaN on either side is no equality: it must not pass.
    if not bool(error <= bound):
        raise AssertionError(
            f"{name}: differs by {error:.3e}, but at most {bound:.3e} is allowed "
            f"({tolerance:.0e} of the norm)"
        )


def assert_matches_reference(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    relation: Relation,
    *,
    bias: Tensor | None = None,
    normalise: Normalise = "target",
    tolerance: float = 1e-5,
) -> None:
    """Raises unless a backend of edge attention equals the reference, every gradient included."""
    results = []
    for name in (backend, "reference"):
        q, k, v = (t.detach().clone().requires_grad_() for t in (query, key, value))
        given = None if bias is None else bias.detach().clone().requires_grad_()
        out = edge_attention(q, k, v, relation, bias=given, normalise=normalise, backend=name)
        # A direction without symmetry, in which errors that add up to zero cannot hide.
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        out.backward(direction.to(out))
        grads = [q.grad, k.grad, v.grad] + ([] if given is None else [given.grad])
        results.append([out, *grads])
    names = ("output", "query gradient", "key gradient", "value gradient", "bias gradient")
    for name, actual, expected in zip(names, *results, strict=False):
        if actual is None or expected is None:
            raise AssertionError(f"{name}: a backend gave none")
        if name != "output" and name != "value gradient":
            # A softmax over one edge does not depend on its score. A backend then gives exact
            # zeros, or the difference of two equal terms, each rounded once.
            terms = direction.norm() * value.norm()
            if name != "bias gradient":
                terms = terms * (key if name == "query gradient" else query).norm()
            noise = torch.finfo(query.dtype).eps * terms
            if bool(actual.norm() <= noise) and bool(expected.norm() <= noise):
                continue
        assert_close_to_norm(actual, expected, tolerance, f"{backend}, {name}")


def assert_batch_invariant(
    function: Callable[[Tensor, Tensor], Tensor],
    examples: Sequence[Tensor],
    tolerance: float = 1e-5,
) -> None:
    """Raises unless each example gets alone what it gets in the batch.

    Args:
        function: Takes (x, batch), gives one row per example.
        examples: The tokens of each example, ``[L_b, C]``; at least one token each, because
            ``batch`` cannot tell of examples without any.
        tolerance: Share of the norm by which results may differ.
    """
    if not examples or min(len(x) for x in examples) == 0:
        raise ValueError("examples must be a sequence of tensors with at least one token each")
    x_all = torch.cat(list(examples))
    lengths = torch.tensor([len(x) for x in examples], device=x_all.device)
    batch = torch.repeat_interleave(lengths)
    together = function(x_all, batch)
    for i, x in enumerate(examples):
        alone = function(x, torch.zeros(len(x), dtype=torch.long, device=x.device))
        assert_close_to_norm(together[i], alone[0], tolerance, f"example {i}")


def random_relation(
    num_src: int, num_dst: int, num_edges: int, *, seed: int = 0, is_unique: bool = False
) -> Relation:
    """A general relation with edges drawn at random; duplicates may occur unless refused."""
    generator = torch.Generator().manual_seed(seed)
    if num_src == 0 or num_dst == 0:
        num_edges = 0
    src = torch.randint(max(num_src, 1), (num_edges,), generator=generator)
    dst = torch.randint(max(num_dst, 1), (num_edges,), generator=generator)
    edge_index = torch.stack([src, dst])
    if is_unique:
        edge_index = edge_index.unique(dim=1)
    return Relation.from_edge_index(edge_index, (num_src, num_dst))
