"""Edge attention: one contract for every backend, against an oracle on incidence matrices."""

import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import nsm_graph.ops.backend
from nsm_graph.ops.backend import HAS_TORCH_SCATTER
from nsm_graph.ops.cpu import threads
from nsm_graph.ops.edge_attention import (
    BACKENDS,
    edge_attention,
    edge_attention_weights,
    sparse,
)
from nsm_graph.relation import Relation
from nsm_graph.testing import assert_matches_reference, random_relation

HEADS, CHANNELS = 3, 4
NORMALISE = ("target", "source")
BIASES = ("none", "E", "E1", "EH", "E -inf", "EH -inf", "masked groups", "all masked")

# Sources and targets of each example.
COMPLETE = {
    "uniform": ([4, 4, 4], [3, 3, 3]),
    "one": ([1], [1]),
    "33 to 63": ([33], [63]),
    "63 to 33": ([63], [33]),
    "ragged": ([5, 2, 9], [3, 4, 1]),
    "ragged sources, uniform targets": ([5, 0, 2], [3, 3, 3]),
    "uniform sources, ragged targets": ([4, 4, 4], [1, 0, 3]),
    "ragged with empty sides": ([5, 0, 2, 0], [3, 2, 0, 0]),
    "thin": ([33, 1, 1], [1, 33, 1]),
    "no sources": ([0, 0], [2, 2]),
    "no targets": ([3, 2], [0, 0]),
    "sources and targets never meet": ([3, 0], [0, 2]),
    "empty examples": ([0, 0], [0, 0]),
    "no examples": ([], []),
}
# Nodes of each example.
CAUSAL = {
    "causal": [4, 4, 4],
    "causal, one node": [1],
    "causal, 63 nodes": [63],
    "causal, ragged": [5, 0, 2, 9, 1],
    "causal, thin": [33, 1, 1],
    "causal, no nodes": [0, 0],
    "causal, no examples": [],
}
# Number of sources, targets and edges; far more edges than pairs make duplicates, far fewer leave
# nodes alone.
GENERAL = {
    "nothing": (0, 0, 0),
    "no edges": (3, 2, 0),
    "one": (1, 1, 1),
    "one pair, many edges": (1, 1, 5),
    "sparse": (63, 33, 20),
    "33 to 63": (33, 63, 300),
    "duplicates": (5, 4, 80),
}


def complete(name):
    src, dst = COMPLETE[name]
    ptrs = (torch.tensor([0, *counts]).cumsum(0) for counts in (src, dst))
    return Relation.complete(*ptrs)


def causal(name):
    return Relation.causal(torch.tensor([0, *CAUSAL[name]]).cumsum(0))


def general(name):
    num_src, num_dst, num_edges = GENERAL[name]
    generator = torch.Generator().manual_seed(num_edges)
    edge_index = torch.stack(
        [
            torch.randint(max(num, 1), (num_edges,), generator=generator)
            for num in (num_src, num_dst)
        ]
    )
    return Relation.from_edge_index(edge_index, (num_src, num_dst))


def fixed_degree():
    """Every target has three of seven sources; stands by target."""
    index = torch.stack([torch.randperm(7)[:3].sort().values for _ in range(33)])
    return Relation.from_rows(index.flatten(), 3, (7, 33))


