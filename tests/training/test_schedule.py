"""Progress and learning rate over steps, over seconds, and over both."""

import itertools

import pytest

from nsm_graph.training import TrainConfig
from nsm_graph.training.schedule import Schedule


def test_steps_alone_ignore_the_clock():
    schedule = Schedule(TrainConfig(epochs=2), 10)
    assert schedule.progress(10, 1e9) == 0.5
    assert schedule.progress(20, 0.0) == 1.0


def test_seconds_alone_ignore_the_steps():
    schedule = Schedule(TrainConfig(max_seconds=10.0), 10)
    assert schedule.progress(10**6, 5.0) == 0.5


def test_a_run_on_time_does_not_depend_on_the_clock():
    schedule = Schedule(TrainConfig(epochs=10, max_seconds=100.0), 10)
    for step in range(101):
        assert schedule.progress(step, step * 0.99) == pytest.approx(step / 100)


def test_a_slow_run_still_ends_in_time_without_a_jump():
    schedule = Schedule(TrainConfig(epochs=10, max_seconds=100.0), 100)
    values = [schedule.progress(second, float(second)) for second in range(101)]
    assert values[-1] == 1.0
    assert max(b - a for a, b in itertools.pairwise(values)) <= 0.021


def test_the_rate_rises_and_falls():
    schedule = Schedule(TrainConfig(epochs=1, lr=1.0, warmup=0.1), 1)
    rates = [schedule.rate(percent / 100) for percent in range(101)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[10] == 1.0
    assert rates[100] == pytest.approx(0)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert Schedule(TrainConfig(epochs=1, lr=1.0, warmup=0.0), 1).rate(0.0) == 1.0


def test_the_rate_is_held_before_it_falls():
    schedule = Schedule(TrainConfig(epochs=1, lr=1.0, warmup=0.1, hold=0.5), steps_per_epoch=10)
    rates = [schedule.rate(progress) for progress in (0.05, 0.1, 0.3, 0.5, 0.75, 1.0)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.5, 0.0])


def test_gates_harden_in_the_middle_of_a_run():
    shares = [Schedule.hardness(progress) for progress in (0.0, 0.3, 0.55, 0.8, 1.0)]
    assert shares == pytest.approx([0.0, 0.0, 0.5, 1.0, 1.0])
