"""The benchmark of updates: checked, timed, and honest about a result that differs."""

import pytest
import torch

from nsm_graph.bench import bench_propagation, propagation


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(propagation, "CHANNELS", 16)
    monkeypatch.setattr(propagation, "HEADS", 2)
    monkeypatch.setattr(propagation, "CHANGED", (400, 3, 4))
    monkeypatch.setattr(propagation, "STREAM", 40)


def test_updates_are_checked_and_timed(small):
    records = bench_propagation(repetitions=1, scale=0.5)
    assert [record.peer for record in records] == [
        "recomputation", "recomputation", "TransformerEncoder", "recomputation",
    ]  # fmt: skip
    assert [record.target for record in records] == [10.0, 50.0, 50.0, 50.0]
    assert records[0].case == "update: 2 neighbours of 200 pages changed, window(3)"
    assert records[1].case == "one page behind 20, causal(): the page alone"
    assert all(record.correct and record.ours_ms > 0 and record.peer_ms > 0 for record in records)
    assert torch.backends.mha.get_fastpath_enabled()


def test_wrong_updates_and_a_wrong_peer_are_noticed(small, monkeypatch):
    stale = propagation.Propagation.update

    def forget(self, pages, changed, **given):
        return stale(self, pages, [], **given)

    monkeypatch.setattr(propagation.Propagation, "update", forget)
    assert not bench_propagation(repetitions=1)[0].correct


def test_an_encoder_with_other_results_is_noticed(small, monkeypatch):
    monkeypatch.setattr(propagation, "_causal", lambda encoder, pages, has_fast_path: pages)
    records = bench_propagation(repetitions=1)
    assert [record.correct for record in records] == [True, True, False, True]
