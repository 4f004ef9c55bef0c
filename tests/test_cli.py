"""The command line end to end, and every error of the user in one line."""

import json
import subprocess
import sys

import pytest
import yaml

from nsm_graph.cli import main

QUICK = {
    "data": {"name": "digits"},
    "model": {"kind": "gru", "channels": 8},
    "train": {"epochs": 1},
    "compare": "lstm",
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(QUICK))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "config.yaml").write_text(yaml.safe_dump(QUICK))
    argv = ["--config", str(folder / "config.yaml"), "--out", str(folder / "run")]
    assert main(["train", *argv, "--seed", "1"]) == 0
    return folder / "run"


def failure(capsys, *argv):
    """The error line of a command that must fail."""
    assert main(list(argv)) == 2
    error = capsys.readouterr().err
    lines = error.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("nsm-graph: error: ")
    return lines[0]


def test_a_run_directory_has_everything(run):
    names = {"checkpoint", "compare", "config.yaml", "metrics.jsonl", "result.json", "tensorboard"}
    assert {entry.name for entry in run.iterdir()} == names
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 1
    result = json.loads((run / "result.json").read_text())
    assert result["model"] == "gru"
    assert 0 <= result["test"]["accuracy"] <= 1
    assert list((run / "tensorboard").iterdir())
    rival = json.loads((run / "compare" / "lstm" / "result.json").read_text())
    assert abs(rival["parameters"] / result["parameters"] - 1) < 0.2


def test_train_shows_all_models_in_one_table(config, tmp_path, capsys):
    assert main(["train", "--config", config, "--out", str(tmp_path / "run")]) == 0
    table = capsys.readouterr().out
    for word in ("model", "parameters", "test accuracy", "seconds", "gru", "lstm"):
        assert word in table


def test_evaluate_repeats_the_result_of_the_training(run, tmp_path, capsys):
    assert main(["evaluate", str(run), "--json", str(tmp_path / "metrics.json")]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert json.loads(capsys.readouterr().out) == metrics
    trained = json.loads((run / "result.json").read_text())["test"]
    assert metrics["accuracy"] == trained["accuracy"]
    assert metrics["examples"] == 360


def test_evaluate_a_length(run, tmp_path, capsys):
    assert main(["evaluate", str(run), "--length", "16"]) == 0
    assert json.loads(capsys.readouterr().out)["length"] == 16
    assert "--length: expected at least 1" in failure(capsys, "evaluate", str(run), "--length", "0")


def test_info_lists_versions_devices_and_backends(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("torch-geometric", "versions", "devices", "cpu", "backends", "reference"):
        assert word in out


def test_help_names_the_commands(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("train", "evaluate", "info"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "command: expected one of train, evaluate, history, bench, info; got nothing"),
        (["trian"], "got 'trian'"),
        (["train"], "train: expected a TASK first, or --config FILE; got neither"),
        (["train", "chess"], "task: expected one of a5, bindings, copy, digits, induction,"),
        (["train", "digits", "--config", "x.yaml"], "got both"),
        (["train", "digits", "--train.epoch", "1"], "unrecognized arguments: --train.epoch"),
        (["train", "digits", "--train.epochs", "x"], "train.epochs"),
        (["train", "digits", "--train.epochs", "0"], "train.epochs: expected at least 1; got 0"),
        (["train", "digits", "--compare", "cnn"], "compare: expected one of gru"),
        (["train", "digits", "--data.fold", "1"], "fold"),
        (["train", "mnist", "--data.root", "nowhere"], "nowhere"),
        (["train", "text", "--data.path", "nowhere.txt"], "nowhere.txt"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["evaluate"], "evaluate: expected a run directory first; got nothing"),
        (["evaluate", "nowhere"], "evaluate: expected a run directory with config.yaml; nowhere"),
    ],
)
def test_user_errors_are_one_line_and_leave_nothing(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in failure(capsys, *argv)
    assert not list(tmp_path.iterdir())


def test_a_taken_run_directory_is_left_alone(run, config, capsys):
    before = (run / "result.json").read_text()
    error = failure(capsys, "train", "--config", config, "--out", str(run))
    assert "--out: expected a new or empty folder" in error
    assert (run / "result.json").read_text() == before


def test_an_unwritable_run_directory_is_named(config, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    error = failure(capsys, "train", "--config", config, "--out", str(tmp_path / "file" / "run"))
    assert "--out: cannot write to" in error


def test_a_damaged_checkpoint_is_named(config, capsys, tmp_path):
    out = tmp_path / "run"
    argv = ["train", "--config", config, "--out", str(out), "--compare", "none"]
    assert main(argv) == 0
    capsys.readouterr()
    file = out / "checkpoint" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file} is damaged" in failure(capsys, "evaluate", str(out))
    file.unlink()
    assert f"cannot read {file}" in failure(capsys, "evaluate", str(out))


def test_a_run_that_fails_at_once_leaves_nothing(config, capsys, tmp_path):
    argv = ["train", "--config", config, "--out", str(tmp_path / "run"), "--train.lr", "1e30"]
    failure(capsys, *argv, "--train.clip", "1e30", "--train.warmup", "0")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["jsonargparse", "lightning_fabric", "rich", "safetensors"])
def test_a_missing_extra_says_what_to_install(missing, config, capsys, tmp_path, monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] == missing or name.startswith("nsm_graph.training"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    error = failure(capsys, "train", "--config", config, "--out", str(tmp_path / "run"))
    assert error.endswith("is not installed; run: pip install 'nsm-graph[train]'")
    assert not (tmp_path / "run").exists()


def test_importing_the_command_line_is_light():
    heavy = ("lightning_fabric", "jsonargparse", "rich", "sklearn", "tensorboard", "safetensors")
    code = f"import nsm_graph.cli, sys; print([n for n in {heavy} if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--data.seed", "3"], "data.seed: expected 0, as the run was trained; got 3"),
        (["--data.augment", "true"], "data.augment: expected False"),
        (["--model.channels", "9"], "model.channels: expected 8"),
        (["--train.batch_size", "1"], "train.batch_size: expected 64"),
    ],
)
def test_evaluate_refuses_what_would_change_the_meaning(override, message, run, capsys):
    assert message in failure(capsys, "evaluate", str(run), *override)


