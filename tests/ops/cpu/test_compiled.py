"""Kernels: compiled once for each combination of types, found on disk, with a word in the log."""

import logging

import numba
import numpy as np
import pytest

from nsm_graph.ops.cpu import compiled
from nsm_graph.ops.cpu.compiled import Kernel


def double(values, out, first, end):
    """Twice the values."""
    for row in range(first, end):
        out[row] = 2 * values[row]


def divide(values, out, first, end):
    for row in range(first, end):
        x = values[row]
        out[row] = 1 / x if x == x else -1.0


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    """Every test starts with an empty folder for what is compiled."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))


def run(kernel, dtype=np.float32):
    values = np.arange(5, dtype=dtype)
    out = np.zeros_like(values)
    kernel(values, out, 1, 4)
    assert out.tolist() == [0, 2, 4, 6, 0]


def words(caplog):
    messages = [record.getMessage() for record in caplog.records if record.name == "nsm_graph"]
    caplog.clear()
    return messages


def test_whoever_waits_for_the_compiler_reads_why(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "PATIENCE", 0.0)
    kernel = Kernel(double)
    run(kernel)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    (message,) = words(caplog)
    assert message == "compiling double, once for these types of arguments; it is kept on disk"


def test_nothing_is_said_of_what_takes_no_time(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "PATIENCE", 600.0)
    run(Kernel(double))
    assert words(caplog) == []


def test_types_that_are_known_start_no_clock(monkeypatch):
    kernel = Kernel(double)
    run(kernel)
    run(kernel, np.float64)
    monkeypatch.setattr(compiled.threading, "Timer", None)
    run(kernel)
    run(kernel, np.float64)
    with pytest.raises(TypeError):
        run(kernel, np.int64)


def test_another_process_finds_the_kernel_on_disk(tmp_path):
    run(Kernel(double))
    assert list(tmp_path.rglob("*.nbc"))
    other = Kernel(double)  # knows as little as another process does
    run(other)
    assert sum(other._compiled.stats.cache_hits.values()) == 1
    assert not other._compiled.stats.cache_misses


def test_the_file_on_disk_depends_on_all_that_kernels_are_made_of(monkeypatch):
    run(Kernel(double))
    monkeypatch.setattr(compiled, "_digest", lambda: "changed")
    changed = Kernel(double)
    run(changed)
    assert not changed._compiled.stats.cache_hits


def test_without_a_folder_that_can_be_written_a_kernel_works_all_the_same(
    monkeypatch, caplog, tmp_path
):
    compiler = numba.njit

    def njit(*arguments, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compiler(*arguments, **options)

    monkeypatch.setattr(numba, "njit", njit)
    monkeypatch.setattr(compiled, "PATIENCE", 0.0)
    kernel = Kernel(double)
    run(kernel)
    (message,) = words(caplog)
    assert "no folder to keep it in could be written" in message
    assert not list(tmp_path.rglob("*.nbc"))


def test_nan_and_infinity_keep_their_meaning():
    values = np.array([0.0, 2.0, np.nan, np.inf, -0.5])
    out = np.zeros_like(values)
    Kernel(divide)(values, out, 0, 5)
    assert out.tolist() == [np.inf, 0.5, -1.0, 0.0, -2.0]


def test_a_kernel_keeps_its_name_and_docstring():
    kernel = Kernel(double)
    assert kernel.__name__ == "double"
    assert kernel.__doc__ == "Twice the values."
