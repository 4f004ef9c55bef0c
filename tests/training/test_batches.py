"""Mini-batches: shifted images, truncated sequences, streams of text."""

import pytest
import torch
from torch_geometric.data import Batch, Data

from nsm_graph.data import DatasetInfo
from nsm_graph.training.batches import batches, shift_images, truncate


def images(count, side=4):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, side * side, 1, generator=generator)
    return Batch.from_data_list([Data(x=pixels, y=torch.tensor([0])) for pixels in x])


def test_shift_moves_each_image_by_one_of_nine_shifts():
    before = images(64)
    pictures = before.x.view(64, 4, 4).clone()
    after = shift_images(before, torch.Generator().manual_seed(1)).x.view(64, 4, 4)
    padded = torch.nn.functional.pad(pictures, (1, 1, 1, 1))
    found = set()
    for old, new in zip(padded, after, strict=True):
        matches = [
            (r, c)
            for r in range(3)
            for c in range(3)
            if torch.equal(old[r : r + 4, c : c + 4], new)
        ]
        assert matches
        found.update(matches)
    assert len(found) == 9


def test_shift_is_seeded_and_refuses_what_is_not_square():
    one, other = (shift_images(images(8), torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(one.x, other.x)
    flat = Batch.from_data_list([Data(x=torch.rand(6, 1))])
    with pytest.raises(ValueError, match=r"data.augment: expected square images"):
        shift_images(flat, torch.Generator())


def test_truncate_keeps_the_label_of_a_sequence_and_cuts_those_of_tokens():
    sequence = Data(x=torch.rand(5, 2), y=torch.tensor([1]))
    info = DatasetInfo("tiny", "classification", 2, None, 2)
    short = truncate(sequence, 3, info)
    assert short.x.size(0) == short.num_nodes == 3
    assert short.y.tolist() == [1]
    tagged = Data(x=torch.rand(5, 2), y=torch.arange(5))
    info = DatasetInfo("tiny", "token_classification", 2, None, 5)
    assert truncate(tagged, 3, info).y.tolist() == [0, 1, 2]
    graph = Data(x=torch.rand(2, 2), edge_index=torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"--length: expected sequences; got graphs"):
        truncate(graph, 1, info)


def test_text_is_read_in_parallel_streams(text_splits, make_config):
    config = make_config(batch_size=4)
    config.data.chunk_length = 16
    loaded = list(batches(config, text_splits.info, text_splits.train, torch.Generator()))
    assert all(batch.num_graphs == 4 for batch in loaded)
    assert sum(batch.num_nodes for batch in loaded) == 300
