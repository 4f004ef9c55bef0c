"""The benchmark on a GPU: what it does where there is none, and its records, made on a CPU."""

import subprocess
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from nsm_graph.bench import BENCHES, bench_gpu, gpu, gpu_loop
from nsm_graph.cli import main

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
CPU = torch.device("cpu")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(gpu, "SPARSE", (60, 3, 2, 8))
    monkeypatch.setattr(gpu, "COMPLETE", (4, 3, 5, 2, 8))
    monkeypatch.setattr(gpu, "CALLS", 1)
    monkeypatch.setattr(gpu_loop, "EXAMPLES", 2)
    monkeypatch.setattr(gpu_loop, "LENGTH", 128)


@pytest.mark.slow
@needs_triton
def test_without_a_gpu_the_kernels_are_checked_and_nothing_is_timed(no_gpu, capsys):
    assert main(["bench", "gpu"]) == 0
    printed = capsys.readouterr().out
    assert "results and gradients,\n4 cases" in printed
    assert "no GPU" in printed and "nothing was timed" in printed
    assert "ratio" not in printed


@pytest.mark.parametrize("has_gpu", [False, True])
def test_wrong_kernels_are_not_timed(monkeypatch, capsys, has_gpu):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "dk differs from the reference")

    monkeypatch.setattr(gpu, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(gpu.subprocess, "run", run)
    assert main(["bench", "gpu"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "the kernels' checks to pass; nothing is timed: dk differs" in printed.err


def test_triton_is_asked_for(monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="bench gpu needs Triton: pip install"):
        bench_gpu()


def test_sparse_attention_is_checked_and_timed(small):
    records = gpu._sparse_records(CPU, repetitions=1, scale=0.5)
    assert [record.target for record in records] == [8.0, 4.0, 0.4, 0.6, 15.0, 4.0, 0.4, 0.6]
    assert {record.peer for record in records} == {
        "PyG float32", "own forward", "copying its bytes"
    }  # fmt: skip
    for record in records:
        assert record.correct and record.ours_ms > 0 and record.peer_ms > 0
        assert "sparse E90 H2 D8" in record.case and " us against " in record.note
        assert "gpu" in record.env


def test_complete_relations_are_checked_and_timed(small):
    (record,) = gpu._complete_records(CPU, repetitions=1, scale=0.5)
    assert record.correct and record.ours_ms > 0 and record.peer_ms > 0
    assert (record.peer, record.target) == ("SDPA", 0.95)


def test_a_training_step_is_checked_and_timed(small):
    times = partial(gpu._times, device=CPU, repetitions=1)
    records = [*map(gpu._on_this_gpu, gpu_loop.loop_records(CPU, times, scale=0.5))]
    assert [(record.peer, record.target) for record in records] == [
        ("step by step", 10.0), ("GRU", 5.0)
    ] * 2  # fmt: skip
    assert [record.case.split()[-1] for record in records[::2]] == ["S16", "S64"]
    for record in records:
        assert record.correct and record.ours_ms > 0 and record.peer_ms > 0
        assert "step B2 L64 N16" in record.case and "million tokens/s against" in record.note
        assert "gpu" in record.env
    assert " parameters beside our " in records[1].note


def test_a_loop_with_other_results_is_noticed(small, monkeypatch):
    monkeypatch.setattr(gpu_loop, "_is_right", lambda *_: False)
    times = partial(gpu._times, device=CPU, repetitions=1)
    assert not any(record.correct for record in gpu_loop.loop_records(CPU, times, 0.5))


def test_a_peer_with_other_results_is_noticed(small, monkeypatch):
    def another(*_):
        return lambda q, k, v: q + 0 * k.sum() + 0 * v.sum()

    monkeypatch.setattr(gpu, "_pyg", another)
    monkeypatch.setattr(gpu, "_dense_view", another)
    records = [*gpu._sparse_records(CPU, 1, 1.0), *gpu._complete_records(CPU, 1, 1.0)]
    assert not any(record.correct for record in records)


def test_the_command_knows_it():
    assert BENCHES["gpu"] is bench_gpu
