"""The loop: it learns, repeats itself, keeps the right checkpoint, and is the same for all."""

import json

import pytest
import torch
from torch_geometric import seed_everything
from torch_geometric.data import Data

from nsm_graph.data import DatasetInfo, Splits
from nsm_graph.models.baselines import count_parameters
from nsm_graph.training import Config
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
    assert len(losses) == 8
    assert losses[-1] < 0.95 * losses[0]


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
    assert meta["epoch"] == fitted.kept_epoch
    assert {"torch", "order"} <= generators.keys()


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
    assert {p.dim() for p in decayed["params"]} == {2}
    assert decayed["weight_decay"] > 0
    assert {p.dim() for p in kept["params"]} == {1}
    assert kept["weight_decay"] == 0


def test_empty_splits_and_a_bad_loss_are_named(make_splits, make_config, tmp_path):
    with pytest.raises(ValueError, match=r"train.keep: best needs a validation split"):
        train(make_config(), make_splits(sizes=(8, 0, 8)), tmp_path / "a")
    _, fitted = train(make_config(keep="last"), make_splits(sizes=(8, 0, 8)), tmp_path / "b")
    assert fitted.validation == {}
    with pytest.raises(ValueError, match=r"data: expected training examples; tiny has none"):
        train(make_config(), make_splits(sizes=(0, 8, 8)), tmp_path / "c")
    config = make_config(lr=1e30, clip=1e30, warmup=0.0)
    with pytest.raises(ValueError, match=r"loss: expected a finite number; got .* at step"):
        train(config, make_splits("regression"), tmp_path / "d")


def test_bf16_and_double_precision_run(make_splits, make_config, tmp_path):
    for precision in ("bf16-mixed", "64-true"):
        _, fitted = train(make_config(precision=precision), make_splits(), tmp_path / precision)
        assert fitted.validation["loss"] < 1.0


# The machine itself ############################################################


def machine_config(**values):
    model = {"kind": "nsm", "state_channels": 16, "num_states": 3, "heads": 2}
    train = {"epochs": 8, "batch_size": 8, "lr": 0.02}
    data = values.pop("data", {})
    return Config.from_dict({"data": data, "model": model | values, "train": train})


@pytest.mark.parametrize("task", ["classification", "regression", "token_classification"])
def test_the_machine_learns_every_task(task, make_splits, tmp_path):
    train(machine_config(segment_length=4), make_splits(task), tmp_path / "run")
    losses = [line["loss"] for line in log(tmp_path / "run")]
    assert losses[-1] < 0.95 * losses[0]


def test_the_machine_learns_text(text_splits, tmp_path):
    data = {"name": "text", "chunk_length": 16}
    config = machine_config(segment_length=4, data=data)
    _, fitted = train(config, text_splits, tmp_path / "run")
    assert fitted.validation["loss"] < 1.0


def test_the_machine_learns_graphs(tmp_path):
    def graphs(seed):
        generator = torch.Generator().manual_seed(seed)
        result = []
        for _ in range(32):
            x = torch.randint(3, (5, 1), generator=generator)
            ring = torch.stack([torch.arange(5), (torch.arange(5) + 1) % 5])
            y = (x == 0).sum().view(1, 1).float()
            result.append(Data(x=x, edge_index=ring, edge_attr=torch.ones(5).long(), y=y))
        return result

    info = DatasetInfo("rings", "regression", 1, 3, 1, edge_embeddings=2)
    splits = Splits(graphs(0), graphs(1), graphs(2), info)
    _, fitted = train(machine_config(num_steps=2, conv="gine"), splits, tmp_path / "run")
    losses = [line["loss"] for line in log(tmp_path / "run")]
    assert losses[-1] < 0.8 * losses[0]
    assert fitted.validation["mae"] < 1.0


def test_the_machine_repeats_itself_and_knows_its_optimizer(make_splits, tmp_path):
    config, weights = machine_config(segment_length=4, dropout=0.1), []
    for name in ("one", "two"):
        model, _ = train(config, make_splits(), tmp_path / name)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)
    optimizer = make_optimizer(model, config.train)
    with pytest.raises(ValueError, match=r"bank"):
        model.manager.register_optimizer(torch.optim.SGD([torch.zeros(1)]))
    assert any(p is model.manager.bank for p in optimizer.param_groups[0]["params"])


def test_training_edits_the_node_set_and_writes_it_down(make_splits, text_splits, tmp_path):
    memory = {"every": 2, "grow_above": 0.0, "prune_below": 0.9, "max_states": 6, "protect": 2}
    for name, splits in (("tiny", make_splits()), ("text", text_splits)):
        config = machine_config(segment_length=4, max_states=8)
        config = Config.from_dict({**config.to_dict(), "memory": memory})
        train(config, splits, tmp_path / name)
        edits = log(tmp_path / name, "memory")
        assert {edit["kind"] for edit in edits} >= {"allocate"}, name
        assert all(edit["step"] % 2 == 0 and edit["num_active"] <= 6 for edit in edits)


def test_examples_with_node_sets_of_their_own_are_counted_and_told_of(tmp_path, capsys):
    from nsm_graph.cli import main

    run = tmp_path / "run"
    small = ["--data.max_length", "12", "--data.train_examples", "64", "--data.test_examples", "16"]
    model = ["--model.state_channels", "16", "--model.token_channels", "16", "--model.heads", "2"]
    model += ["--model.address_channels", "4"]
    size = ["--train.epochs", "2", "--train.batch_size", "16", "--memory.state_cost", "0.5"]
    arguments = [*small, *model, *size, "--train.threads", "1", "--compare", "gru"]
    assert main(["train", "bindings", *arguments, "--out", str(run)]) == 0
    validation = log(run, "validation")
    assert all(0 <= line["states_within_one"] <= 1 <= line["num_states"] for line in validation)
    events = log(run, "memory")
    assert {event["scope"] for event in events} == {"example"}
    assert {event["example"] for event in events} <= {0, 1}
    capsys.readouterr()
    assert main(["history", str(run), "--memory"]) == 0
    assert "no state explains the token" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--length", "20"]) == 0
    pruned = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(run), "--length", "20", "--keep-states"]) == 0
    kept = json.loads(capsys.readouterr().out)
    assert pruned["num_states"] <= kept["num_states"]
    assert 0 <= pruned["states_within_one"] <= 1