def inputs(relation, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(rows, HEADS, CHANNELS, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for rows in (relation.num_dst, relation.num_src, relation.num_src)
    ]


def bias_of(kind, relation, dtype=torch.float64):
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(2)
    columns = {"E": (), "E1": (1,)}.get(kind.split()[0], (HEADS,))
    shape = (relation.num_edges, *columns)
    bias = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind.endswith("-inf"):
        bias[torch.rand(shape, generator=generator) < 0.4] = -math.inf
    elif kind == "masked groups":
        # The first source and the first target lose all their edges, the next ones in one head.
        src, dst = relation.edge_index
        bias[(src == 0) | (dst == 0)] = -math.inf
        bias[(src == 1) | (dst == 1), 0] = -math.inf
    elif kind == "all masked":
        bias.fill_(-math.inf)
    return bias.to(dtype).requires_grad_()


def oracle_weights(q, k, edge_index, bias, normalise, scale):
    """Softmax through dense incidence matrices [E, nodes]; masked groups get zeros."""
    src, dst = edge_index
    leaves = torch.eye(k.size(0), dtype=q.dtype)[src]
    enters = torch.eye(q.size(0), dtype=q.dtype)[dst]
    q_edge = torch.einsum("en,nhd->ehd", enters, q)
    k_edge = torch.einsum("em,mhd->ehd", leaves, k)
    scores = scale * torch.einsum("ehd,ehd->eh", q_edge, k_edge)
    if bias is not None:
        scores = scores + (bias.unsqueeze(1) if bias.dim() == 1 else bias)
    group = enters if normalise == "target" else leaves
    highest = torch.zeros(group.size(1), q.size(1), dtype=q.dtype)
    for g in range(group.size(1)):
        members = scores.detach()[group[:, g] > 0]
        if len(members) > 0:
            highest[g] = members.amax(0).clamp(min=-1e300)
    numerator = (scores - group @ highest).exp()
    total = group.T @ numerator
    return numerator / (group @ torch.where(total > 0, total, 1.0))


def oracle(q, k, v, edge_index, bias=None, normalise="target", scale=CHANNELS**-0.5):
    weights = oracle_weights(q, k, edge_index, bias, normalise, scale)
    src, dst = edge_index
    leaves = torch.eye(k.size(0), dtype=q.dtype)[src]
    enters = torch.eye(q.size(0), dtype=q.dtype)[dst]
    return torch.einsum("en,eh,em,mhd->nhd", enters, weights, leaves, v)


def gradients(out, tensors):
    direction = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
    grads = torch.autograd.grad((out.double() * direction).sum(), tensors, allow_unused=True)
    return [None if g is None else g.double() for g in grads]


def equal(actual, expected, tolerance):
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


class Contract:
    """What every backend of edge attention promises. Subclasses name the backend."""

    backend = ""
    serves_general = True
    dtypes = {torch.float32: 1e-5, torch.bfloat16: 4e-2}

    def relations(self):
        yield from ((name, complete(name)) for name in COMPLETE)
        yield from ((name, causal(name)) for name in CAUSAL)
        if self.serves_general:
            yield from ((name, general(name)) for name in GENERAL)
            ragged = complete("ragged")
            yield "subset", ragged.subset(torch.arange(0, ragged.num_edges, 3))
            yield "reversed", general("sparse").reverse()
            yield "fixed degree", fixed_degree()

    def attend(self, *args, **options):
        return edge_attention(*args, backend=self.backend, **options)

    @pytest.mark.parametrize("kind", BIASES)
    @pytest.mark.parametrize("normalise", NORMALISE)
    def test_equals_the_oracle_with_every_gradient(self, normalise, kind):
        for name, relation in self.relations():
            q, k, v = inputs(relation)
            bias = bias_of(kind, relation)
            given = [q, k, v] if bias is None else [q, k, v, bias]
            out = self.attend(q, k, v, relation, bias=bias, normalise=normalise)
            expected = oracle(q, k, v, relation.edge_index, bias, normalise)
            torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10, msg=name)
            pairs = zip(gradients(out, given), gradients(expected, given), strict=True)
            for actual, wanted in pairs:
                torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-10, msg=name)

    @pytest.mark.parametrize("kind", ["none", "EH", "masked groups"])
    @pytest.mark.parametrize("normalise", NORMALISE)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_every_dtype_offered(self, dtype, normalise, kind):
        for _, relation in self.relations():
            q, k, v = inputs(relation, dtype)
            bias = bias_of(kind, relation, dtype)
            given = [q, k, v] if bias is None else [q, k, v, bias]
            out = self.attend(q, k, v, relation, bias=bias, normalise=normalise)
            assert out.dtype == dtype
            exact = [t.detach().double().requires_grad_() for t in given]
            wanted = oracle(*exact[:3], relation.edge_index, *exact[3:], normalise=normalise)
            tolerance = self.dtypes[dtype]
            assert (out.double() - wanted).norm() <= tolerance * wanted.norm()
            # By norm, over all gradients: a sum that cancels to zero has no relative precision.
            errors, norms = [], []
            pairs = zip(gradients(out, given), gradients(wanted, exact), strict=True)
            for actual, expected in pairs:
                errors.append((actual - expected).norm())
                norms.append(expected.norm())
            assert sum(errors) <= tolerance * sum(norms)

    @pytest.mark.parametrize("kind", ["none", "EH", "E -inf"])
    @pytest.mark.parametrize("normalise", NORMALISE)
    def test_equals_the_reference_by_the_public_assertion(self, normalise, kind):
        for _, relation in self.relations():
            q, k, v = inputs(relation, torch.float32)
            bias = bias_of(kind, relation, torch.float32)
            assert_matches_reference(
                self.backend, q, k, v, relation, bias=bias, normalise=normalise
            )

    @pytest.mark.parametrize("normalise", NORMALISE)
    def test_masked_edges_and_groups_give_exact_zeros_and_finite_gradients(self, normalise):
        relation = complete("ragged")
        q, k, v = inputs(relation, torch.float32)
        bias = bias_of("masked groups", relation, torch.float32)
        out = self.attend(q, k, v, relation, bias=bias, normalise=normalise)
        assert (out[0] == 0).all()
        assert (out[1, 0] == 0).all()
        assert (out[1, 1:] != 0).all()
        out.sum().backward()
        for tensor in (q, k, v, bias):
            assert tensor.grad.isfinite().all()
        assert (bias.grad[bias == -math.inf] == 0).all()
        assert (k.grad[0] == 0).all()
        assert (q.grad[0] == 0).all()

    @pytest.mark.parametrize("normalise", NORMALISE)
    def test_n12_huge_scores_stay_exact(self, normalise):
        # Whole numbers below 2**24: float32 holds every score exactly.
        relation = complete("ragged")
        generator = torch.Generator().manual_seed(3)
        q, k = (
            (torch.randint(-9, 10, (rows, HEADS, CHANNELS), generator=generator) * 100.0)
            for rows in relation.size[::-1]
        )
        v = torch.randn(relation.num_src, HEADS, CHANNELS, generator=generator)
        given = [t.requires_grad_() for t in (q, k, v)]
        out = self.attend(q, k, v, relation, normalise=normalise, scale=1.0)
        exact = [t.detach().double().requires_grad_() for t in given]
        wanted = oracle(*exact, relation.edge_index, normalise=normalise, scale=1.0)
        equal(out, wanted, 1e-6)
        assert all(g.isfinite().all() for g in gradients(out, given))

    @pytest.mark.parametrize("sign", [-1.0, 1.0])
    @pytest.mark.parametrize("normalise", NORMALISE)
    def test_n12_extreme_scores_stay_finite(self, normalise, sign):
        relation = complete("ragged")
        q, k, v = inputs(relation, torch.float32)
        bias = torch.full((relation.num_edges,), sign * 1e37)
        out = self.attend(q, k * 1e30, v, relation, bias=bias, normalise=normalise)
        assert out.isfinite().all()
        assert all(g.isfinite().all() for g in gradients(out, [q, v]))

    @pytest.mark.parametrize("normalise", NORMALISE)
    @pytest.mark.parametrize("scale", [0.0, 1.0, -2.5])
    def test_scale_replaces_the_root_of_the_channels(self, normalise, scale):
        for relation in (complete("ragged"), causal("causal, ragged")):
            q, k, v = inputs(relation)
            out = self.attend(q, k, v, relation, normalise=normalise, scale=scale)
            equal(out, oracle(q, k, v, relation.edge_index, None, normalise, scale), 1e-10)

    @pytest.mark.parametrize("kind", ["none", "EH", "E -inf"])
    @pytest.mark.parametrize("normalise", NORMALISE)
    def test_no_result_depends_on_memory_that_was_never_written(
        self, poisoned_memory, normalise, kind
    ):
        for _, relation in self.relations():
            q, k, v = inputs(relation)
            bias = bias_of(kind, relation)
            given = [q, k, v] if bias is None else [q, k, v, bias]
            out = self.attend(q, k, v, relation, bias=bias, normalise=normalise)
            assert out.isfinite().all()
            assert all(g.isfinite().all() for g in gradients(out, given))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("kind", ["none", "EH"])
    @pytest.mark.parametrize("normalise", NORMALISE)
    def test_a_broken_example_does_not_reach_its_neighbours(self, normalise, kind, bad):
        relation = Relation.complete([0, 3, 7, 9], [0, 2, 4, 7])
        q, k, v = inputs(relation)
        bias = bias_of(kind, relation)
        clean = self.attend(q, k, v, relation, bias=bias, normalise=normalise)
        for tensor, rows in ((q, slice(2, 4)), (k, slice(3, 7)), (v, slice(3, 7))):
            tensor.data[rows] = bad
        out = self.attend(q, k, v, relation, bias=bias, normalise=normalise)
        mine = torch.tensor([0, 1, 4, 5, 6])
        assert torch.equal(out[mine], clean[mine])
        dq, dk, dv = torch.autograd.grad(out[mine].sum(), [q, k, v])
        for grad, rows in ((dq, [0, 1, 4, 5, 6]), (dk, [0, 1, 2, 7, 8]), (dv, [0, 1, 2, 7, 8])):
            assert grad[rows].isfinite().all()

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("normalise", NORMALISE)
    def test_a_broken_causal_example_does_not_reach_its_neighbours(self, normalise, bad):
        relation = Relation.causal([0, 3, 7, 9])
        given = inputs(relation)
        clean = self.attend(*given, relation, normalise=normalise)
        for tensor in given:
            tensor.data[3:7] = bad
        out = self.attend(*given, relation, normalise=normalise)
        mine = torch.tensor([0, 1, 2, 7, 8])
        assert torch.equal(out[mine], clean[mine])
        for grad in torch.autograd.grad(out[mine].sum(), given):
            assert grad[mine].isfinite().all()

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_nothing_comes_from_sources_without_edges(self, bad):
        relation = complete("sources and targets never meet")
        q, k, v = inputs(relation)
        k.data.fill_(bad)
        v.data.fill_(bad)
        out = self.attend(q, k, v, relation)
        assert (out == 0).all()
        assert all((g == 0).all() for g in gradients(out, [q, k, v]))

    def test_examples_do_not_depend_on_their_neighbours(self):
        src, dst = [5, 2, 9, 1], [3, 4, 1, 2]
        ptrs = [torch.tensor([0, *counts]).cumsum(0) for counts in (src, dst)]
        relation = Relation.complete(*ptrs)
        q, k, v = inputs(relation, torch.float32)
        out = self.attend(q, k, v, relation)
        for b, (num_src, num_dst) in enumerate(zip(src, dst, strict=True)):
            alone = Relation.complete([0, num_src], [0, num_dst])
            rows_src = slice(int(ptrs[0][b]), int(ptrs[0][b + 1]))
            rows_dst = slice(int(ptrs[1][b]), int(ptrs[1][b + 1]))
            one = self.attend(q[rows_dst], k[rows_src], v[rows_src], alone)
            assert (out[rows_dst] - one).norm() <= 1e-5 * one.norm()

    def test_causal_examples_do_not_depend_on_their_neighbours(self):
        counts = CAUSAL["causal, ragged"]
        relation = causal("causal, ragged")
        given = inputs(relation, torch.float32)
        out = self.attend(*given, relation)
        split = zip(*(x.split(counts) for x in (out, *given)), strict=True)
        for rows, *mine in split:
            one = self.attend(*mine, Relation.causal([0, len(rows)]))
            assert (rows - one).norm() <= 1e-5 * one.norm()

    def test_a_causal_target_does_not_depend_on_what_comes_later(self):
        relation = causal("causal, 63 nodes")
        q, k, v = inputs(relation, torch.float32)
        out = self.attend(q, k, v, relation)
        for tensor in (q, k, v):
            tensor.data[40:] = 7.0
        assert torch.equal(self.attend(q, k, v, relation)[:40], out[:40])
        first = torch.autograd.grad(self.attend(q, k, v, relation)[:40].sum(), [k, v])
        assert all((grad[40:] == 0).all() for grad in first)

    @pytest.mark.parametrize("name", ["complete", "causal", "causal, ragged", "causal, no nodes"])
    def test_compiles_without_graph_breaks(self, name):
        torch.compiler.reset()  # one function may be compiled for few relations only
        relation = complete("ragged") if name == "complete" else causal(name)
        q, k, v = inputs(relation, torch.float32)
        compiled = torch.compile(edge_attention, backend="eager", fullgraph=True)
        eager = self.attend(q, k, v, relation)
        torch.testing.assert_close(compiled(q, k, v, relation, backend=self.backend), eager)


