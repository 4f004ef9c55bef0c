"""Edge attention's kernels for GPUs, against a dense oracle in float64.

Triton's interpreter runs them on a CPU, if it is told so before the kernels are made. So without a
GPU the tests of `TestKernels` run in a process of their own, which one test here starts; with one
they run here. What an interpreter cannot see, that they compile, is tested without it.
"""

import itertools
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from triton_compiler import Compiles

from nsm_graph.edge_lists import CompressedEdges
from nsm_graph.ops import explain
from nsm_graph.ops.edge_attention import edge_attention, sparse
from nsm_graph.relation import Relation

HAS_GPU = torch.cuda.is_available()
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if HAS_GPU and not INTERPRETS else "cpu"
NORMALISE = ("target", "source")

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def general(num_src, num_dst, num_edges, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ends = [
        torch.randint(max(num, 1), (num_edges,), generator=generator) for num in (num_src, num_dst)
    ]
    return Relation.from_edge_index(torch.stack(ends), (num_src, num_dst))


def with_degrees(degrees, num_src, seed=0):
    """Every target has as many edges as it is told; the first source has most of them."""
    generator = torch.Generator().manual_seed(seed)
    dst = torch.arange(len(degrees)).repeat_interleave(torch.tensor(degrees))
    src = (torch.rand(dst.shape, generator=generator) ** 3 * num_src).long()
    order = torch.randperm(len(dst), generator=generator)
    return Relation.from_edge_index(torch.stack([src, dst])[:, order], (num_src, len(degrees)))


def inputs(relation, heads=3, channels=5, dtype=torch.float64, columns=None, removed=0.0):
    """Query, key, value and, with columns, a bias that removes some edges."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(rows, heads, channels) for rows in (relation.num_dst, *[relation.num_src] * 2)]
    if columns is not None:
        shapes.append((relation.num_edges, columns))
    given = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    if columns is not None:
        given[3][torch.rand(shapes[3], generator=generator) < removed] = -math.inf
    return [x.to(DEVICE, dtype).requires_grad_() for x in given]


def oracle(q, k, v, edge_index, bias=None, normalise="target", scale=None):
    """Every edge beside every other, ``[E, E]``: who shares my group?"""
    src, dst = edge_index
    scale = q.size(-1) ** -0.5 if scale is None else scale
    scores = (q[dst] * k[src]).sum(-1) * scale
    if bias is not None:
        scores = scores + bias
    group = dst if normalise == "target" else src
    is_same = (group[:, None] == group[None, :]).to(q.dtype)
    away = is_same.log().unsqueeze(-1)  # 0, or -inf
    highest = (scores.detach() + away).amax(1) if len(src) > 0 else scores.detach()
    terms = (scores - highest.clamp(min=torch.finfo(q.dtype).min)).exp()
    total = is_same @ terms
    weights = terms / torch.where(total > 0, total, 1.0)
    return torch.zeros_like(q).index_add(0, dst, weights.unsqueeze(-1) * v[src])


def results(attend, given, *args, **options):
    """Output and all gradients in float64 on the CPU."""
    q, k, v, *bias = given
    out = attend(q, k, v, *args, bias=bias[0] if bias else None, **options)
    direction = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
    grads = torch.autograd.grad(out, given, direction.to(out), allow_unused=True)
    return [x.detach().cpu().double() for x in (out, *grads)]


def wanted(given, relation, **options):
    exact = [x.detach().cpu().double().requires_grad_() for x in given]
    return results(oracle, exact, relation.edge_index.cpu(), **options)


def ours(given, relation, **options):
    return results(edge_attention, given, relation.to(DEVICE), backend="sparse", **options)


def assert_equals_oracle(given, relation, tolerance=1e-10, **options):
    pairs = zip(ours(given, relation, **options), wanted(given, relation, **options), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class TestKernels:
    __test__ = HAS_GPU or INTERPRETS

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        """The module of the passes, which serve the interpreter's CPU tensors, too."""
        from nsm_graph.ops.edge_attention import gpu

        monkeypatch.setattr(sparse, "_on_gpu", lambda x: True)
        return gpu

    @pytest.fixture
    def cuts(self, gpu, monkeypatch):
        """Rows of two heads of three channels are cut after four edges."""
        monkeypatch.setattr(gpu, "MAX_BLOCKS", 1)
        monkeypatch.setattr(gpu, "PER_WARP", 8)

    @pytest.mark.parametrize(
        ("size", "heads", "columns"),
        [
            ((0, 0, 0), 2, None),
            ((3, 2, 0), 2, 2),
            ((0, 2, 0), 2, None),
            ((3, 0, 0), 2, 2),
            ((1, 1, 1), 3, None),
            ((1, 1, 5), 3, 3),
            ((33, 63, 90), 2, None),
            ((63, 33, 90), 3, 3),
            ((4, 3, 30), 3, 1),
        ],
    )
    @pytest.mark.parametrize("normalise", NORMALISE)
    def test_equals_the_oracle_with_every_gradient(self, normalise, size, heads, columns):
        # Few edges leave nodes alone, many are duplicates.
        relation = general(*size)
        given = inputs(relation, heads, columns=columns, removed=0.3)
        assert_equals_oracle(given, relation, normalise=normalise)

    @pytest.mark.parametrize("columns", [None, 1, 2])
    @pytest.mark.parametrize("normalise", NORMALISE)
    def test_long_rows_are_cut(self, cuts, normalise, columns):
        relation = with_degrees([9, 0, 4, 6, 1], 4)
        given = inputs(relation, 2, 3, columns=columns, removed=0.3)
        assert_equals_oracle(given, relation, normalise=normalise)

    def test_every_cut_is_put_together_again(self, gpu, cuts):
        # Weights of equal scores: each row counts its edges and averages their values.
        for degrees in itertools.product([0, 5, 11], [4, 9], [0, 5]):
            relation = with_degrees(degrees, 2)
            src, dst = relation.edge_index
            value = torch.arange(1.0, 13.0).view(2, 2, 3)
            given = [x.to(DEVICE) for x in (torch.zeros(3, 2, 3), torch.zeros(2, 2, 3), value)]
            edges = relation.to(DEVICE)
            out, stats = gpu.forward(*given, None, edges.csr, edges.csc, False, 1.0)
            degree = torch.tensor(degrees).clamp(min=1).float()
            torch.testing.assert_close(1 / stats[:, 1, 1].cpu(), degree)
            total = torch.zeros(3, 2, 3).index_add(0, dst, value[src])
            torch.testing.assert_close(out.cpu(), total / degree.view(3, 1, 1))

    def test_a_row_is_found_among_many(self, gpu, cuts):
        # More rows than are looked at at once, some of them empty.
        relation = with_degrees([0] * 40 + [1, 0] * 10 + [9, 0, 2, 7] + [0] * 20, 5)
        q, k, v = (x.detach() for x in inputs(relation, 2, 3))
        edges = relation.to(DEVICE)
        out, _ = gpu.forward(q, k, v, None, edges.csr, edges.csc, False, 0.5)
        expected = oracle(q.cpu(), k.cpu(), v.cpu(), relation.edge_index, scale=0.5)
        torch.testing.assert_close(out.cpu(), expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("normalise", NORMALISE)
    @pytest.mark.parametrize("is_cut", [False, True])
    @pytest.mark.parametrize(
        ("relation", "degrees"),
        [
            (Relation.complete([0, 6], [0, 2]), (6, 2)),
            (Relation.from_rows(torch.tensor([0, 1, 4, 0, 2, 4]), 3, (5, 2)), (3, 0)),
        ],
    )
    def test_a_fixed_degree_needs_no_pointers(
        self, monkeypatch, request, normalise, is_cut, relation, degrees
    ):
        if is_cut:
            request.getfixturevalue("cuts")
        given = inputs(relation, 2, 3, columns=2)
        assert sparse._degrees(relation) == degrees
        actual = ours(given, relation, normalise=normalise)
        monkeypatch.setattr(sparse, "_degrees", lambda relation: (0, 0))
        general = ours(given, relation, normalise=normalise)
        assert all(torch.equal(a, b) for a, b in zip(actual, general, strict=True))
        for a, b in zip(actual, wanted(given, relation, normalise=normalise), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize(
        ("heads", "channels"), [(1, 1), (2, 2), (5, 7), (3, 16), (2, 33), (3, 130)]
    )
    def test_any_number_of_heads_and_channels(self, heads, channels):
        relation = general(3, 2, 6)
        assert_equals_oracle(inputs(relation, heads, channels, columns=heads), relation)

    @pytest.mark.parametrize("normalise", NORMALISE)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_errs_no_more_than_torch_does_twice(self, dtype, normalise):
        relation = general(5, 4, 40)
        given = inputs(relation, 2, 16, dtype, columns=2)
        actual = ours(given, relation, normalise=normalise)
        exact = wanted(given, relation, normalise=normalise)
        plain = results(oracle, given, relation.edge_index.to(DEVICE), normalise=normalise)
        for a, b, x in zip(actual, plain, exact, strict=True):
            bound = 2 * (b - x).abs().max() + torch.finfo(dtype).eps / 4
            assert (a - x).abs().max() <= bound

    def test_results_have_the_dtypes_of_what_they_belong_to(self):
        relation = general(3, 2, 6)
        given = inputs(relation, dtype=torch.bfloat16, columns=1)
        out = edge_attention(
            *given[:3], relation.to(DEVICE), bias=given[3].float(), backend="sparse"
        )
        assert out.dtype == torch.bfloat16
        grads = torch.autograd.grad(out.float().square().sum(), given)
        assert {x.dtype for x in grads} == {torch.bfloat16}
        assert grads[3].shape == (6, 1)

    @pytest.mark.parametrize("normalise", NORMALISE)
    def test_groups_without_edges_give_exact_zeros(self, normalise):
        relation = Relation.from_edge_index(torch.tensor([[0, 0, 1, 2], [0, 1, 1, 0]]), (4, 3))
        q, k, v, bias = inputs(relation, 2, columns=2)
        bias.data[0] = bias.data[1] = bias.data[3] = -math.inf
        bias.data[2, 0] = -math.inf
        out, dq, dk, dv, dbias = ours([q, k, v, bias], relation, normalise=normalise)
        assert (out[[0, 2]] == 0).all() and (out[1, 0] == 0).all() and (out[1, 1] != 0).all()
        assert (dq[[0, 2]] == 0).all() and (dk[[0, 2, 3]] == 0).all() and (dv[[0, 2, 3]] == 0).all()
        assert (dbias == 0).all()

    @pytest.mark.parametrize("normalise", NORMALISE)
    @pytest.mark.parametrize("is_cut", [False, True])
    def test_no_result_depends_on_memory_that_was_never_written(
        self, poisoned_memory, request, normalise, is_cut
    ):
        if is_cut:
            request.getfixturevalue("cuts")
        relation = with_degrees([9, 0, 3], 3)
        given = inputs(relation, 2, 3, torch.float32, columns=1)
        assert all(x.isfinite().all() for x in ours(given, relation, normalise=normalise))

    @pytest.mark.parametrize("normalise", NORMALISE)
    def test_the_same_bits_every_time(self, cuts, normalise):
        relation = with_degrees([9, 0, 3], 3)
        given = inputs(relation, 2, 3, torch.float32, columns=2)
        first = ours(given, relation, normalise=normalise)
        for _ in range(100 if DEVICE == "cuda" else 1):
            again = ours(given, relation, normalise=normalise)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of the interpreter
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("normalise", NORMALISE)
    def test_a_broken_example_does_not_reach_its_neighbours(self, normalise, bad):
        # The broken one comes first: lanes without an edge look at row 0.
        src, dst = torch.tensor([0, 1, 1, 2, 3, 3]), torch.tensor([0, 0, 1, 2, 2, 3])
        relation = Relation.from_edge_index(torch.stack([src, dst]), (4, 4))
        q, k, v = inputs(relation, 2, 3)
        clean = ours([q, k, v], relation, normalise=normalise)
        for x in (q, k, v):
            x.data[:2] = bad
        broken = ours([q, k, v], relation, normalise=normalise)
        assert all(torch.equal(a[2:], b[2:]) for a, b in zip(clean, broken, strict=True))

    @pytest.mark.parametrize("normalise", NORMALISE)
    def test_ties_of_huge_scores_share_their_weight(self, normalise):
        # Beside 2**24 the logarithm of 2 is lost in float32.
        relation = Relation.from_edge_index(torch.tensor([[0, 1, 0], [0, 0, 1]]), (2, 2))
        q, k = (torch.full((2, 1, 1), 2.0**12, device=DEVICE) for _ in range(2))
        v = torch.tensor([1.0, 3.0], device=DEVICE).view(2, 1, 1)
        given = [x.requires_grad_() for x in (q, k, v)]
        assert_equals_oracle(given, relation, 1e-6, normalise=normalise, scale=1.0)

    def test_scale_replaces_the_root_of_the_channels(self):
        relation = general(3, 2, 6)
        for scale in (0.0, -2.7):
            assert_equals_oracle(inputs(relation), relation, scale=scale)

    def test_rows_beyond_the_reach_of_32_bits(self, gpu):
        channels, row = 64, 2**31 // 64 + 5
        large = torch.empty(row + 1, 1, channels, dtype=torch.float16, device=DEVICE)
        large[row] = torch.arange(channels).to(large)
        ptr = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
        edges = CompressedEdges(ptr, ptr[:1] + row, ptr[:1].long())
        q = torch.ones(1, 1, channels, dtype=torch.float16, device=DEVICE)
        out, _ = gpu.forward(q, large, large, None, edges, edges, False, 1.0)
        assert torch.equal(out[0], large[row])

    def test_views_in_any_layout(self):
        relation = general(3, 4, 9)
        q, k, v = (x.detach() for x in inputs(relation))
        packed = torch.stack([k, v], dim=-1)
        turned = q.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        views = [x.requires_grad_() for x in (turned, packed[..., 0], packed[..., 1])]
        assert_equals_oracle(views, relation)

    @pytest.mark.parametrize("columns", [None, 1, 2])
    @pytest.mark.parametrize("normalise", NORMALISE)
    def test_second_derivatives(self, normalise, columns):
        relation = general(2, 3, 5)

        def second(attend, given, *args, **options):
            q, k, v, *bias = given
            bias = bias[0] if bias else None
            out = attend(q, k, v, *args, bias=bias, normalise=normalise, **options)
            first = torch.autograd.grad(out.square().sum(), given, create_graph=True)
            return torch.autograd.grad(sum(x.sin().sum() for x in first), given)

        given = inputs(relation, 2, 3, columns=columns)
        actual = second(edge_attention, given, relation.to(DEVICE), backend="sparse")
        exact = [x.detach().cpu().requires_grad_() for x in given]
        for a, b in zip(actual, second(oracle, exact, relation.edge_index), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-10)

    def test_what_is_kept_for_backward_grows_with_nodes(self):
        relation = with_degrees([40, 40], 3)
        given = inputs(relation, 2, 4, torch.float32)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            edge_attention(*given, relation.to(DEVICE), backend="sparse")
        assert max(x.numel() for x in kept if x.is_floating_point()) == 3 * 2 * 4

    def test_the_operation_is_what_torch_expects_of_operations(self):
        relation = general(3, 2, 6).to(DEVICE)
        for columns in (None, 1):
            q, k, v, *bias = inputs(relation, 2, 3, torch.float32, columns=columns)
            bias = bias[0] if bias else None
            arguments = (q, k, v, bias, *relation.csr, *relation.csc, False, 0.5)
            torch.library.opcheck(sparse._attend, arguments)

    def test_compiles_without_graph_breaks(self):
        relation = general(3, 2, 6).to(DEVICE)
        given = inputs(relation, 2, 3, torch.float32)
        compiled = torch.compile(edge_attention, backend="aot_eager", fullgraph=True)
        actual = results(compiled, given, relation, backend="sparse")
        expected = results(edge_attention, given, relation, backend="sparse")
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# Around the kernels ################################################################


@pytest.mark.slow
@pytest.mark.skipif(TestKernels.__test__, reason="the kernels' own tests run in this process")
def test_the_kernels_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "TestKernels", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and re.search(r"\d\d passed", run.stdout), run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETS, reason="the interpreter is not a compiler")
@pytest.mark.parametrize(
    ("dtype", "heads", "channels", "columns", "degree", "by_source"),
    [
        (torch.bfloat16, 4, 32, None, 0, False),
        (torch.float32, 3, 5, 1, 0, True),
        (torch.float16, 2, 256, 2, 200, False),
        (torch.float64, 1, 1, None, 200, True),
    ],
)
def test_the_kernels_compile(
    monkeypatch, tmp_path, dtype, heads, channels, columns, degree, by_source
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from nsm_graph.ops.edge_attention import gpu, triton

    stubs = {name: Compiles(getattr(triton, name)) for name in vars(triton) if "_kernel" in name}
    assert len(stubs) == 4
    for name, stub in stubs.items():
        monkeypatch.setattr(triton, name, stub)
    monkeypatch.setattr(gpu, "MAX_BLOCKS", 1)
    relation = with_degrees([200] * 3, 2)
    q, k, v = (torch.zeros(rows, heads, channels, dtype=dtype) for rows in (3, 2, 2))
    bias = None if columns is None else torch.zeros(relation.num_edges, columns, dtype=dtype)
    rest = relation.csr, relation.csc, by_source, 0.3, (degree, 0)
    _, stats = gpu.forward(q, k, v, bias, *rest)
    gpu.backward(q, q, k, v, bias, stats, *rest)
    counts = [len(stub.compiled) for stub in stubs.values()]
    assert min(counts) >= 1 and sum(counts) >= 6
    for compiled in itertools.chain(*(stub.compiled for stub in stubs.values())):
        assert compiled.asm["cubin"]


@pytest.mark.skipif(not HAS_GPU, reason="torch finds no GPU")
@pytest.mark.parametrize("normalise", NORMALISE)
def test_a_gpu_is_given_the_kernels(normalise):
    relation = general(300, 200, 3000).to("cuda")
    assert explain(relation, torch.bfloat16).name == "sparse"
    given = [
        torch.randn(rows, 4, 32, device="cuda", requires_grad=True) for rows in (200, 300, 300)
    ]
    actual = results(edge_attention, given, relation, normalise=normalise)
    expected = results(edge_attention, given, relation, normalise=normalise, backend="reference")
    compiled = torch.compile(edge_attention, fullgraph=True)
    again = results(compiled, given, relation, normalise=normalise)
    for a, b, c in zip(actual, expected, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert torch.equal(a, c)
