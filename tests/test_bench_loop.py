"""The step of the whole machine beside its peers: the same machine, checked, then timed."""

import functools

import pytest
import torch

from nsm_graph.bench import bench_loop, loop, packages, plain


def test_the_loop_is_compared_with_machines_that_are_the_same(monkeypatch):
    monkeypatch.setattr(packages, "PACKAGES", {})
    records = bench_loop(repetitions=1, scale=1 / 16)
    assert all(record.correct for record in records)
    peers = [record.peer for record in records if record.case.endswith("S16")]
    assert peers == ["message passing", "dense loop", "LSTM", "GRU", "its products"]
    assert {"LSTM", "GRU", "Transformer"} < {r.peer for r in records if r.case.endswith("S64")}


@pytest.mark.slow
def test_a_machine_by_hand_that_is_another_is_noticed(monkeypatch):
    def wrong(machine, x, num_examples):
        return plain.dense_loop(machine, x.flip(0), num_examples)

    monkeypatch.setitem(loop.PEERS, "dense loop", functools.partial(loop._by_hand, wrong))
    records = bench_loop(repetitions=1, scale=1 / 16)
    assert [record.peer for record in records if not record.correct] == ["dense loop"]


@pytest.mark.parametrize("name", packages.PACKAGES)
def test_a_public_package_reads_as_many_tokens(name):
    pytest.importorskip(name.replace("-", "_"), reason=f"needs {name}")
    peers = packages.make_packages(torch.randn(2, 32, 8), states=4, heads=2, segment=16)
    module, read = peers[name]
    out = read()
    assert out.shape[0] == 2 and out.shape[1] in (32, 10)
    out.square().mean().backward()
    assert any(p.grad is not None for p in module.parameters())


@pytest.mark.slow
def test_packages_are_told_apart_from_what_must_be_equal(monkeypatch):
    layer = torch.nn.Linear(64, 3)
    fake = {"another-package": lambda x, *sizes: (layer, lambda: layer(x))}
    monkeypatch.setattr(packages, "PACKAGES", fake)
    monkeypatch.setattr(packages, "find_spec", lambda name: name == "another_package")
    records = bench_loop(repetitions=1, scale=1 / 16)
    others = [record for record in records if record.peer == "another-package"]
    assert len(others) == 2
    assert all("another model, 195 parameters" in record.note for record in others)