class Differentiable(Contract):
    """What backends promise that have derivatives of any order."""

    @pytest.mark.parametrize("with_bias", [False, True])
    @pytest.mark.parametrize("normalise", NORMALISE)
    @pytest.mark.parametrize("kind", ["complete", "causal", "general"])
    def test_first_and_second_derivatives(self, kind, normalise, with_bias):
        if kind == "complete":
            relation = Relation.complete([0, 2, 2, 3], [0, 1, 3, 4])
        elif kind == "causal":
            relation = Relation.causal([0, 3, 3, 4])
        else:
            # A duplicate edge, a source and a target alone.
            edges = torch.tensor([[0, 0, 1, 1, 2], [0, 0, 0, 1, 1]])
            relation = Relation.from_edge_index(edges, (4, 3))
        shapes = [(relation.num_dst, 2, 2), *[(relation.num_src, 2, 2)] * 2]
        if with_bias:
            shapes.append((relation.num_edges, 2))
        given = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

        def function(q, k, v, bias=None):
            return edge_attention(
                q, k, v, relation, bias=bias, normalise=normalise, backend=self.backend
            )

        assert gradcheck(function, given)
        assert gradgradcheck(function, given)

    @pytest.mark.parametrize("normalise", NORMALISE)
    def test_second_derivatives_of_inputs_that_hang_together(self, normalise):
        # A loss that is not linear, one tensor as key and value, a query made of the key.
        relation = general("duplicates")
        q, k, _ = inputs(relation)

        def second(attend):
            query = q + k.mean()
            out = attend(query, k, k, relation, normalise=normalise)
            first = torch.autograd.grad(out.square().sum(), [query, k], create_graph=True)
            return torch.autograd.grad(sum(x.square().sum() for x in first), [q, k])

        def wanted(query, key, value, relation, normalise):
            return oracle(query, key, value, relation.edge_index, normalise=normalise)

        for actual, expected in zip(second(self.attend), second(wanted), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)

    def test_masked_edges_have_second_derivatives(self):
        relation = Relation.complete([0, 3], [0, 2])
        q, k, v = (torch.randn(n, 1, 2, dtype=torch.float64, requires_grad=True) for n in (2, 3, 3))
        bias = torch.tensor([0.0, -math.inf, 1.0, -math.inf, -math.inf, -math.inf])

        def function(q, k, v):
            return edge_attention(q, k, v, relation, bias=bias, backend=self.backend)

        assert gradcheck(function, [q, k, v])
        assert gradgradcheck(function, [q, k, v])


