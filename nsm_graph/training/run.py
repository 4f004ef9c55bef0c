"""Whole runs: a config becomes a run directory; a run directory is evaluated."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch_geometric import seed_everything
from torch_geometric.data import Data

from nsm_graph.data import Splits, TaskSequences, load
from nsm_graph.models import NeuralStateMachine
from nsm_graph.models.baselines import count_parameters
from nsm_graph.training.batches import truncate
from nsm_graph.training.build import build_model, matched_baseline
from nsm_graph.training.checkpoint import load_checkpoint, read_meta
from nsm_graph.training.config import Config
from nsm_graph.training.directory import run_directory, write_whole
from nsm_graph.training.evaluate import evaluate
from nsm_graph.training.loop import Fitted, check_splits, fit, make_engine
from nsm_graph.training.stream import StreamTest, evaluate_stream, spread_lengths
from nsm_graph.training.task import Task


@dataclass(frozen=True)
class Result:
    """One row of the table that a training ends with."""

    model: str
    parameters: int
    metric: str
    test: dict[str, float]
    fitted: Fitted


def train_run(config: Config, run: Path, *, quiet: bool = False) -> list[Result]:
    """Trains the model of a config and the baselines it is compared with.

    The run directory gets `config.yaml`, `metrics.jsonl`, `tensorboard/`, `checkpoint/` and
    `result.json`; each baseline is a run of its own under `compare/`. A baseline has about as many
    parameters as the model and as many seconds of the same loop; it is measured in seconds, so that
    its learning rate ends where the model's ended.

    Raises:
        ValueError: If the config does not fit the data, or the run directory is taken or cannot be
        written.
    """
    splits = load_data(config)
    model, own = _train_one(config, splits, run, quiet)
    results = [own]
    for kind in config.compared:
        same_time = replace(config.train, epochs=None, max_seconds=own.fitted.seconds)
        rival = matched_baseline(config, kind, splits.info, model)
        rival = replace(rival, train=same_time, compare="none")
        results.append(_train_one(rival, splits, run / "compare" / kind, quiet)[1])
    return results


#: What an evaluation may set anew; everything else would change what the number means.
FREE = (
    *("data.root", "data.cache", "data.path"),
    *("train.accelerator", "train.devices", "train.precision", "train.threads"),
)


def check_same_run(trained: Config, config: Config) -> None:
    """Refuses an evaluation under another config than that of the training.

    Raises:
        ValueError: If a key differs that is not about where the data lie or what computes.
    """
    before, now = _flat(trained.to_dict()), _flat(config.to_dict())
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key not in FREE:
            raise ValueError(
                f"{key}: expected {before.get(key)}, as the run was trained; got {now.get(key)}; "
                f"an evaluation may set {', '.join(FREE)}"
            )


def evaluate_run(
    config: Config,
    run: Path,
    length: int | tuple[int, int] | None = None,
    *,
    segment_length: int | None = None,
    examples: int | None = None,
    snap: int | None = None,
    keep_states: bool = False,
) -> dict[str, Any]:
    """Metrics of a run's checkpoint on the test split, or on fresh sequences of a task.

    Args:
        config: The run's config; `data` may differ, as where it lies.
        run: The run directory.
        length: Evaluate on the first so many tokens of each sequence; for a task on sequences of
            that length, of whatever length, in bounded memory, or at :data:`NUM_LENGTHS` lengths
            from one to another, whose metrics are averaged.  (default: :obj:`None`)
        segment_length: Read so many tokens at a time.  (default: :obj:`None`)
        examples: Task: number of sequences.  (default: :obj:`None`)
        snap: Task: draw states to codes that are derived from so many unlabelled sequences of one
            segment.  (default: :obj:`None`)
        keep_states: No state leaves the node set of an example.  (default: :obj:`False`)
    """
    shortest, longest = length if isinstance(length, tuple) else (length, length)
    if shortest is not None and longest is not None and longest < shortest:
        raise ValueError(f"--length: expected A:B with A at most B; got {shortest}:{longest}")
    for name, value in (
        ("length", shortest),
        ("segment-length", segment_length),
        ("examples", examples),
        ("snap", snap),
    ):
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected at least 1; got {value}")
    splits = load_data(config)
    for name, value in (("examples", examples), ("snap", snap)):
        if value is not None and not isinstance(splits.test, TaskSequences):
            raise ValueError(
                f"--{name}: expected only with a sequence task; {splits.info.name} is a dataset"
            )
    for name, value in (("segment-length", segment_length), ("snap", snap)):
        if value is not None and config.model.segment_length is None:
            raise ValueError(
                f"--{name}: expected a machine that reads segments; the run has "
                f"model.kind={config.model.kind}"
            )
    meta = read_meta(run / "checkpoint")
    symbols = meta.get("symbols")
    if symbols != splits.info.symbols:
        raise ValueError(
            f"data.path: expected the {len(symbols or [])} characters of the text of the training; "
            f"got {len(splits.info.symbols or [])}; symbols are numbered by the text"
        )
    model = build_model(config, splits.info)
    load_checkpoint(run / "checkpoint", model)
    if keep_states:
        if config.model.address_channels is None:
            raise ValueError(
                "--keep-states: expected a machine whose examples have node sets of their own; the "
                "run has no model.address_channels"
            )
        model.cell.allocator.prune = False
    about: dict[str, Any] = {"length": length, "model": config.model.kind, "data": splits.info.name}
    if isinstance(splits.test, TaskSequences):
        if snap is not None:
            _fit_snap(model, config, splits.test, snap)
        test = splits.test
        lengths = spread_lengths(test.task, shortest or test.length, longest or test.length)
        engine = make_engine(model, config)
        results = [
            evaluate_stream(
                engine,
                StreamTest(test.task, one, examples or len(test), segment_length),
                built_for=config.model.segment_length,
                carries=config.model.kind != "transformer",
            )
            for one in lengths
        ]
        metrics = {key: statistics.fmean(r[key] for r in results) for key in results[0]}
        about |= {"length": lengths if len(lengths) > 1 else lengths[0], "snap": snap}
        about |= {"examples": examples or len(test)}
        about |= {"segment_length": segment_length or config.model.segment_length}
        return metrics | about
    if isinstance(length, tuple):
        raise ValueError("--length: A:B is for sequence tasks; give one length")
    test_split = splits.test
    if length is not None:
        test_split = [truncate(data, length, splits.info) for data in splits.test]
    metrics = _test(model, splits, config, Task.from_dict(meta["task"]), test_split, segment_length)
    return {**metrics, "examples": len(test_split), **about}


def _fit_snap(model: nn.Module, config: Config, split: TaskSequences, count: int) -> None:
    """Derives the codes from sequences of one segment, made from the run's own seed."""
    assert isinstance(model, NeuralStateMachine)
    length = split.task.valid_length(max(config.model.segment_length or 1, split.task.min_length))
    x, _ = split.task.sample(count, length, torch.Generator().manual_seed(config.seed))
    model.fit_snap(x.flatten(0, 1), torch.arange(count).repeat_interleave(length))


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    sections = {key: part for key, part in values.items() if isinstance(part, dict)}
    flat = {key: value for key, value in values.items() if key not in sections}
    return flat | {f"{name}.{k}": v for name, part in sections.items() for k, v in part.items()}


def load_data(config: Config) -> Splits:
    """The splits of a config."""
    data = config.data
    return load(data.name, root=data.root, cache=data.cache, seed=data.seed, **data.options)


def _train_one(config: Config, splits: Splits, run: Path, quiet: bool) -> tuple[nn.Module, Result]:
    check_splits(splits, config.train)
    seed_everything(config.seed)
    model = build_model(config, splits.info)
    with run_directory(run, config):
        fitted = fit(model, splits, config, run, quiet=quiet)
        task = Task.of(splits.info.task, splits.train)
        test = _test(model, splits, config, task, splits.test)
        result = Result(config.model.kind, count_parameters(model), task.metric, test, fitted)
        write_whole(run / "result.json", json.dumps(asdict(result), indent=2))
    return model, result


def _test(
    model: nn.Module,
    splits: Splits,
    config: Config,
    task: Task,
    test: Sequence[Data],
    segment_length: int | None = None,
) -> dict[str, float]:
    engine = make_engine(model, config)
    return evaluate(engine, config, task, test, splits.info, segment_length)
