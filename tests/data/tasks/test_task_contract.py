"""What holds for every task: shapes, ranges, determinism, streams, and the checks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from task_oracles import NONE, generator

from nsm_graph.data.tasks import IGNORED, TASKS, SequenceTask, make_task
from nsm_graph.data.tasks import base as base_module

# Small enough that short lengths are allowed, too.
SMALL = {
    "mqar": {"vocab_size": 40, "num_pairs": 2},
    "copy": {"num_tokens": 3},
    "selective_copy": {"num_tokens": 3},
}
STREAMED = ("parity", "modular_arithmetic", "s3", "a5", "s5", "induction")


def small(name: str) -> SequenceTask:
    return make_task(name, **SMALL.get(name, {}))


def joined(pieces):
    x, y = zip(*pieces, strict=True)
    return torch.cat(x, dim=1), torch.cat(y, dim=1)


@pytest.mark.parametrize("name", TASKS)
@settings(deadline=None, max_examples=15)
@given(st.integers(1, 5), st.integers(0, 40), st.integers(0, 2**32))
def test_shapes_and_ranges(name, num_examples, extra, seed):
    task = small(name)
    length = task.valid_length(task.min_length + extra)
    x, y = task.sample(num_examples, length, generator(seed))
    columns = x if isinstance(task.num_symbols, tuple) else x.unsqueeze(-1)
    sizes = torch.tensor(task.num_symbols).view(-1)
    assert y.shape == (num_examples, length) and columns.shape == (*y.shape, sizes.numel())
    assert x.dtype == y.dtype == torch.int64
    assert columns.min() >= 0 and (columns < sizes).all()
    asked = y[y != IGNORED]
    assert asked.min() >= 0 and asked.max() < task.num_classes
    assert (y != IGNORED).any(dim=1).all()
    if name != "mqar":
        assert (y[:, -1] != IGNORED).all()


@pytest.mark.parametrize("name", TASKS)
def test_the_seed_decides(name):
    task = small(name)
    length = task.valid_length(40)
    torch.manual_seed(1)
    first, again, other = (task.sample(8, length, generator(seed)) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    # The global generator is left alone.
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("name", TASKS)
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 40), st.integers(1, 50), st.integers(0, 2**32))
def test_pieces_are_the_sample_cut(name, extra, piece, seed):
    task = small(name)
    length = task.valid_length(task.min_length + extra)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_module, "BLOCK", 8)
        x, y = task.sample(3, length, generator(seed))
        pieces = list(task.stream(3, length, generator(seed), piece))
    assert [part.size(1) for part, _ in pieces[:-1]] == [piece] * (len(pieces) - 1)
    assert 1 <= pieces[-1][0].size(1) <= piece
    whole = joined(pieces)
    assert torch.equal(whole[0], x) and torch.equal(whole[1], y)
    assert all(part.is_contiguous() for pair in pieces for part in pair)


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("length", [4095, 4096, 4097, 8193])
def test_pieces_across_the_real_blocks(name, length):
    task = small(name)
    length = task.valid_length(length)
    x, y = task.sample(2, length, generator())
    for piece in (1000, 4096, 5000, 10_000):
        whole = joined(task.stream(2, length, generator(), piece))
        assert torch.equal(whole[0], x) and torch.equal(whole[1], y)


@pytest.mark.parametrize("name", STREAMED)
def test_a_stream_takes_no_more_memory_than_its_pieces(name):
    # All of it would be 16 GB.
    pieces = small(name).stream(1, 10**9 + 1, generator(), 700)
    for _ in range(20):
        x, y = next(pieces)
        assert x.shape == y.shape == (1, 700)
        assert x.untyped_storage().nbytes() == 8 * 700


@pytest.mark.parametrize("name", TASKS)
def test_valid_length(name):
    task = small(name)
    for length in range(task.min_length, task.min_length + 6):
        nearest = task.valid_length(length)
        assert task.min_length <= nearest <= length < nearest + 2
        assert task.valid_length(nearest) == nearest
    for length in (task.min_length - 1, 0, -3):
        with pytest.raises(ValueError, match=f"{name} needs a length of at least"):
            task.valid_length(length)


@pytest.mark.parametrize("name", TASKS)
def test_bad_sizes(name):
    task = small(name)
    length = task.valid_length(40)
    with pytest.raises(ValueError, match="num_examples is 0; give an integer of at least 1"):
        task.sample(0, length, generator())
    # Already when the stream is made, not when it is read.
    with pytest.raises(ValueError, match="piece is 0; give an integer of at least 1"):
        task.stream(1, length, generator(), 0)
    with pytest.raises(ValueError, match=r"length is 8\.0; give an integer"):
        task.stream(1, 8.0, generator(), 4)


@pytest.mark.parametrize("name", TASKS)
def test_small_immutable_objects(name):
    task, same = small(name), small(name)
    assert task == same and hash(task) == hash(same) and len(repr(task)) < 120
    assert task.name == name and NONE == IGNORED
    with pytest.raises(AttributeError):
        task.modulus = 3