class TestReference(Differentiable):
    backend = "reference"


class TestSparse(Differentiable):
    backend = "sparse"

    def test_nothing_per_edge_and_channel_is_kept_for_backward(self):
        relation = random_relation(200, 100, 5000)
        q, k, v = inputs(relation, torch.float32)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            self.attend(q, k, v, relation)
        assert max(x.numel() for x in kept) <= max(relation.num_edges, 200) * HEADS

    def test_any_number_of_threads_gives_the_same_bits(self, monkeypatch):
        monkeypatch.setattr(threads, "MIN_WORK", 0)
        relation = random_relation(300, 200, 3000)
        results = []
        for num_threads in (1, 2, 3, 16):
            torch.set_num_threads(num_threads)
            try:
                q, k, v = inputs(relation, torch.float32)
                out = self.attend(q, k, v, relation)
                results.append([out, *torch.autograd.grad(out.square().sum(), [q, k, v])])
            finally:
                torch.set_num_threads(1)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_many_python_threads_may_call_at_once(self, monkeypatch):
        monkeypatch.setattr(threads, "MIN_WORK", 0)
        relation = random_relation(300, 200, 3000)
        q, k, v = inputs(relation, torch.float32)
        expected = self.attend(q, k, v, relation)
        torch.set_num_threads(2)
        try:
            with ThreadPoolExecutor(8) as pool:
                calls = [pool.submit(self.attend, q, k, v, relation) for _ in range(64)]
                assert all(torch.equal(call.result(), expected) for call in calls)
        finally:
            torch.set_num_threads(1)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    def test_a_forked_process_gets_the_same(self, monkeypatch):
        monkeypatch.setattr(threads, "MIN_WORK", 0)
        relation = random_relation(300, 200, 3000)
        q, k, v = (x.detach() for x in inputs(relation, torch.float32))
        torch.set_num_threads(2)
        try:
            expected = self.attend(q, k, v, relation)  # its threads exist before the fork
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork
                child = os.fork()
            if child == 0:
                same = torch.equal(self.attend(q, k, v, relation), expected)
                os._exit(0 if same else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        finally:
            torch.set_num_threads(1)

    def test_views_in_any_layout(self):
        relation = general("33 to 63")
        q, k, v = inputs(relation, torch.float32)
        expected = self.attend(q, k, v, relation)
        packed = torch.stack([k, v], dim=-1).detach().requires_grad_()
        turned = q.permute(2, 0, 1).contiguous().detach().requires_grad_()
        out = self.attend(turned.permute(1, 2, 0), packed[..., 0], packed[..., 1], relation)
        assert torch.equal(out, expected)
        wanted = torch.autograd.grad(expected.square().sum(), [q, k, v])
        dq, dkv = torch.autograd.grad(out.square().sum(), [turned, packed])
        actual = [dq.permute(1, 2, 0), dkv[..., 0], dkv[..., 1]]
        assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))

    def test_only_some_inputs_want_gradients(self):
        relation = general("33 to 63")
        full = inputs(relation, torch.float32)
        out = self.attend(*full, relation)
        wanted = torch.autograd.grad(out.square().sum(), full)
        for i in range(3):
            given = [x.detach() for x in full]
            given[i].requires_grad_()
            out = self.attend(*given, relation)
            assert torch.equal(torch.autograd.grad(out.square().sum(), given[i])[0], wanted[i])
        assert not self.attend(*(x.detach() for x in full), relation).requires_grad

    def test_an_input_changed_before_backward_is_noticed(self):
        relation = general("33 to 63")
        q, k, v = inputs(relation, torch.float32)
        key = k * 1
        out = self.attend(q, key, v, relation)
        key.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    @pytest.mark.parametrize("channels", [1, 2, 7, 8, 15, 16, 17, 31, 33, 80])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_any_number_of_channels(self, channels, dtype):
        relation = general("33 to 63")
        q, k, v = (torch.randn(n, 2, channels, dtype=dtype) for n in (63, 33, 33))
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        for normalise in NORMALISE:
            assert_matches_reference(
                self.backend, q, k, v, relation, normalise=normalise, tolerance=tolerance
            )

    def test_rows_of_very_different_degrees(self):
        src = torch.randint(50, (2000,))
        dst = torch.cat([torch.zeros(1500, dtype=torch.long), torch.randint(40, (500,))])
        relation = Relation.from_edge_index(torch.stack([src, dst]), (50, 40))
        q, k, v = inputs(relation, torch.float32)
        for normalise in NORMALISE:
            assert_matches_reference(self.backend, q, k, v, relation, normalise=normalise)

    def test_the_operations_are_what_torch_expects_of_operations(self):
        relation = general("duplicates")
        q, k, v = inputs(relation)
        for bias in (None, bias_of("EH", relation)):
            arguments = (q, k, v, bias, *relation.csr, *relation.csc, False, 0.5)
            torch.library.opcheck(sparse._attend, arguments)

    def test_compiled_code_has_gradients_without_a_break(self):
        torch.compiler.reset()
        relation = general("33 to 63")
        q, k, v = inputs(relation, torch.float32)
        compiled = torch.compile(edge_attention, backend="aot_eager", fullgraph=True)
        out = compiled(q, k, v, relation, backend=self.backend)
        eager = self.attend(q, k, v, relation)
        assert torch.equal(out, eager)
        for actual, wanted in zip(
            torch.autograd.grad(out.square().sum(), [q, k, v]),
            torch.autograd.grad(eager.square().sum(), [q, k, v]),
            strict=True,
        ):
            torch.testing.assert_close(actual, wanted)


