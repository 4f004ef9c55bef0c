"""Benchmarks: records as documented, and nothing printed that is not correct."""

import json

import pytest

from nsm_graph import bench
from nsm_graph.bench import BenchRecord, bench_scan
from nsm_graph.bench.record import interleaved_medians
from nsm_graph.cli import main

KEYS = {
    *("case", "peer", "ours_ms", "peer_ms", "ratio", "ours_mib", "peer_mib", "correct"),
    *("target", "env"),
}


def test_a_ratio_above_one_means_ours_is_better():
    record = BenchRecord("case", "peer", ours_ms=2.0, peer_ms=3.0, correct=True, target=1.0)
    assert record.ratio == 1.5
    assert set(record.to_dict()) == KEYS


def test_runs_take_turns_and_the_first_turn_does_not_count():
    calls = []
    times = interleaved_medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert set(times) == {"a", "b"}


def test_the_scan_is_checked_and_timed(monkeypatch):
    records = bench_scan(repetitions=1, length=32)
    assert [record.peer for record in records].count("no scan") == 4
    assert all(record.correct and record.ours_ms > 0 for record in records)


def records(correct):
    return [BenchRecord("case", "peer", 2.0, 3.0, correct, 1.0)]


def test_the_command_prints_a_table_and_writes_json(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(bench.BENCHES, "scan", lambda repetitions: records(True))
    assert main(["bench", "scan", "--json", str(tmp_path / "b.json"), "--repetitions", "1"]) == 0
    assert "1.50" in capsys.readouterr().out
    (written,) = json.loads((tmp_path / "b.json").read_text())
    assert set(written) == KEYS


def test_wrong_results_print_no_number(monkeypatch, capsys):
    monkeypatch.setitem(bench.BENCHES, "scan", lambda repetitions: records(False))
    assert main(["bench", "scan"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "results differ from the reference in case" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repetitions", "0"], "--repetitions: expected at least 1; got 0"),
        (["--json", "/nowhere/x.json"], "--json: expected a file in a folder that exists"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(["bench", "scan", *arguments]) == 2
    assert message in capsys.readouterr().err
