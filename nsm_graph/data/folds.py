r"""One fold of a cross-validation: published in a file, or drawn from a seed."""

import json
import operator
from pathlib import Path

from nsm_graph.data.errors import MissingDataError
from nsm_graph.data.stratify import Indices, stratified_choice, stratified_folds

Parts = tuple[list[int], list[int], list[int]]

FORM = "[{'test': [...], 'model_selection': [{'train': [...], 'validation': [...]}]}, ...]"
PUBLISHER = "outer folds of A Fair Comparison of Graph Neural Networks, Errica et al."


def stratified_fold(labels: Indices, fold: int, num_folds: int, seed: int) -> Parts:
    r"""Train, validation and test: fold :obj:`fold` is test, a tenth of the rest validation."""
    folds = stratified_folds(labels, num_folds, seed)
    _check_fold(fold, len(folds))
    test = set(folds[fold].tolist())
    rest = [i for i in range(len(labels)) if i not in test]
    chosen, others = stratified_choice(labels[rest], round(len(rest) / 10), [seed, fold])
    return [rest[i] for i in others], [rest[i] for i in chosen], sorted(test)


def published_fold(path: Path, fold: int, num_graphs: int) -> Parts:
    r"""Train, validation and test of one fold of a gnn-comparison file.

    Raises:
        MissingDataError: If there is no such file.
        ValueError: If the file has another form, or does not fit the dataset.
    """
    if not path.is_file():
        raise MissingDataError("splits", path.parent, [path.name], PUBLISHER)
    try:
        folds = json.loads(path.read_text())
        _check_fold(fold, len(folds))
        inner = folds[fold]["model_selection"][0]
        parts = inner["train"], inner["validation"], folds[fold]["test"]
        indices = [operator.index(i) for part in parts for i in part]
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: expected folds in the form {FORM}, got {error!r}") from error
    if indices and not 0 <= min(indices) <= max(indices) < num_graphs:
        raise ValueError(
            f"{path}: expected indices 0 to {num_graphs - 1}, got {min(indices)} to "
            f"{max(indices)}; choose the file of this dataset"
        )
    if len(set(indices)) != len(indices):
        raise ValueError(f"{path}: fold {fold} has a graph twice; put the original file there")
    return parts


def _check_fold(fold: int, num_folds: int) -> None:
    if not 0 <= fold < num_folds:
        raise ValueError(f"fold is {fold}; choose 0 to {num_folds - 1}")
