"""Checkpoints: whole or not at all, named when damaged, never pickled."""

import contextlib
import json
import os

import pytest
import torch
from torch import nn

from nsm_graph.training import checkpoint
from nsm_graph.training.checkpoint import load_checkpoint, save_checkpoint


def trained(seed, steps=2):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
    return model, optimizer


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


@pytest.fixture
def saved(tmp_path):
    model, optimizer = trained(0)
    path = tmp_path / "checkpoint"
    save_checkpoint(path, model, optimizer, {"step": 1}, {"torch": torch.get_rng_state()})
    return path, model, optimizer


def test_round_trip_goes_on_exactly(saved):
    path, model, optimizer = saved
    expected_noise = torch.rand(3)
    other, other_optimizer = trained(1)
    meta, generators = load_checkpoint(path, other, other_optimizer)
    assert meta == {"step": 1}
    assert same(model.state_dict(), other.state_dict())
    torch.set_rng_state(generators["torch"])
    assert torch.equal(torch.rand(3), expected_noise)
    for m, o in ((model, optimizer), (other, other_optimizer)):
        o.zero_grad()
        m(torch.ones(5, 3) * torch.arange(5.0).view(-1, 1)).pow(2).sum().backward()
        o.step()
    assert same(model.state_dict(), other.state_dict())


def test_there_are_only_tensors_and_json(saved):
    path, *_ = saved
    names = ["meta.json", "model.safetensors", "optimizer.safetensors"]
    assert sorted(file.name for file in path.iterdir()) == names
    json.loads((path / "meta.json").read_text())


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.META])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped"])
def test_a_damaged_file_is_named(saved, name, damage):
    path, *_ = saved
    data = (path / name).read_bytes()
    if damage == "missing":
        (path / name).unlink()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        broken = {"empty": b"", "truncated": data[:middle], "flipped": flipped}
        (path / name).write_bytes(broken[damage])
    model, optimizer = trained(1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"checkpoint: .*{name}"):
        load_checkpoint(path, model, optimizer)
    assert same(model.state_dict(), before)


def test_a_missing_checkpoint_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint: expected the folder .* train first"):
        load_checkpoint(tmp_path / "checkpoint", nn.Linear(1, 1))


def test_another_model_is_refused(saved):
    path, *_ = saved
    with pytest.raises(ValueError, match=r"has '0.bias', which the model does not"):
        load_checkpoint(path, nn.Linear(3, 4))
    wider = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    with pytest.raises(ValueError, match=r"'0.weight' .* expected \(5, 3\); got \(4, 3\)"):
        load_checkpoint(path, wider)


class Crash(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("target", ["_write", "_sync", "rename"])
@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_crash_leaves_the_old_or_the_new_checkpoint(saved, monkeypatch, target, call):
    path, old, _ = saved
    new, optimizer = trained(5)
    where = os if target == "rename" else checkpoint
    real, calls = getattr(where, target), []

    def crash(*args):
        calls.append(args)
        if len(calls) > call:
            raise Crash
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(where, target, crash)
        with contextlib.suppress(Crash):
            save_checkpoint(path, new, optimizer, {"step": 2})
    model, _ = trained(9)
    meta, _ = load_checkpoint(path, model)
    expected = {1: old, 2: new}[meta["step"]]
    assert same(model.state_dict(), expected.state_dict())
    # The next one is written as if nothing had happened, and leaves nothing beside it.
    save_checkpoint(path, new, optimizer, {"step": 3})
    assert load_checkpoint(path, model)[0] == {"step": 3}
    assert [entry.name for entry in path.parent.iterdir()] == ["checkpoint"]


def test_tied_weights_are_kept(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    save_checkpoint(tmp_path / "c", model, torch.optim.SGD(model.parameters()), {})
    load_checkpoint(tmp_path / "c", model)
    assert model[1].weight is model[0].weight