class TestDense(Contract):
    backend = "dense"
    serves_general = False

    def test_refuses_general_edges(self):
        relation = general("one")
        with pytest.raises(ValueError, match='"dense" needs a complete relation'):
            self.attend(*inputs(relation), relation)


class TestDenseOneByOne(TestDense):
    """Causal examples as if they were long: each by itself, without padding."""

    @pytest.fixture(autouse=True)
    def short_examples_count_as_long(self, monkeypatch):
        monkeypatch.setattr(nsm_graph.ops.backend, "MIN_CAUSAL_EDGES", 0)
        monkeypatch.setattr(nsm_graph.ops.backend, "MIN_CAUSAL_FILL", 2.0)

    def relations(self):
        yield from ((name, causal(name)) for name in CAUSAL)

    def test_no_row_is_padded(self, monkeypatch):
        relation = causal("causal, ragged")
        monkeypatch.setattr(type(relation.sources), "pad", None)
        self.attend(*inputs(relation), relation)
        assert nsm_graph.ops.backend.is_one_by_one(relation)


@pytest.mark.skipif(not HAS_TORCH_SCATTER, reason="torch-scatter is not installed")
class TestSegmentCsr(Contract):
    backend = "segment_csr"

    def test_compiles_without_graph_breaks(self):
        pytest.skip("eager only")


