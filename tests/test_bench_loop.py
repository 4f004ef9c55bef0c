"""The step of the whole machine beside its peers: the same machine, checked, then timed."""

import functools

from nsm_graph.bench import bench_loop, loop, plain


def test_the_loop_is_compared_with_machines_that_are_the_same():
    records = bench_loop(repetitions=1, scale=1 / 16)
    assert all(record.correct for record in records)
    peers = [record.peer for record in records if record.case.endswith("S16")]
    assert peers == ["message passing", "dense loop", "LSTM", "GRU", "its products"]
    assert {"LSTM", "GRU", "Transformer"} < {r.peer for r in records if r.case.endswith("S64")}


def test_a_machine_by_hand_that_is_another_is_noticed(monkeypatch):
    def wrong(machine, x, num_examples):
        return plain.dense_loop(machine, x.flip(0), num_examples)

    monkeypatch.setitem(loop.PEERS, "dense loop", functools.partial(loop._by_hand, wrong))
    records = bench_loop(repetitions=1, scale=1 / 16)
    assert [record.peer for record in records if not record.correct] == ["dense loop"]