def test_evaluate_json_must_have_a_folder(run, capsys, tmp_path):
    path = tmp_path / "no" / "result.json"
    assert "--json: expected a file in a folder" in failure(
        capsys, "evaluate", str(run), "--json", str(path)
    )
    assert "Is a directory" in failure(capsys, "evaluate", str(run), "--json", str(tmp_path))
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}*"))


@pytest.mark.parametrize("compare", ["gru,gru", "gru,none"])
def test_compare_is_checked_before_training(compare, config, capsys, tmp_path):
    run = tmp_path / "run"
    assert "compare" in failure(
        capsys, "train", "--config", config, "--compare", compare, "--out", str(run)
    )
    assert not run.exists()


def test_a_run_cut_short_says_so(config, capsys, tmp_path):
    argv = ["--train.epochs", "500", "--train.max_seconds", "2", "--compare", "none"]
    assert main(["train", "--config", config, "--out", str(tmp_path / "run"), *argv]) == 0
    assert "Time ran out: train.max_seconds ended the run after" in capsys.readouterr().out


def test_a_text_model_is_not_evaluated_on_another_alphabet(capsys, tmp_path):
    texts = {"a.txt": "abcd" * 500, "b.txt": "bcde" * 500}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    argv = ["--model.state_channels", "8", "--model.token_channels", "8", "--train.epochs", "1"]
    run = str(tmp_path / "run")
    assert main(["train", "text", "--data.path", str(tmp_path / "a.txt"), "--out", run, *argv]) == 0
    capsys.readouterr()
    assert main(["evaluate", run]) == 0
    capsys.readouterr()
    message = failure(capsys, "evaluate", run, "--data.path", str(tmp_path / "b.txt"))
    assert "data.path: expected the 4 characters of the text of the training" in message


def test_history_shows_the_edits_of_the_memory(run, tmp_path, capsys):
    assert main(["history", str(run), "--memory"]) == 0
    assert "no edits" in capsys.readouterr().out
    edits = [
        {"step": 20, "kind": "merge", "slots": [[1, 4]], "reason": "alike", "num_active": 7},
        {"step": 1040, "kind": "prune", "slots": [0, 3], "reason": "idle", "num_active": 5},
    ]
    edits = [{"scope": "global", **edit} for edit in edits]
    one = {"scope": "example", "example": 1, "segment": 7, "reason": "new", "num_active": 4}
    edits.append({"step": 1100, "kind": "allocate", "slots": [3], **one})
    lines = [{"split": "train", "step": 1, "loss": 1.0}]
    lines += [{"split": "memory", **edit} for edit in edits]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["history", str(tmp_path), "--memory"]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown[1:] == [
        ["20", "all", "merge", "7", "1+4:", "alike"],
        ["1040", "all", "prune", "5", "0,", "3:", "idle"],
        ["1100", "1,", "segment", "7", "allocate", "4", "3:", "new"],
    ]


def test_a_history_of_nothing(tmp_path, capsys):
    assert "has none" in failure(capsys, "history", str(tmp_path), "--memory")