def test_the_contract_covers_every_backend():
    covered = {
        test.backend for test in (*Contract.__subclasses__(), *Differentiable.__subclasses__())
    }
    assert covered - {""} == set(BACKENDS)


def test_duplicate_edges_count_twice():
    once = Relation.from_edge_index(torch.tensor([[0, 1], [0, 0]]), (2, 1))
    twice = Relation.from_edge_index(torch.tensor([[0, 1, 0], [0, 0, 0]]), (2, 1))
    q, k, v = inputs(once)
    log_two = torch.tensor([math.log(2), 0.0])
    out = edge_attention(q, k, v, twice)
    torch.testing.assert_close(out, edge_attention(q, k, v, once, bias=log_two))
    assert not torch.allclose(out, edge_attention(q, k, v, once))


def test_the_order_of_edges_changes_nothing():
    relation = general("33 to 63")
    q, k, v = inputs(relation)
    bias = bias_of("EH -inf", relation)
    order = torch.randperm(relation.num_edges)
    shuffled = Relation.from_edge_index(relation.edge_index[:, order], relation.size)
    for normalise in NORMALISE:
        out = edge_attention(q, k, v, relation, bias=bias, normalise=normalise)
        other = edge_attention(q, k, v, shuffled, bias=bias[order], normalise=normalise)
        torch.testing.assert_close(out, other)


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("normalise", NORMALISE)
def test_weights_equal_the_oracle(normalise, kind):
    cases = [complete(name) for name in COMPLETE] + [general(name) for name in GENERAL]
    cases += [causal(name) for name in CAUSAL]
    for relation in cases:
        q, k, _ = inputs(relation)
        bias = bias_of(kind, relation)
        weights = edge_attention_weights(q, k, relation, bias=bias, normalise=normalise)
        expected = oracle_weights(q, k, relation.edge_index, bias, normalise, CHANNELS**-0.5)
        torch.testing.assert_close(weights, expected, rtol=1e-10, atol=1e-12)


