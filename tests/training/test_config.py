"""Configs: every refused value is named, with what was expected; YAML and overrides meet."""

from pathlib import Path

import pytest
import yaml

from nsm_graph.training import Config, DataConfig, ModelConfig, TrainConfig
from nsm_graph.training.parse import RECIPES, config_parser, parse, recipe

NSM = {"state_channels": 8, "num_states": 4}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pe": "magic", "pe_channels": 2}, "data.pe: expected one of random_walk, laplacian"),
        ({"pe": "laplacian"}, "data.pe, data.pe_channels: expected both or none"),
        ({"validation_fraction": 2.0}, "data.validation_fraction: expected at least 0 and at most"),
        ({"name": "tu", "augment": True}, "data.augment: expected images .* got tu"),
        ({"name": "mnist", "permuted": True, "augment": True}, "got mnist permuted"),
        ({"chunk_length": 8}, "data.chunk_length: expected only with data.name=text"),
        ({"fold": "one"}, r"data.fold: expected int \| None; got 'one'"),
    ],
)
def test_data_errors(values, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "rnn"}, "model.kind: expected one of nsm, gru, .*, deltanet; got 'rnn'"),
        ({}, "model.state_channels: expected a number"),
        (NSM, "model.segment_length, model.num_steps: expected one of them"),
        (NSM | {"segment_length": 4, "num_steps": 2}, "expected one of them.*got 4 and 2"),
        (NSM | {"segment_length": 0}, "model.segment_length: expected at least 1; got 0"),
        (NSM | {"segment_length": 4, "mix": "x"}, "model.mix: expected one of sum, bias"),
        (NSM | {"segment_length": 4, "conv": "gin"}, "model.conv: expected only with num_steps"),
        (NSM | {"segment_length": 4, "dropout": 1.0}, "model.dropout: .*at most 0.99; got 1.0"),
        (NSM | {"segment_length": 4, "channels": 8}, "model.channels: expected only with a base"),
        ({"kind": "gru"}, "model.channels: expected a number with model.kind=gru"),
        ({"kind": "gru", "channels": True}, "model.channels: expected int"),
        (
            {"kind": "gru", "channels": 8, "num_states": 4},
            "model.num_states: expected only channels, tie_embeddings with model.kind=gru; got num",
        ),
    ],
)
def test_model_errors(values, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "train.epochs, train.max_seconds: expected at least one"),
        ({"epochs": 0}, "train.epochs: expected at least 1; got 0"),
        ({"epochs": 1.5}, "train.epochs: expected int"),
        ({"epochs": 1, "lr": 0.0}, "train.lr: expected above 0; got 0.0"),
        ({"epochs": 1, "lr": float("nan")}, "train.lr: expected above 0; got nan"),
        ({"epochs": 1, "keep": "all"}, "train.keep: expected one of best, last; got 'all'"),
        ({"epochs": 1, "devices": 2}, "train.devices: expected 1"),
        ({"epochs": 1, "threads": 0}, "train.threads: expected at least 1; got 0"),
        ({"epochs": 1, "precision": "8"}, "train.precision: expected one of 32-true"),
    ],
)
def test_train_errors(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**values)


def test_unknown_keys_are_refused():
    good = {"model": {"kind": "gru", "channels": 8}, "train": {"epochs": 1}}
    with pytest.raises(ValueError, match=r"train.epoch: unknown key; expected one of epochs"):
        Config.from_dict(good | {"train": {"epoch": 1}})
    with pytest.raises(ValueError, match=r"trian: unknown key"):
        Config.from_dict(good | {"trian": {}})
    with pytest.raises(ValueError, match=r"compare: expected one of gru.*got 'rnn'"):
        Config.from_dict(good | {"compare": "gru,rnn"})


def test_only_what_is_given_goes_to_the_dataset():
    assert DataConfig(name="tu", dataset="PROTEINS", fold=0).options == {
        "dataset": "PROTEINS",
        "fold": 0,
    }


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid_and_survive_a_round_trip(path, tmp_path):
    config, own = parse(config_parser("test", ""), [], base=recipe(path.stem))
    config.save(tmp_path / "config.yaml")
    again, _ = parse(config_parser("test", ""), [], base=tmp_path / "config.yaml")
    assert again == config
    assert own == {}


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "config.yaml"
    values = {"model": {"kind": "gru", "channels": 8}, "train": {"epochs": 1, "lr": 1e-3}}
    file.write_text(yaml.safe_dump(values))
    argv = ["--config", str(file), "--train.lr", "1e-2", "--seed", "3", "--data.root", "here"]
    config, _ = parse(config_parser("test", ""), argv)
    assert (config.train.lr, config.train.epochs, config.seed) == (0.01, 1, 3)
    assert config.data.root == "here"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.epoch", "1"], "unrecognized arguments: --train.epoch 1; --help"),
        (["--train.epochs", "many"], "train.epochs.*many"),
        (["--train.epo", "1"], "unrecognized"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_command_line_errors_are_one_line(argv, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(config_parser("test", ""), argv, base=recipe("digits"))
    assert "\n" not in str(error.value)


def test_damaged_yaml_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_text("train: [1,\n}")
    with pytest.raises(ValueError, match=r"Problems parsing config"):
        parse(config_parser("test", ""), ["--config", str(tmp_path / "bad.yaml")])
    (tmp_path / "bad.yaml").write_text("train: {epoch: 1}")
    with pytest.raises(ValueError, match=r"train.*epoch.*--help lists every key"):
        parse(config_parser("test", ""), ["--config", str(tmp_path / "bad.yaml")])


def test_unknown_task_lists_the_tasks():
    with pytest.raises(ValueError, match=r"expected one of a5, .*digits, .*mnist, .*; got 'chess'"):
        recipe("chess")


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_valid(path):
    parse(config_parser("test", ""), ["--config", str(path)])


@pytest.mark.parametrize(
    ("model", "memory", "message"),
    [
        ({}, {"every": 2, "grow_above": 0.5}, "expected room to grow; .* set model.max_states"),
        ({"max_states": 8}, {"every": 2, "prune_below": 0.5, "max_states": 2}, "expected 4 to 8"),
        ({}, {"every": 2, "prune_below": 0.5, "max_states": 9}, "memory.max_states: expected 4"),
        ({}, {"every": 2, "prune_below": 0.5, "min_states": 5}, "memory.min_states: expected at"),
        ({}, {"every": 2}, "memory.every: expected together with one of prune_below"),
        ({}, {"prune_below": 0.5}, "memory.every: expected together with"),
        ({}, {"every": 2, "prune_below": 0.5, "signal": "hope"}, "memory.signal: expected one of"),
        ({}, {"state_cost": 0.1}, "memory.state_cost: .* set model.address_channels, too"),
        ({"address_channels": 4}, {"state_cost": -1.0}, "memory.state_cost"),
        ({"state_budget": 3.0}, {}, "model.state_budget: .* set model.address_channels, too"),
        ({"address_channels": 4, "state_budget": 0.5}, {}, "model.state_budget"),
        ({"address_channels": 4, "presence_gate": "soft"}, {}, "model.presence_gate: expected one"),
    ],
)
def test_memory_errors(model, memory, message):
    values = {"model": NSM | {"segment_length": 4} | model, "train": {"epochs": 1}}
    with pytest.raises(ValueError, match=message):
        Config.from_dict({**values, "memory": memory})
