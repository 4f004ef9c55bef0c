"""Kernels: compiled once for each combination of types, found on disk, with a word in the log."""

import logging

import numba
import numpy as np
import pytest

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
    """What was logged, without the time."""
    messages = [record.getMessage() for record in caplog.records if record.name == "nsm_graph"]
    caplog.clear()
    return [message.split(" in ")[0] for message in messages]


def test_the_log_says_once_that_a_kernel_was_compiled(caplog):
    kernel = Kernel(double)
    assert words(caplog) == []
    run(kernel)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert words(caplog) == ["compiled double"]
    run(kernel)
    assert words(caplog) == []


def test_other_types_are_compiled_when_they_are_met(caplog):
    kernel = Kernel(double)
    run(kernel)
    run(kernel, np.float64)
    assert words(caplog) == ["compiled double"] * 2
    run(kernel)
    run(kernel, np.float64)
    assert words(caplog) == []


def test_another_process_finds_the_kernel_on_disk(caplog, tmp_path):
    run(Kernel(double))
    assert words(caplog) == ["compiled double"]
    assert list(tmp_path.rglob("*.nbc"))
    run(Kernel(double))  # knows as little as another process does
    assert words(caplog) == []


def test_without_a_folder_that_can_be_written_a_kernel_works_all_the_same(
    monkeypatch, caplog, tmp_path
):
    compiler = numba.njit

    def njit(*arguments, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compiler(*arguments, **options)

    monkeypatch.setattr(numba, "njit", njit)
    kernel = Kernel(double)
    run(kernel)
    assert words(caplog) == ["compiled double"]
    run(kernel)
    assert words(caplog) == []
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