def test_weights_sum_to_one_in_every_group_that_has_an_edge():
    relation = general("sparse")
    q, k, _ = inputs(relation)
    for end, normalise in ((1, "target"), (0, "source")):
        weights = edge_attention_weights(q, k, relation, normalise=normalise)
        for node in relation.edge_index[end].unique():
            total = weights[relation.edge_index[end] == node].sum(0)
            torch.testing.assert_close(total, torch.ones_like(total))


def test_weights_take_the_scale():
    relation = general("sparse")
    q, k, _ = inputs(relation)
    weights = edge_attention_weights(q, k, relation, scale=0.3)
    expected = oracle_weights(q, k, relation.edge_index, None, "target", 0.3)
    torch.testing.assert_close(weights, expected)


edge_lists = st.integers(1, 6).flatmap(
    lambda m: st.integers(1, 6).flatmap(
        lambda n: st.tuples(
            st.just((m, n)),
            st.lists(st.tuples(st.integers(0, m - 1), st.integers(0, n - 1)), max_size=12),
        )
    )
)


@given(edge_lists, st.sampled_from(NORMALISE), st.data())
def test_any_edges_equal_the_oracle(case, normalise, data):
    size, edges = case
    edge_index = torch.tensor(edges, dtype=torch.long).view(-1, 2).T
    relation = Relation.from_edge_index(edge_index, size)
    values = st.sampled_from([0.0, -math.inf, 3.0, -800.0])
    bias = torch.tensor(
        data.draw(st.lists(values, min_size=len(edges), max_size=len(edges))), dtype=torch.float64
    )
    q, k, v = inputs(relation)
    out = edge_attention(q, k, v, relation, bias=bias, normalise=normalise)
    expected = oracle(q, k, v, relation.edge_index, bias, normalise)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=5),
    st.sampled_from(NORMALISE),
    st.sampled_from(["dense", None]),
    st.booleans(),
)
def test_any_complete_relation_equals_the_oracle(counts, normalise, backend, with_bias):
    assume(any(src * dst for src, dst in counts) or backend == "dense")
    ptrs = [[0], [0]]
    for pair in counts:
        for ptr, count in zip(ptrs, pair, strict=True):
            ptr.append(ptr[-1] + count)
    relation = Relation.complete(*ptrs)
    bias = bias_of("EH -inf" if with_bias else "none", relation, torch.float32)
    q, k, v = inputs(relation, torch.float32)
    out = edge_attention(q, k, v, relation, bias=bias, normalise=normalise, backend=backend)
    exact = [t.double() for t in (q, k, v)]
    bias = None if bias is None else bias.double()
    equal(out, oracle(*exact, relation.edge_index, bias, normalise), 1e-5)


