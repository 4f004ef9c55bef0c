"""The loop: it learns, repeats itself, keeps the right checkpoint, and is the same for all."""

import json

import pytest
import torch
from torch_geometric import seed_everything

from nsm_graph.models.baselines import count_parameters
from nsm_graph.training.build import build_model, matched_baseline
from nsm_graph.training.checkpoint import load_checkpoint
from nsm_graph.training.loop import fit, make_optimizer


def train(config, splits, run):
    run.mkdir()
    seed_everything(config.seed)
    model = build_model(config, splits.info)
    return model, fit(model, splits, config, run, quiet=True)


def log(run, split="train"):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


@pytest.mark.parametrize("kind", ["gru", "lstm", "transformer"])
@pytest.mark.parametrize("task", ["classification", "regression", "token_classification"])
def test_every_model_learns_every_task(kind, task, make_splits, make_config, tmp_path):
    config = make_config(kind, epochs=8)
    train(config, make_splits(task), tmp_path / "run")
    losses = [line["loss"] for line in log(tmp_path / "run")]
    assert len(losses) == 8 and losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("kind", ["gru", "transformer"])
def test_text_is_learned_with_carried_states(kind, text_splits, make_config, tmp_path):
    config = make_config(kind, epochs=8, batch_size=4)
    config.data.chunk_length = 16
    _, fitted = train(config, text_splits, tmp_path / "run")
    assert fitted.validation["loss"] < 1.0 < log(tmp_path / "run")[0]["loss"]


def test_the_same_seed_gives_the_same_weights(make_splits, make_config, tmp_path):
    config, weights = make_config(max_seconds=600.0), []
    for name in ("one", "two"):
        model, _ = train(config, make_splits(), tmp_path / name)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)
    config.seed = 1
    model, _ = train(config, make_splits(), tmp_path / "three")
    assert not torch.equal(
        weights[0], torch.cat([p.detach().flatten() for p in model.parameters()])
    )


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_kept_checkpoint_is_the_model_that_comes_back(keep, make_splits, make_config, tmp_path):
    config = make_config(keep=keep, epochs=5)
    model, fitted = train(config, make_splits(), tmp_path / "run")
    fresh = build_model(config, make_splits().info)
    meta, generators = load_checkpoint(
        tmp_path / "run" / "checkpoint", fresh, make_optimizer(fresh, config.train)
    )
    for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)
    scores = [(line["accuracy"], -line["loss"]) for line in log(tmp_path / "run", "validation")]
    assert fitted.kept_epoch == (scores.index(max(scores)) + 1 if keep == "best" else 5)
    assert meta["epoch"] == fitted.kept_epoch and {"torch", "order"} <= generators.keys()


def test_max_seconds_ends_the_run(make_splits, make_config, tmp_path):
    config = make_config(epochs=10_000, max_seconds=0.5)
    _, fitted = train(config, make_splits(), tmp_path / "run")
    assert fitted.seconds < 5.0
    assert log(tmp_path / "run")[-1]["lr"] < 0.2 * config.train.lr


def test_baselines_are_matched_in_parameters(make_splits, make_config):
    info = make_splits().info
    config = make_config("lstm", channels=40)
    target = build_model(config, info)
    for kind in ("gru", "lstm", "transformer"):
        rival = build_model(matched_baseline(config, kind, info, target), info)
        assert abs(count_parameters(rival) / count_parameters(target) - 1) < 0.1


def test_only_matrices_decay(make_splits, make_config):
    config = make_config()
    model = build_model(config, make_splits().info)
    decayed, kept = make_optimizer(model, config.train).param_groups
    assert {p.dim() for p in decayed["params"]} == {2} and decayed["weight_decay"] > 0
    assert {p.dim() for p in kept["params"]} == {1} and kept["weight_decay"] == 0


def test_empty_splits_and_a_bad_loss_are_named(make_splits, make_config, tmp_path):
    with pytest.raises(ValueError, match="train.keep: best needs a validation split"):
        train(make_config(), make_splits(sizes=(8, 0, 8)), tmp_path / "a")
    _, fitted = train(make_config(keep="last"), make_splits(sizes=(8, 0, 8)), tmp_path / "b")
    assert fitted.validation == {}
    with pytest.raises(ValueError, match="data: expected training examples; tiny has none"):
        train(make_config(), make_splits(sizes=(0, 8, 8)), tmp_path / "c")
    config = make_config(lr=1e30, clip=1e30, warmup=0.0)
    with pytest.raises(ValueError, match="loss: expected a finite number; got .* at step"):
        train(config, make_splits("regression"), tmp_path / "d")


def test_bf16_and_double_precision_run(make_splits, make_config, tmp_path):
    for precision in ("bf16-mixed", "64-true"):
        _, fitted = train(make_config(precision=precision), make_splits(), tmp_path / precision)
        assert fitted.validation["loss"] < 1.0
