from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Data

from nsm_graph.data import CharacterStreams


def sequence(size: int) -> Data:
    return Data(x=torch.arange(size), y=torch.arange(1, size + 1))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 80))
def test_every_character_once_in_order_per_stream(num_streams, length, extra):
    size = num_streams + extra
    streams = CharacterStreams(sequence(size), num_streams, length)
    batches = list(streams)
    assert len(batches) == len(streams)

    read = [[] for _ in range(num_streams)]
    for step, batch in enumerate(batches):
        assert batch.num_graphs == num_streams
        counts = batch.ptr.diff()
        if step < len(batches) - 1:
            assert (counts == length).all()
        assert 1 <= counts.min() <= counts.max() <= length + 1
        # The target is the next character.
        assert torch.equal(batch.y, batch.x + 1)
        for stream in range(num_streams):
            read[stream] += batch.x[batch.batch == stream].tolist()
    assert list(chain.from_iterable(read)) == list(range(size))
    sizes = [len(stream) for stream in read]
    assert max(sizes) - min(sizes) <= 1


def test_it_can_be_read_again():
    streams = CharacterStreams(sequence(20), 2, 3)
    assert [b.x.tolist() for b in streams] == [b.x.tolist() for b in streams]
    assert repr(streams) == "CharacterStreams(2 streams, length=3)"


@pytest.mark.parametrize(
    ("num_streams", "length", "match"),
    [(0, 1, "must be at least 1"), (1, 0, "must be at least 1"), (6, 1, "6 streams need as many")],
)
def test_bad_sizes(num_streams, length, match):
    with pytest.raises(ValueError, match=match):
        CharacterStreams(sequence(5), num_streams, length)


def test_targets_of_another_length():
    with pytest.raises(ValueError, match="x has 5 characters, but y has 4"):
        CharacterStreams(Data(x=torch.arange(5), y=torch.arange(4)), 1, 1)