def triangle_oracle(q, k, v, counts, normalise):
    """Masked softmax of each example's square of scores: no edges, no relation."""
    rows = zip(*(x.split(counts) for x in (q, k, v)), strict=True)
    out = [q[:0]]
    for q_NHD, k_NHD, v_NHD in rows:
        scores = torch.einsum("nhd,mhd->hnm", q_NHD, k_NHD) * CHANNELS**-0.5
        hears = torch.arange(len(q_NHD)) <= torch.arange(len(q_NHD))[:, None]
        scores = torch.where(hears, scores, -math.inf)
        weights = scores.softmax(-1 if normalise == "target" else -2)
        out.append(torch.einsum("hnm,mhd->nhd", weights, v_NHD))
    return torch.cat(out)


@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=5),
    st.sampled_from(NORMALISE),
    st.sampled_from(["dense", "sparse", "reference", None]),
    st.booleans(),
)
def test_any_causal_relation_equals_the_masked_softmax(counts, normalise, backend, one_by_one):
    relation = Relation.causal(torch.tensor([0, *counts]).cumsum(0))
    given = inputs(relation, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        if one_by_one:
            patch.setattr(nsm_graph.ops.backend, "MIN_CAUSAL_EDGES", 0)
            patch.setattr(nsm_graph.ops.backend, "MIN_CAUSAL_FILL", 2.0)
        out = edge_attention(*given, relation, normalise=normalise, backend=backend)
    exact = [t.detach().double().requires_grad_() for t in given]
    wanted = triangle_oracle(*exact, counts, normalise)
    equal(out, wanted, 1e-5)
    for actual, expected in zip(gradients(out, given), gradients(wanted, exact), strict=True):
        equal(actual, expected, 1e-5)


def arguments(**changes):
    given = {
        "query": torch.zeros(2, 3, 4),
        "key": torch.zeros(5, 3, 4),
        "value": torch.zeros(5, 3, 4),
        "relation": Relation.complete([0, 5], [0, 2]),
    }
    return {**given, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalise": "both"}, 'normalise must be "target" or "source", but is \'both\''),
        ({"query": torch.zeros(2, 12)}, r"query must have shape .* but has \(2, 12\)"),
        ({"key": torch.zeros(5)}, r"key must have shape .* but has \(5,\)"),
        ({"value": torch.zeros(1, 5, 3, 4)}, "value must have shape"),
        ({"key": torch.zeros(5, 3, 4).double()}, "key has dtype torch.float64, but query"),
        ({"value": torch.zeros(5, 3, 4).half()}, "value has dtype torch.float16, but query"),
        ({"value": torch.zeros(5, 3, 4, device="meta")}, "value is on meta, but query is on cpu"),
        ({"key": torch.zeros(5, 2, 4)}, "must agree in heads"),
        ({"key": torch.zeros(5, 3, 2)}, "query and key in channels"),
        ({"value": torch.zeros(4, 3, 4)}, "key and value in rows"),
        ({"value": torch.zeros(5, 3, 2)}, "value has 2 channels a head, but query has 4"),
        ({"query": torch.zeros(3, 3, 4)}, "relation goes to 2 nodes, .* have 3 rows"),
        (
            {"key": torch.zeros(6, 3, 4), "value": torch.zeros(6, 3, 4)},
            "relation goes from 5 nodes, .* have 6 rows",
        ),
        ({"relation": Relation.complete([0, 5], [0, 2]).to("meta")}, "relation is on meta"),
        ({"bias": torch.zeros(9)}, r"bias must have shape \(10,\), .* but has \(9,\)"),
        ({"bias": torch.zeros(10, 2)}, r"\(10, 3\), but has \(10, 2\)"),
        ({"bias": torch.zeros(10, 3, 1)}, "bias must have shape"),
        ({"bias": torch.zeros(10, dtype=torch.bool)}, "bias must be floating point .* torch.bool"),
        (
            {"bias": torch.zeros(10, device="meta")},
            "bias must be floating point on cpu, .* on meta",
        ),
        ({"backend": "fast"}, "backend must be one of .*'reference'.* but is 'fast'"),
    ],
)
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        edge_attention(**arguments(**changes))


def test_integers_and_zero_channels_are_refused():
    whole = {name: arguments()[name].long() for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match=r"must be floating point, but are torch\.int64"):
        edge_attention(**arguments(**whole))
    flat = {name: arguments()[name][..., :0] for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match="has no channels"):
        edge_attention(**arguments(**flat))
    with pytest.raises(ValueError, match="bias must have shape"):
        edge_attention_weights(
            torch.zeros(2, 3, 4),
            torch.zeros(5, 3, 4),
            Relation.complete([0, 5], [0, 2]),
            bias=torch.zeros(3),
        )
