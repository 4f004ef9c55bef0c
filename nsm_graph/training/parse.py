"""From YAML and command-line overrides to a Config, by jsonargparse."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsm_graph.training.config import SECTIONS, Config

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

RECIPES = Path(__file__).parent / "recipes"


def config_parser(prog: str, description: str) -> ArgumentParser:
    """A parser with `--config FILE` and an option for every key; the caller adds its own."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with the keys below.")
    parser.add_class_arguments(Config)
    return parser


def parse(
    parser: ArgumentParser, argv: list[str], base: Path | None = None
) -> tuple[Config, dict[str, Any]]:
    """The config, and the caller's own arguments; what stands later wins, `base` comes first.

    Raises:
        ValueError: In one line, if a key or a value is not accepted, or a file cannot be read.
    """
    if base is not None:
        argv = ["--config", str(base), *argv]
    try:
        values = parser.parse_args(argv).as_dict()
    except argparse.ArgumentError as error:
        hint = (
            "; --help lists every key"
            if any(text in str(error) for text in ("accept", "unrecognized"))
            else ""
        )
        raise ValueError(" ".join(str(error).split()) + hint) from None
    values.pop("config")
    keys = (*SECTIONS, "seed", "compare")
    own = {key: value for key, value in values.items() if key not in keys}
    return Config.from_dict({key: values[key] for key in keys}), own


def recipe(task: str) -> Path:
    """The config shipped for a task.

    Raises:
        ValueError: If there is none; the message lists the tasks.
    """
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if task not in names:
        raise ValueError(
            f"task: expected one of {', '.join(names)}, or --config FILE; got {task!r}"
        )
    return RECIPES / f"{task}.yaml"
