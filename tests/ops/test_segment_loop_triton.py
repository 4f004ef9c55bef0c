"""The segment loop's kernels for GPUs, against the oracle, with every gradient.

As with edge attention's: Triton's interpreter runs them on a CPU, if it is told so before the
kernels are made, so the tests of `TestKernels` run in a process of their own; where there is a GPU
they run here. That they compile is tested without either.
"""

import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from segment_loop_oracle import (
    RAGGED,
    asks,
    assert_close,
    assert_equals_the_oracle,
    assert_same,
    gradients,
    loss_of,
    make_case,
    oracle,
)
from triton_compiler import Compiles

from nsm_graph import NeuralStateMachine
from nsm_graph.models import fused, sequence
from nsm_graph.ops import segment_loop as operation
from nsm_graph.ops.segment_loop import LoopSegments, LoopWeights, token_loop, why_not_triton
from nsm_graph.testing import assert_close_to_norm

HAS_GPU = torch.cuda.is_available()
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if HAS_GPU and not INTERPRETS else "cpu"
#: The interpreter knows float64 at no price; a compiler takes minutes to make it of these kernels.
EXACT, TOLERANCE = (torch.float64, 1e-10) if DEVICE == "cpu" else (torch.float32, 1e-5)
if DEVICE == "cuda":
    # Torch's products are deterministic only with this, and say so in `poisoned_memory`.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
#: Tokens of each example's segments. In the interpreter a segment takes most of a second.
FEW = [[2, 1], [3]]
ON_GPU = {"backend": "triton"}

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def a_case(*sizes, dtype=EXACT, **options):
    """As the oracle's, with few segments, on the device."""
    case = make_case(*sizes, **{"counts": FEW} | options)
    return case.but(
        **{n: x.detach().to(DEVICE, dtype).requires_grad_() for n, x in case.given.items()}
    )


def both_of(case):
    results = case.run(**ON_GPU)
    return results, gradients(results, case)


