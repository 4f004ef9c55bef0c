"""The table that a training ends with."""

from __future__ import annotations

from pathlib import Path

from nsm_graph.training.run import Result


def print_table(results: list[Result], run: Path) -> None:
    """Prints one row for each model, the run's own model first, and where the run is."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{run}", title_justify="left")
    table.add_column("model")
    for name in ("parameters", f"test {results[0].metric}", "epochs", "seconds"):
        table.add_column(name, justify="right")
    for result in results:
        value = f"{result.test[result.metric]:.4f}" if result.test else "no test split"
        fitted = result.fitted
        table.add_row(
            result.model,
            f"{result.parameters:,}",
            value,
            str(fitted.epochs),
            f"{fitted.seconds:.1f}",
        )
    Console().print(table)
    own = results[0].fitted
    if own.planned_epochs is not None and own.epochs < own.planned_epochs:
        print(
            f"Time ran out: train.max_seconds ended the run after {own.epochs} of "
            f"{own.planned_epochs} epochs; raise it for the full result."
        )
