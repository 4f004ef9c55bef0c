"""The command line: arguments -> config -> the functions of the package.

Everything heavy is imported inside a command, so that `nsm-graph --help` is quick.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nsm_graph.bench import BenchRecord

USAGE = """usage: nsm-graph COMMAND ...

commands:
  train TASK | --config FILE [--seed N] [--out RUN] [--compare gru,lstm,transformer,deltanet]
                             [--section.key value ...]
  evaluate RUN [--length L] [--segment-length S] [--examples N] [--snap N] [--keep-states]
                             [--json FILE] [--section.key value ...]
  history RUN --memory
  bench NAME [--json FILE] [--repetitions N]
  info
  --version

nsm-graph COMMAND --help says more.
"""

# Modules that come with the `train` extra.
TRAIN_EXTRA = {"jsonargparse", "lightning_fabric", "rich", "safetensors", "tensorboard", "yaml"}

# Shown by `info`.
PACKAGES = (
    *("nsm-graph", "torch", "torch-geometric", "numpy", "numba", "triton", "torch-scatter"),
    *("pyg-lib", "lightning-fabric", "jsonargparse", "safetensors", "tensorboard", "rich"),
    "scikit-learn",
)


class UserError(Exception):
    """Something the user can put right; shown in one line."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, or 2 after a user's error."""
    argv = sys.argv[1:] if argv is None else argv
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": train,
        "evaluate": evaluate,
        "history": history,
        "bench": bench,
        "info": info,
    }
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if argv and argv[0] == "--version":
        from importlib import metadata

        print(metadata.version("nsm-graph"))
        return 0
    try:
        if not argv or argv[0] not in commands:
            got = repr(argv[0]) if argv else "nothing"
            raise UserError(f"command: expected one of {', '.join(commands)}; got {got}")
        commands[argv[0]](argv[1:])
    except (UserError, ValueError, argparse.ArgumentError, OSError, ImportError) as error:
        print(f"nsm-graph: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nsm-graph: interrupted", file=sys.stderr)
        return 130
    return 0


