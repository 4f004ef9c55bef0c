"""Bindings: labels and the number of bindings against a dictionary, token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from task_oracles import assert_uniform, bindings, generator

from nsm_graph.data.tasks import Bindings, make_task


@settings(deadline=None, max_examples=40)
@given(
    most=st.integers(1, 16),
    released=st.integers(0, 6),
    noise=st.sampled_from([0.0, 0.3, 1.0]),
    length=st.integers(4, 70),
    seed=st.integers(0, 2**32),
)
def test_a_dictionary_knows_the_answers(most, released, noise, length, seed):
    task = Bindings(most, num_keys=24, num_values=5, noise=noise, max_released=released)
    x, y = task.sample(4, length, generator(seed))
    counts = task.needed_states(x).tolist()
    num_tells = length - length // 4
    for tokens, labels, count in zip(x.tolist(), y.tolist(), counts, strict=True):
        bound, answers = bindings(tokens, task.num_keys, task.ask, task.release)
        assert labels == answers
        assert 1 <= len(bound) == count <= most
        asked = [key for key, value in tokens if value == task.ask]
        assert len(asked) == length // 4 and tokens[num_tells:] == tokens[-len(asked) :]
        assert set(asked) <= set(bound)
        assert len(set(asked)) == min(len(asked), len(bound))
        if released == 0:
            assert task.release not in [value for _, value in tokens]


def test_distributions():
    task = Bindings(max_bindings=4, num_keys=6, num_values=3, num_noise=2, max_released=2)
    x, y = task.sample(4000, 40, generator())
    assert_uniform(task.needed_states(x) - 1, 4)
    assert_uniform(y[:, -1], 3)
    is_noise = x[:, :30, 0] >= task.num_keys
    assert_uniform(x[:, :30, 0][is_noise] - task.num_keys, 2)
    has_released = (x[..., 1] == task.release).sum(1)
    assert_uniform(has_released, 3)


def test_the_number_of_bindings_has_nothing_to_do_with_the_length():
    counts = [make_task("bindings").sample(2000, length, generator())[0] for length in (30, 48, 96)]
    means = [make_task("bindings").needed_states(x).float().mean() for x in counts]
    assert max(means) - min(means) < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_bindings": 0}, "max_bindings"),
        ({"num_keys": 10}, "num_keys"),
        ({"num_keys": 18, "max_released": 4}, "num_keys"),
        ({"noise": 1.5}, "give a share from 0 to 1"),
        ({"num_noise": 0}, "needs num_noise of at least 1"),
        ({"num_values": 1}, "num_values"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Bindings(**options)


def test_too_short():
    with pytest.raises(ValueError, match="at least 4"):
        Bindings().sample(1, 3, torch.Generator())
