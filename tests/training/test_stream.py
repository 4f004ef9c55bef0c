"""Sequence tasks from the command line: trained short, evaluated at any length in pieces."""

import json

import pytest
import torch

from nsm_graph.cli import main
from nsm_graph.data.tasks import make_task
from nsm_graph.nn import SegmentScan
from nsm_graph.training import Config
from nsm_graph.training.build import build_model
from nsm_graph.training.checkpoint import load_checkpoint
from nsm_graph.training.loop import make_engine
from nsm_graph.training.run import load_data, train_run
from nsm_graph.training.stream import StreamTest, evaluate_stream, spread_lengths

SCAN = {
    "kind": "nsm",
    "state_channels": 16,
    "num_states": 2,
    "segment_length": 8,
    "scan_layers": 1,
    "memory_heads": 1,
}


def config(name="s3", model=SCAN, **train):
    data = {"name": name, "max_length": 12, "train_examples": 32, "test_examples": 8}
    train = {"epochs": 1, "batch_size": 8, "keep": "last", **train}
    return Config.from_dict({"data": data, "model": dict(model), "train": train})


def engine_of(run):
    torch.manual_seed(0)
    return make_engine(build_model(run, load_data(run).info), run)


def by_hand(engine, task, length, count):
    from nsm_graph.data.sequences import TEST_SEED

    x, y = task.sample(count, length, torch.Generator().manual_seed(TEST_SEED))
    out = torch.stack([engine(row).argmax(-1) for row in x])
    right, asked = out == y, y != -100
    return {
        "accuracy": (right & asked).sum().item() / asked.sum().item(),
        "final_accuracy": right[:, -1].double().mean().item(),
        "full_sequence_accuracy": (right | ~asked).all(1).double().mean().item(),
    }


@pytest.mark.parametrize("name", ["s3", "modular_arithmetic"])
@pytest.mark.parametrize(
    "model", [SCAN, {"kind": "gru", "channels": 8}, {"kind": "deltanet", "channels": 8}], ids=str
)
def test_pieces_are_scored_like_whole_sequences(name, model, monkeypatch):
    monkeypatch.setattr("nsm_graph.training.stream.PIECE", 16)
    run = config(name, model)
    engine, task = engine_of(run), make_task(name)
    engine.eval()
    got = evaluate_stream(
        engine, StreamTest(task, 41, 6), built_for=run.model.segment_length, carries=True
    )
    expected = by_hand(engine, task, 41, 6)
    assert {key: got[key] for key in expected} == pytest.approx(expected)
    chance = task.chance
    scaled = (got["accuracy"] - chance) / (1 - chance)
    assert got["scaled_accuracy"] == pytest.approx(scaled)


def test_a_range_of_lengths_is_spread_evenly_over_those_that_the_task_has():
    lengths = spread_lengths(make_task("modular_arithmetic"), 40, 256)
    assert lengths[0] == 41
    assert lengths[-1] == 255
    assert len(lengths) == 10
    assert all(length % 2 == 1 for length in lengths)
    assert spread_lengths(make_task("parity"), 7, 7) == [7]


def test_from_the_command_line(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "metrics.json"
    (tmp_path / "c.yaml").write_text(json.dumps(config(random_segments=True).to_dict()))
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--out", str(run)]) == 0
    more = ["--segment-length", "3", "--examples", "4", "--snap", "64", "--json", str(out)]
    assert main(["evaluate", str(run), "--length", "50", *more]) == 0
    metrics = json.loads(out.read_text())
    assert {key: metrics[key] for key in ("length", "segment_length", "examples", "snap")} == {
        "length": 50,
        "segment_length": 3,
        "examples": 4,
        "snap": 64,
    }
    assert 0 <= metrics["accuracy"] <= 1
    assert main(["evaluate", str(run), "--length", "10:30", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["length"][0] == 10
    capsys.readouterr()
    for arguments, message in (
        (["--length", "x"], "--length: expected a number, or A:B"),
        (["--length", "30:10"], "--length: expected A:B with A at most B; got 30:10"),
        (["--segment-length", "0"], "--segment-length: expected at least 1; got 0"),
        (["--examples", "0"], "--examples: expected at least 1; got 0"),
        (["--snap", "0"], "--snap: expected at least 1; got 0"),
    ):
        assert main(["evaluate", str(run), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_gates_are_soft_at_first_and_hard_at_the_end(tmp_path, monkeypatch):
    seen = []
    harden = SegmentScan.harden
    monkeypatch.setattr(
        SegmentScan, "harden", lambda scan, share: (seen.append(share), harden(scan, share))[0]
    )
    run = config(model={**SCAN, "stretch": 2.0}, harden=True, epochs=10)
    train_run(run, tmp_path / "run", quiet=True)
    assert len(seen) == 40 + 10  # before every step, and once more after every epoch
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0.0, 1.0)
    model = build_model(run, load_data(run).info)
    for layer in model.cell.scan.layers:
        for heads in layer.children():
            heads.stretch.zero_()
    load_checkpoint(tmp_path / "run" / "checkpoint", model)
    assert all(v == 2.0 for k, v in model.state_dict().items() if k.endswith("stretch"))


def test_gates_are_hard_at_the_end_of_the_shortest_run(tmp_path):
    run = config(harden=True, epochs=1, batch_size=32)  # a single step
    train_run(run, tmp_path / "run", quiet=True)
    model = build_model(run, load_data(run).info)
    load_checkpoint(tmp_path / "run" / "checkpoint", model)
    assert model.cell.scan.layers[0].transition.stretch == 0.5


def test_what_a_scan_needs_is_named():
    with pytest.raises(ValueError, match=r"train.harden: expected only with an ordered scan"):
        config(model={**SCAN, "scan_layers": None, "memory_heads": None}, harden=True)
    with pytest.raises(ValueError, match=r"train.harden: expected train.keep=last"):
        config(harden=True, keep="best")
    config(model={"kind": "gru", "channels": 8}, harden=True)  # a rival, trained in the same loop
    with pytest.raises(ValueError, match=r"model.reflections: expected only with an ordered scan"):
        config(model={**SCAN, "scan_layers": None, "memory_heads": None, "reflections": 2})


@pytest.mark.slow
@pytest.mark.parametrize("segment", ["1", "16", "64"])
def test_parity_is_learned_short_and_holds_long(segment, tmp_path_factory, capsys):
    folder = tmp_path_factory.getbasetemp() / "parity"
    if not folder.exists():  # trained once for the three
        assert main(["train", "parity", "--out", str(folder)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(folder), "--length", "256", "--segment-length", segment]) == 0
    assert json.loads(capsys.readouterr().out)["final_accuracy"] >= 0.99