def train(argv: list[str]) -> None:
    """Trains a model and the baselines it is compared with, and prints them in a table."""
    from nsm_graph.training.parse import config_parser, parse, recipe

    parser = config_parser(
        "nsm-graph train", "Trains a model and shows it beside baselines of equal size."
    )
    parser.usage = (
        "nsm-graph train TASK | --config FILE [--seed N] [--out RUN] [--section.key value ...]"
    )
    parser.add_argument(
        "--out", metavar="RUN", help="Run directory, new or empty.  (default: runs/NAME-DATE-TIME)"
    )
    task = argv[0] if argv and not argv[0].startswith("-") else None
    is_config = any(word.partition("=")[0] in ("--config", "-h", "--help") for word in argv)
    if (task is None) != is_config:
        got = "both" if task else "neither"
        raise UserError(f"train: expected a TASK first, or --config FILE; got {got}")
    config, own = parse(parser, argv[1:] if task else argv, base=recipe(task) if task else None)

    from nsm_graph.training.run import train_run
    from nsm_graph.training.table import print_table

    run = Path(
        str(own["out"] or f"runs/{task or config.data.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    )
    print_table(train_run(config, run), run)


def evaluate(argv: list[str]) -> None:
    """Evaluates the checkpoint of a run on the test split."""
    from nsm_graph.training.parse import config_parser, parse

    parser = config_parser(
        "nsm-graph evaluate", "Evaluates the checkpoint of a run on the test split."
    )
    parser.usage = (
        "nsm-graph evaluate RUN [--length L] [--segment-length S] [--examples N] [--snap N] "
        "[--keep-states] [--json FILE] [--section.key value ...]"
    )
    parser.add_argument(
        "--length",
        type=str | None,
        metavar="L",
        help="Only the first L tokens of each sequence; of a task any length, or A:B for a range.",
    )
    for name, metavar, text in (
        ("--segment-length", "S", "Read so many tokens at a time."),
        ("--examples", "N", "Task: number of sequences."),
        ("--snap", "N", "Task: draw states to codes derived from N unlabelled sequences."),
    ):
        parser.add_argument(name, type=int | None, metavar=metavar, help=text)
    parser.add_argument(
        "--keep-states", action="store_true", help="No state leaves the node set of an example."
    )
    parser.add_argument("--json", metavar="FILE", help="Also writes the metrics there.")
    if any(word in ("-h", "--help") for word in argv):
        parser.print_help()
        return
    if not argv or argv[0].startswith("-"):
        raise UserError(
            f"evaluate: expected a run directory first; got {argv[0] if argv else 'nothing'}"
        )
    run = Path(argv[0])
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"evaluate: expected a run directory with config.yaml; {run} has none; train first"
        )
    trained, _ = parse(parser, [], base=run / "config.yaml")
    config, own = parse(parser, argv[1:], base=run / "config.yaml")
    if own["json"] is not None and not Path(own["json"]).resolve().parent.is_dir():
        raise UserError(f"--json: expected a file in a folder that exists; got {own['json']}")

    from nsm_graph.training.directory import write_whole
    from nsm_graph.training.run import check_same_run, evaluate_run

    check_same_run(trained, config)

    options = {key: own[key] for key in ("segment_length", "examples", "snap", "keep_states")}
    metrics = json.dumps(evaluate_run(config, run, _length(own["length"]), **options), indent=2)
    print(metrics)
    if own["json"] is not None:
        write_whole(Path(own["json"]), metrics + "\n")


def _length(text: str | int | None) -> int | tuple[int, int] | None:
    """One length, or the two ends of a range."""
    if text is None:
        return None
    ends = str(text).split(":")
    if len(ends) > 2 or not all(end.isdigit() for end in ends):
        raise UserError(f"--length: expected a number, or A:B for a range; got {text}")
    return int(ends[0]) if len(ends) == 1 else (int(ends[0]), int(ends[1]))


def history(argv: list[str]) -> None:
    """Prints what happened to the node set in the course of a run, edit by edit."""
    parser = argparse.ArgumentParser("nsm-graph history", description=history.__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="Run directory.")
    parser.add_argument(
        "--memory", action="store_true", required=True, help="The edits of the memory."
    )
    options = parser.parse_args(argv)
    log = options.run / "metrics.jsonl"
    if not log.is_file():
        raise UserError(
            f"history: expected a run directory with metrics.jsonl; {options.run} has none"
        )
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    edits = [line for line in lines if line["split"] == "memory"]
    if not edits:
        print(
            "no edits: the run had neither memory.every nor model.address_channels, or nothing "
            "came of it"
        )
        return
    print(f"{'step':>6}  {'of':14}  {'kind':8}  {'states':>6}  slots, reason")
    for edit in edits:
        slots = ", ".join("+".join(map(str, x)) if isinstance(x, list) else str(x)
                          for x in edit["slots"])  # fmt: skip
        of = "all"
        if edit["scope"] == "example":
            of = f"{edit['example']}, segment {edit['segment']}"
        print(
            f"{edit['step']:6}  {of:14}  {edit['kind']:8}  {edit['num_active']:6}  {slots}: "
            f"{edit['reason']}"
        )


def bench(argv: list[str]) -> None:
    """Times the library beside its peers; nothing is printed before it is known to be correct."""
    from nsm_graph.bench import BENCHES

    parser = argparse.ArgumentParser("nsm-graph bench", description=bench.__doc__)
    parser.add_argument("name", choices=sorted(BENCHES), help="Which benchmark.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also writes the records there.")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="Timed turns.")
    options = parser.parse_args(argv)
    if options.repetitions < 1:
        raise UserError(f"--repetitions: expected at least 1; got {options.repetitions}")
    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise UserError(f"--json: expected a file in a folder that exists; got {options.json}")
    records = BENCHES[options.name](repetitions=options.repetitions)
    wrong = [record.case for record in records if not record.correct]
    if wrong:
        raise UserError(f"bench: results differ from the reference in {', '.join(wrong)}")
    _print_table(records)
    if options.json is not None:
        text = json.dumps([record.to_dict() for record in records], indent=2)
        options.json.write_text(text + "\n")


def _print_table(records: list[BenchRecord]) -> None:
    """One line a record, and its note below."""
    case = max((len(record.case) for record in records), default=0)
    peer = max((len(record.peer) for record in records), default=0)
    if records:
        print(f"{'case':{case}} {'peer':{peer}} {'ours':>9} {'theirs':>9} {'':3}  ratio  target")
    for record in records:
        pair: tuple[float | None, float | None] = (record.ours_ms, record.peer_ms)
        if record.measure == "mib":
            pair = (record.ours_mib, record.peer_mib)
        numbers = " ".join("unknown".rjust(9) if x is None else f"{x:9.1f}" for x in pair)
        unit = {"ms": "ms", "mib": "MiB"}[record.measure]
        compared = f"{unit:3} {record.ratio:6.2f} {record.target:7.2f}"
        print(f"{record.case:{case}} {record.peer:{peer}} {numbers} {compared}")
        if record.note:
            print(f"    {record.note}")


def info(argv: list[str]) -> None:
    """Versions, devices, and the backends with the reason why each is or is not there."""
    argparse.ArgumentParser("nsm-graph info", description=info.__doc__).parse_args(argv)
    import platform
    from importlib import metadata

    import torch

    from nsm_graph.ops import available_backends

    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    print("\nversions")
    for name in PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = "not installed"
        print(f"  {name:18} {version}")
    print("\ndevices")
    print(f"  {'cpu':18} {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        print(f"  {f'cuda:{index}':18} {torch.cuda.get_device_name(index)}")
    if torch.backends.mps.is_available():
        print(f"  {'mps':18} Apple")
    print("\nbackends")
    for name, is_available, reason in available_backends():
        print(f"  {name:18} {'yes' if is_available else 'no':4} {reason}")


def _one_line(error: BaseException) -> str:
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ImportError) and name in TRAIN_EXTRA:
        return f"{name} is not installed; run: pip install 'nsm-graph[train]'"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