class TestKernels:
    __test__ = HAS_GPU or INTERPRETS

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch):
        """The module that launches; the interpreter serves CPU tensors."""
        from nsm_graph.ops.segment_loop import gpu

        monkeypatch.setattr(operation, "_on_gpu", lambda x: True)
        return gpu

    @pytest.mark.parametrize(
        ("sizes", "talks", "is_shared"),
        [
            ((1, 1, 1), True, True),
            ((5, 6, 2), True, False),
            ((5, 6, 2), False, True),
            ((17, 20, 1), False, False),
            ((3, 34, 2), True, True),
        ],
    )
    def test_equals_the_oracle_with_every_gradient(self, sizes, talks, is_shared):
        case = a_case(*sizes, talks=talks, is_shared=is_shared)
        assert_equals_the_oracle(case, TOLERANCE, **ON_GPU)

    @pytest.mark.parametrize("talks", [True, False])
    def test_float32(self, talks):
        case = a_case(5, 6, 2, talks=talks, is_shared=not talks, dtype=torch.float32)
        assert_equals_the_oracle(case, 1e-5, **ON_GPU)

    def test_ragged_examples_some_of_which_never_read(self):
        case = a_case(3, 12, 2, counts=RAGGED, idle=2, talk_heads=3)
        assert_equals_the_oracle(case, TOLERANCE, **ON_GPU)

    @asks
    def test_a_loss_may_read_either_result(self, asked):
        assert_equals_the_oracle(a_case(talks=False), TOLERANCE, asked, **ON_GPU)

    def test_long_segments_are_read_block_by_block(self, gpu, monkeypatch):
        monkeypatch.setattr(gpu, "MOST_TOKENS", 16)
        case = a_case(counts=[[40, 16], [17]], talks=False, is_shared=False)
        assert_equals_the_oracle(case, TOLERANCE, **ON_GPU)

    def test_backward_goes_through_any_number_of_steps_at_a_time(self, gpu, monkeypatch):
        counts = [[2, 1, 3, 1], [1, 2, 1], [3]]
        case = a_case(counts=counts)
        wanted, runs = both_of(case)[1], []
        for groups in (1, 4, 5):
            monkeypatch.setattr(gpu, "CHUNK_BYTES", groups * 14 * 6 * 5 * EXACT.itemsize)
            call = gpu._Call(case.segments, 2, 2)
            own = gpu._name([case.rows[n] for n in ("states", "routed", "key")] + [None] * 15)
            runs.append(gpu._Run(call, own._replace(weights=case.weights))._chunks())
            assert_close(gradients(case.run(**ON_GPU), case), wanted, TOLERANCE)
        assert runs == [
            [(3, 4), (2, 3), (1, 2), (0, 1)], [(2, 4), (1, 2), (0, 1)], [(1, 4), (0, 1)]
        ]  # fmt: skip

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bits_are_summed_in_float32(self, dtype):
        case = a_case(dtype=dtype)
        tolerance = torch.finfo(dtype).eps
        assert_equals_the_oracle(case, tolerance, **ON_GPU)
        results, grads = both_of(case)
        assert {x.dtype for x in (*results, *grads.values())} == {dtype}

    def test_examples_that_never_read_reach_no_other(self):
        case = a_case(idle=2, talks=False)
        num_idle = 2 * case.num_states
        case.rows["states"].data[-num_idle:] = math.nan
        after, final = case.run(**ON_GPU)
        assert after.isfinite().all() and final[:-num_idle].isfinite().all()
        assert final[-num_idle:].isnan().all()
        found = gradients([after], case)
        assert (found["states"][-num_idle:] == 0).all()
        assert all(x.isfinite().all() for x in found.values())

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of the interpreter
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_broken_example_does_not_reach_its_neighbours(self, bad):
        case = a_case(3, 4, 2)
        expected, last = case.run(**ON_GPU)
        case.rows["states"].data[3:6] = bad
        out, final = case.run(**ON_GPU)
        is_broken = torch.tensor([0, 1, 0]).repeat_interleave(3).bool()  # groups
        assert torch.equal(out[~is_broken], expected[~is_broken])
        assert out[is_broken].isnan().all() and final[3:6].isnan().all()
        assert torch.equal(final[:3], last[:3])

    def test_no_result_depends_on_memory_that_was_never_written(self, poisoned_memory):
        for talks in (True, False):
            case = a_case(3, 4, 2, talks=talks, is_shared=talks, dtype=torch.float32)
            results, grads = both_of(case)
            assert all(x.isfinite().all() for x in (*results, *grads.values()))

    def test_the_same_bits_every_time(self):
        case = a_case(3, 4, 2, dtype=torch.float32)
        results, grads = both_of(case)
        for _ in range(100 if DEVICE == "cuda" else 1):
            again, same = both_of(case)
            assert_same(again, results)
            assert_same(same, grads)

    def test_second_derivatives(self):
        case = a_case(2, 4, 2)
        exact = case.detached(*case.given)

        def second(results, case):
            given = list(case.given.values())
            first = torch.autograd.grad(loss_of(results), given, create_graph=True)
            return dict(zip(case.given, torch.autograd.grad(loss_of(first), given), strict=True))

        assert_close(second(case.run(**ON_GPU), case), second(oracle(exact), exact), 10 * TOLERANCE)

    def test_gradients_for_some_inputs_only(self):
        case = a_case(3, 4, 2)
        wanted = gradients(oracle(case), case)
        for names in (["key"], ["gates_bias"]):
            some = case.detached(*names)
            found = torch.autograd.grad(loss_of(some.run(**ON_GPU)), some.given[names[0]])
            assert_close({names[0]: found[0]}, {names[0]: wanted[names[0]]}, TOLERANCE)
        with torch.no_grad():
            assert not case.run(**ON_GPU)[0].requires_grad

    def test_views_in_any_layout(self):
        case = a_case(3, 4, 2, is_shared=False)
        wanted = oracle(case)
        turned = {n: x.detach().t().contiguous().t() for n, x in case.given.items()}
        for a, b in zip(case.but(**turned).run(**ON_GPU), wanted, strict=True):
            assert_close_to_norm(a, b, TOLERANCE)

    def test_a_step_that_nobody_reads(self):
        case = a_case(3, 4, 2, talks=False)
        ptr, num_active = case.segments
        segments = LoopSegments(ptr, torch.cat([num_active, torch.tensor([0])]))
        results = operation.segment_loop(
            **case.rows, segments=segments, weights=case.weights, heads=2, **ON_GPU
        )
        assert_same(results, case.run(**ON_GPU))
        assert_close(gradients(results, case), gradients(oracle(case), case), TOLERANCE)

    def test_nothing_to_read(self):
        case = a_case(counts=[], idle=2)
        after, final = case.run(**ON_GPU)
        assert after.shape == (0, 6) and torch.equal(final, case.rows["states"])

    @pytest.mark.parametrize("options", [{}, {"routing_reduce": "mean", "separate_values": True}])
    def test_the_machine(self, monkeypatch, options):
        monkeypatch.setattr(fused, "_backend", lambda states: "triton")
        machine = NeuralStateMachine(3, 8, 3, 2, segment_length=4, heads=2, **options).to(DEVICE)
        machine.cell.fuse = "triton"
        x, batch = torch.randn(9, 3, device=DEVICE), torch.tensor([0] * 6 + [1] * 3, device=DEVICE)
        calls = []
        read = fused.read_fused
        monkeypatch.setattr(
            sequence, "read_fused", lambda *a, **o: calls.append(o) or read(*a, **o)
        )

        def both():
            out = machine(x, batch)
            named = dict(machine.named_parameters())
            grads = torch.autograd.grad(out.square().sum(), list(named.values()))
            return {"out": out.detach()}, dict(zip(named, grads, strict=True))

        actual = both()
        assert len(calls) == 1
        machine.cell.fuse = False
        for a, b in zip(actual, both(), strict=True):
            assert_close(a, b, 1e-5)


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
    ("dtype", "sizes", "talks", "is_shared"),
    [
        (torch.float32, (16, 64, 4), True, True),
        (torch.bfloat16, (5, 20, 1), False, False),
        (torch.float16, (33, 40, 2), True, False),
    ],
)
def test_the_kernels_compile(monkeypatch, tmp_path, dtype, sizes, talks, is_shared):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from nsm_graph.ops.segment_loop import gpu, triton

    stubs = {
        name: Compiles(getattr(triton, name)) for name in ("forward_kernel", "backward_kernel")
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(triton, name, stub)
    case = make_case(*sizes, counts=[[16]], talks=talks, is_shared=is_shared, dtype=dtype)
    with torch.no_grad():
        value = None if is_shared else case.rows["value"]
        rows = [case.rows[name].detach() for name in ("states", "routed", "key")]
        run = gpu._Run(
            gpu._Call(case.segments, sizes[2], sizes[2]), gpu._Given(*rows, value, case.weights)
        )
        after, final = run.forward()
        run.backward(after, None, final)
    for stub in stubs.values():
        (compiled,) = stub.compiled
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 227 * 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_lstm": True}, "no LSTM's gates; ask for backend='reference'"),
        ({"kept": 2}, "keeps no channels, but gates write 4 of 6 channels"),
        ({"num_states": 65}, "up to 64 states of up to 128 channels, .* has 65 of 6"),
        ({"channels": 130, "heads": 1}, "an example has 5 of 130"),
        ({"num_states": 33, "channels": 65, "heads": 1}, "4096 numbers .* has 33 of 65"),
    ],
)
def test_what_the_kernels_do_not_know(monkeypatch, options, message):
    monkeypatch.setattr(operation, "_on_gpu", lambda x: True)
    case = make_case(**{"counts": FEW} | options)
    with pytest.raises(ValueError, match=message):
        case.run(**ON_GPU)
    # Whoever does not ask for them gets the reference.
    for a, b in zip(case.run(backend=None), oracle(case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_other_numbers_and_no_triton(monkeypatch):
    assert "does not know torch.complex64" in why_not_triton(
        torch.complex64, 4, 4, 4, is_lstm=False
    )
    monkeypatch.setattr("nsm_graph.ops.segment_loop.limits.HAS_TRITON", False)
    assert "needs Triton: pip install" in why_not_triton(torch.float32, 4, 4, 4, is_lstm=False)


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_the_kernels_are_for_a_gpu():
    with pytest.raises(ValueError, match="needs states on a GPU, but they are on cpu"):
        make_case().run(**ON_GPU)


def test_the_kernels_read_rows():
    nothing = [None] * len(LoopWeights._fields)
    with pytest.raises(ValueError, match="reads rows, not tokens"):
        token_loop(torch.zeros(2, 2), *[None] * 4, LoopWeights(*nothing), 1, **ON_GPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, None),
        ({"cell": "lstm"}, "no LSTM's gates"),
        ({"num_states": 80}, "an example has 80 of 8"),
        ({"top_k": 1}, "not every token has an edge"),
    ],
)
def test_what_a_machine_on_a_gpu_reads_step_by_step(monkeypatch, options, message):
    monkeypatch.setattr(fused, "_backend", lambda states: "triton")
    sizes = {"in_channels": 3, "state_channels": 8, "num_states": 3, "out_channels": 2}
    machine = NeuralStateMachine(**sizes | {"segment_length": 4, "heads": 2} | options)
    assert 'fuse = "triton" asks' in fused.why_not_fused(machine.cell, torch.zeros(3, 8))
    machine.cell.fuse = "triton"
    reason = fused.why_not_fused(machine.cell, torch.zeros(3, 8))
    assert reason is None if message is None else message in reason
    if message is None:
        assert fused.why_not_fused(machine.cell, torch.zeros(3, 8).bfloat16()) is None
        assert "asks for the reference" in fused.why_not_fused(
            machine.cell, torch.zeros(3, 8).double()
        )
        assert "has 70 of" in fused.why_not_fused(machine.cell, torch.zeros(70, 8), num_states=70)


@pytest.mark.skipif(not HAS_GPU, reason="torch finds no GPU")
def test_a_gpu_is_given_the_kernels(monkeypatch):
    from nsm_graph.ops.segment_loop import gpu

    calls = []
    run = gpu.segment_loop
    monkeypatch.setattr(gpu, "segment_loop", lambda *given: calls.append(1) or run(*given))
    case = make_case(16, 64, 4, counts=[[16] * 8] * 4, dtype=torch.float32)
    case = case.but(**{n: x.detach().cuda().requires_grad_() for n, x in case.given.items()})
    results, wanted = case.run(backend=None), case.run(backend="reference")
    assert calls
    for a, b in zip(results, wanted, strict=True):
        assert_close_to_norm(a, b, 1e-5)
    assert_close(gradients(results, case), gradients(wanted, case), 1e-4)
