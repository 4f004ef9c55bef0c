"""Benchmarks: records as documented, and nothing printed that is not correct."""

import json
import math
from pathlib import Path

import pytest
import torch

from nsm_graph import bench
from nsm_graph.bench import (
    BenchRecord,
    attention,
    bench_attention,
    bench_editing,
    bench_memory,
    bench_routing,
    bench_scan,
)
from nsm_graph.bench.record import interleaved_medians, peak_mib
from nsm_graph.cli import main

KEYS = {
    *("case", "peer", "ours_ms", "peer_ms", "ratio", "ours_mib", "peer_mib", "correct"),
    *("target", "measure", "note", "env"),
}

needs_peak = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of memory"
)


# Records ###########################################################################


def test_a_ratio_above_one_means_ours_is_better():
    record = BenchRecord("case", "peer", ours_ms=2.0, peer_ms=3.0, correct=True, target=1.0)
    assert record.ratio == 1.5
    assert set(record.to_dict()) == KEYS


def memory_record(ours, peer):
    return BenchRecord(
        "large", "peer", 2.0, 3.0, True, 10.0, ours_mib=ours, peer_mib=peer, measure="mib"
    )


def test_a_ratio_may_compare_memory():
    assert memory_record(4.0, 50.0).ratio == 12.5
    for unknown in ((None, None), (4.0, None), (None, 50.0)):
        assert math.isnan(memory_record(*unknown).ratio)


def test_runs_take_turns_and_the_first_turn_does_not_count():
    calls = []
    times = interleaved_medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert set(times) == {"a", "b"}


@needs_peak
def test_the_peak_is_the_most_that_a_call_holds_at_once():
    assert 60 < peak_mib(lambda: torch.ones(64 << 18)) < 80  # so many MiB of float32
    assert peak_mib(lambda: None) < 16

    def one_after_the_other():
        # Above 32 MiB malloc always gives freed memory back; up to there it may keep it.
        for _ in range(3):
            torch.ones(64 << 18)

    assert 60 < peak_mib(one_after_the_other) < 80


