"""Loss and metrics of each kind of task."""

import math

import pytest
import torch
import torch.nn.functional as F

from nsm_graph.training.task import Task


def test_classification():
    task = Task("classification")
    out, y = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1, 1])
    metrics = task.metrics(task.count(out, y, torch.tensor([0, 0, 1, 2, 2]), 3))
    assert metrics == pytest.approx(
        {"loss": float(F.cross_entropy(out, y)), "accuracy": 2 / 3}, rel=1e-6
    )


def test_tokens_without_a_label_do_not_count():
    task = Task("token_classification")
    out = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    y, batch = torch.tensor([0, -100, 0, 0]), torch.tensor([0, 0, 1, 1])
    metrics = task.metrics(task.count(out, y, batch, 2))
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["full_sequence_accuracy"] == 0.5


def test_next_token_counts_bits():
    task = Task("next_token")
    metrics = task.metrics(
        task.count(torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.zeros(3), 1)
    )
    assert metrics["bits_per_token"] == pytest.approx(2.0, rel=1e-6)
    assert metrics["loss"] == pytest.approx(math.log(4), rel=1e-6)


def test_regression_learns_in_standard_deviations_and_reports_the_unit(make_splits):
    splits = make_splits("regression")
    task = Task.of("regression", splits.train)
    y = torch.cat([data.y for data in splits.train])
    batch = torch.arange(len(y))
    zero = torch.zeros_like(y)  # predicts the mean
    metrics = task.metrics(task.count(zero, y, batch, len(y)))
    assert metrics["mae"] == pytest.approx(float((y - y.mean()).abs().mean()), rel=1e-4)
    assert metrics["loss"] == pytest.approx(float(task.loss(zero, y)), rel=1e-5)
    assert metrics["loss"] == pytest.approx(metrics["mae"] / task.std[0], rel=1e-5)
    assert Task.from_dict(task.to_dict()) == task


def test_a_better_result_has_a_higher_score():
    classify, regress = Task("classification"), Task("regression")
    good, bad = {"accuracy": 0.9, "loss": 1.0}, {"accuracy": 0.8, "loss": 0.1}
    assert classify.score(good) > classify.score(bad)
    assert classify.score(good | {"loss": 0.5}) > classify.score(good)
    assert regress.score({"mae": 1.0, "loss": 1.0}) > regress.score({"mae": 2.0, "loss": 1.0})


def test_nothing_counted_is_no_metric():
    assert Task("classification").metrics(torch.zeros(5)) == {}
