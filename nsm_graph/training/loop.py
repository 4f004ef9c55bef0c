"""The training loop, on Lightning Fabric: one function to read from top to bottom."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule
from torch import Tensor, nn

from nsm_graph.data import Splits
from nsm_graph.models import NeuralStateMachine
from nsm_graph.training.batches import batches, shift_images
from nsm_graph.training.checkpoint import load_checkpoint, save_checkpoint
from nsm_graph.training.config import Config, TrainConfig
from nsm_graph.training.curriculum import FreshSequences
from nsm_graph.training.evaluate import evaluate, predict
from nsm_graph.training.log import Log
from nsm_graph.training.node_sets import node_set_events
from nsm_graph.training.progress import Progress
from nsm_graph.training.schedule import Schedule
from nsm_graph.training.task import Task


@dataclass(frozen=True)
class Fitted:
    """How a training went; the metrics are those of the checkpoint that was kept."""

    seconds: float
    epochs: int
    planned_epochs: int | None
    steps: int
    kept_epoch: int
    train: dict[str, float]
    validation: dict[str, float]


def fit(
    model: nn.Module, splits: Splits, config: Config, run: Path, *, quiet: bool = False
) -> Fitted:
    """Trains a model, logs to the run directory and leaves the model as its kept checkpoint has it.

    The same config and seed give the same weights on a CPU, unless `train.max_seconds` ends the
    run.

    Args:
        model: From :func:`build_model`.
        splits: The data.
        config: The run's config.
        run: The run directory; it exists.
        quiet: Whether to show no progress.

    Raises:
        ValueError: If a split is empty where it is needed, or the loss is not a number.
    """
    train = config.train
    check_splits(splits, train)
    task = Task.of(splits.info.task, splits.train)
    fabric = make_fabric(train)
    optimizer = make_optimizer(model, train)
    engine, stepper = fabric.setup(model, optimizer)
    engine.mark_forward_method("run")
    order = torch.Generator().manual_seed(config.seed)  # of the examples, and of their augmentation
    loader = batches(config, splits.info, splits.train, order)
    schedule = Schedule(train, len(loader))
    editor = config.memory.editor(model.manager, config.seed) if config.memory.is_given else None

    step, epoch, progress = 0, 0, 0.0
    best: tuple[float, float] | None = None
    kept: dict[str, Any] = {}
    start = time.monotonic()
    with Log(run) as log, Progress(config.model.kind, show=not quiet) as bar:
        while progress < 1.0:
            epoch += 1
            engine.train()
            sums, state = torch.zeros(5, dtype=torch.double), None
            for batch in loader:
                rate = schedule.rate(progress)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                _harden(model, train, schedule.hardness(progress))
                batch = shift_images(batch, order) if config.data.augment else batch
                batch = batch.to(fabric.device)

                segment = _segment_length(config, order)
                predicted = predict(engine, config, task, batch, state, segment)
                state = predicted.state
                loss = task.loss(predicted.out, predicted.y, train.label_smoothing)
                if predicted.node_sets is not None:
                    cost = config.memory.state_cost * schedule.hardness(progress)
                    loss = loss + predicted.node_sets.memory_cost(cost)
                _check_loss(loss, step, train)
                stepper.zero_grad()
                fabric.backward(loss)
                if train.clip is not None:
                    fabric.clip_gradients(
                        engine, stepper, max_norm=train.clip, error_if_nonfinite=False
                    )
                stepper.step()
                for event in editor.step(loss.detach()) if editor is not None else ():
                    log.write_edit(event)
                    if state is not None:
                        state = state.edit(event.edit, model.manager)

                step += 1
                if isinstance(loader, FreshSequences):
                    loader.observe(predicted.out, predicted.y, predicted.batch)
                out = predicted.out.detach()
                sums += task.count(out, predicted.y, predicted.batch, batch.num_graphs)
                progress = schedule.progress(step, time.monotonic() - start)
                bar.update(progress)
                if progress >= 1.0:
                    break

            _harden(model, train, schedule.hardness(progress))
            trained = task.metrics(sums)
            if isinstance(loader, FreshSequences):
                trained["length"] = loader.frontier
            validated = evaluate(engine, config, task, splits.validation, splits.info)
            seconds = time.monotonic() - start
            log.write("train", step, epoch=epoch, seconds=seconds, lr=rate, **trained)
            log.write("validation", step, epoch=epoch, seconds=seconds, **validated)
            log.write_node_sets(step, node_set_events(engine, config, splits.validation))
            bar.report(epoch, _text(trained, task), _text(validated, task), progress)

            if train.keep == "last" or best is None or task.score(validated) > best:
                best = task.score(validated) if validated else None
                kept = {"epoch": epoch, "step": step, "seconds": seconds, "progress": progress}
                kept |= {"train": trained, "validation": validated, "task": task.to_dict()}
                kept["symbols"] = splits.info.symbols
                save_checkpoint(run / "checkpoint", model, optimizer, kept, _generators(order))

    seconds = time.monotonic() - start
    load_checkpoint(run / "checkpoint", model)
    return Fitted(
        seconds, epoch, train.epochs, step, kept["epoch"], kept["train"], kept["validation"]
    )


def make_fabric(config: TrainConfig) -> Fabric:
    """Fabric as the config asks for it."""
    is_there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not is_there.get(config.accelerator, True):
        raise ValueError(
            f"train.accelerator: expected a device that is there; got {config.accelerator}; "
            "use cpu or auto"
        )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    fabric = Fabric(
        accelerator=config.accelerator, devices=config.devices, precision=config.precision
    )
    fabric.launch()
    return fabric


def make_engine(model: nn.Module, config: Config) -> _FabricModule:
    """A model as Fabric runs it, without an optimizer."""
    engine = make_fabric(config.train).setup_module(model)
    engine.mark_forward_method("run")
    return engine


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices only, known to the model's state manager if it has one."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr)
    manager = getattr(model, "manager", None)
    if manager is not None:
        manager.register_optimizer(optimizer)
    return optimizer


def check_splits(splits: Splits, config: TrainConfig) -> None:
    """Refuses an empty split where its examples are needed."""
    if len(splits.train) == 0:
        raise ValueError(f"data: expected training examples; {splits.info.name} has none")
    if config.keep == "best" and len(splits.validation) == 0:
        raise ValueError("train.keep: best needs a validation split, which is empty; use last")


def _check_loss(loss: Tensor, step: int, config: TrainConfig) -> None:
    if not torch.isfinite(loss):
        raise ValueError(
            f"loss: expected a finite number; got {loss.item()} at step {step}; lower train.lr "
            f"(now {config.lr:g}) or train.clip (now {config.clip}), or raise train.precision "
            f"(now {config.precision})"
        )


def _harden(model: nn.Module, config: TrainConfig, share: float) -> None:
    if config.harden and isinstance(model, NeuralStateMachine):
        model.cell.scan.harden(share)


def _segment_length(config: Config, order: torch.Generator) -> int | None:
    """How many tokens the next batch is read at a time; None for what the machine was built for."""
    longest = config.model.segment_length
    if not config.train.random_segments or longest is None:
        return None
    return int(torch.randint(1, longest + 1, (), generator=order))


def _generators(order: torch.Generator) -> dict[str, Tensor]:
    states = {"torch": torch.get_rng_state(), "order": order.get_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _text(metrics: dict[str, float], task: Task) -> str:
    return f"{task.metric} {metrics[task.metric]:.4f}" if metrics else "none"