def test_where_the_system_does_not_tell_the_peak_is_unknown(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert peak_mib(lambda: None) is None


# Benchmarks ########################################################################


def test_the_scan_is_checked_and_timed(monkeypatch):
    records = bench_scan(repetitions=1, length=32)
    assert [record.peer for record in records].count("no scan") == 5
    assert all(record.correct and record.ours_ms > 0 for record in records)


def test_edits_are_checked_and_timed():
    half, watched = bench_editing(repetitions=1, length=32)
    assert half.correct
    assert watched.correct


@pytest.fixture
def small(monkeypatch):
    """Cases that take no time, beside one peer that needs no compiler."""
    monkeypatch.setattr(attention, "SPARSE", ((300, 3, 2, 8), (100, 9, 1, 5)))
    monkeypatch.setattr(attention, "ROUTING", ((400, 2, 9, 2, 4),))
    monkeypatch.setattr(attention, "COMPLETE", ((4, 3, 5, 2, 8),))
    monkeypatch.setattr(attention, "CAUSAL", ((4, 6, 2, 8),))
    monkeypatch.setattr(attention, "LARGE", (4096, 16, 2, 32))
    monkeypatch.setattr(
        attention,
        "_graph_peers",
        lambda relation, normalise: {"PyG": lambda: attention._pyg(relation, normalise)},
    )


def test_attention_is_checked_and_timed(small):
    records = bench_attention(repetitions=1, scale=0.5)
    assert [record.peer for record in records] == ["PyG", "PyG", "SDPA", "SDPA", "edge list"]
    assert [record.target for record in records] == [12.0, 12.0, 0.95, 0.95, 1.0]
    names = ["sparse", "sparse", "complete", "causal", "causal"]
    assert [record.case.split()[0] for record in records] == names
    for record in records:
        assert record.correct and record.ours_ms > 0 and record.peer_ms > 0
        assert record.measure == "ms" and record.ratio == record.peer_ms / record.ours_ms


def test_routing_is_checked_and_timed(small):
    (record,) = bench_routing(repetitions=1, scale=0.5)
    assert record.correct and record.ours_ms > 0 and record.peer_ms > 0
    assert (record.peer, record.target) == ("PyG", 6.0)
    assert record.case.startswith("routing T")


@needs_peak
def test_memory_is_checked_and_measured(small):
    (record,) = bench_memory(repetitions=1)
    assert record.correct and record.measure == "mib"
    assert (record.peer, record.target) == ("PyG", 10.0)
    assert "E65536" in record.case
    assert record.peer_mib > 16  # MiB that messages take: one number per edge, head and channel
    assert 0 < record.ours_mib < record.peer_mib


@pytest.mark.parametrize("name", ["attention", "routing", "memory"])
def test_a_peer_with_other_results_is_noticed(small, monkeypatch, capsys, name):
    def another(*_):
        return lambda q, k, v: q + 0 * k.sum() + 0 * v.sum()

    monkeypatch.setattr(attention, "_pyg", another)
    monkeypatch.setattr(attention, "peak_mib", lambda run: 1.0)
    records = bench.BENCHES[name](repetitions=1, scale=0.1)
    assert [record.correct for record in records] == [record.peer != "PyG" for record in records]
    monkeypatch.setitem(bench.BENCHES, name, lambda repetitions: records)
    assert main(["bench", name]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"results differ from the reference in {records[0].case}" in printed.err


def test_peers_run_on_one_thread_and_on_all_of_them(small, monkeypatch):
    seen = {"ours": set(), "peer": set()}

    def watched(who, attend):
        def call(q, k, v):
            seen[who].add(torch.get_num_threads())
            return attend(q, k, v)

        return call

    ours, pyg = attention._ours, attention._pyg
    monkeypatch.setattr(attention, "_ours", lambda *given: watched("ours", ours(*given)))
    monkeypatch.setattr(attention, "_pyg", lambda *given: watched("peer", pyg(*given)))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        bench_routing(repetitions=1, scale=0.1)
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    assert seen["peer"] == {1, 2} and 2 in seen["ours"]
    assert after == 2


def test_the_peers_on_general_edges():
    relation = attention._random_degree(8, 2)
    assert relation.num_edges == 16 and relation.size == (16, 8)
    peers = attention._graph_peers(relation, "target")
    assert list(peers)[:2] == ["PyG", "PyG compiled"]


# The command #######################################################################


def records(correct):
    return [BenchRecord("case", "peer", 2.0, 3.0, correct, 1.0)]


def test_the_command_prints_a_table_and_writes_json(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(bench.BENCHES, "scan", lambda repetitions: records(True))
    assert main(["bench", "scan", "--json", str(tmp_path / "b.json"), "--repetitions", "1"]) == 0
    title, line = capsys.readouterr().out.splitlines()
    assert title.split() == ["case", "peer", "ours", "theirs", "ratio", "target"]
    assert line.split() == ["case", "peer", "2.0", "3.0", "ms", "1.50", "1.00"]
    (written,) = json.loads((tmp_path / "b.json").read_text())
    assert set(written) == KEYS


def test_memory_is_printed_in_the_same_columns(monkeypatch, capsys):
    lines = [*records(True), memory_record(4.0, 50.0), memory_record(None, None)]
    monkeypatch.setitem(bench.BENCHES, "memory", lambda repetitions: lines)
    assert main(["bench", "memory"]) == 0
    title, time, memory, unknown = capsys.readouterr().out.splitlines()
    assert time.split()[2:] == ["2.0", "3.0", "ms", "1.50", "1.00"]
    assert memory.split()[2:] == ["4.0", "50.0", "MiB", "12.50", "10.00"]
    assert unknown.split()[2:] == ["unknown", "unknown", "MiB", "nan", "10.00"]
    assert len({len(line) for line in (title, time, memory, unknown)}) == 1


def test_a_note_stands_below_its_line(monkeypatch, capsys):
    noted = BenchRecord("case", "peer", 2.0, 3.0, True, 1.0, note="what else there is")
    monkeypatch.setitem(bench.BENCHES, "scan", lambda repetitions: [noted, *records(True)])
    assert main(["bench", "scan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].strip() == "what else there is"


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


def test_all_is_every_benchmark_for_processors(monkeypatch):
    called = []
    for name in bench.BENCHES:
        if name != "all":
            monkeypatch.setitem(
                bench.BENCHES, name, lambda repetitions, name=name: called.append(name) or []
            )
    assert bench.BENCHES["all"](repetitions=3) == []
    assert called == [name for name in bench.BENCHES if name not in ("all", "gpu")]
