"""Tiny data with something to learn, and configs for them."""

import pytest
import torch
from torch_geometric.data import Data

from nsm_graph.data import DatasetInfo, Splits
from nsm_graph.training import Config


def sequences(count, seed, task):
    """Ragged sequences; the class is the channel with the larger sum, the target its value."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        length = int(torch.randint(3, 9, (1,), generator=generator))
        x = torch.rand(length, 2, generator=generator)
        y = {
            "classification": x.sum(0).argmax().view(1),
            "regression": 100 + 10 * x.mean(0).max().view(1, 1),
            "token_classification": x.argmax(1),
        }[task]
        result.append(Data(x=x, y=y, num_nodes=length))
    return result


@pytest.fixture
def make_splits():
    def make(task="classification", sizes=(48, 16, 16)):
        parts = [sequences(size, seed, task) for seed, size in enumerate(sizes)]
        out_channels = 1 if task == "regression" else 2
        return Splits(*parts, DatasetInfo("tiny", task, 2, None, out_channels))

    return make


@pytest.fixture
def text_splits():
    x = torch.arange(301) % 5
    parts = [[Data(x=x[:-1], y=x[1:], num_nodes=300)] for _ in range(3)]
    return Splits(*parts, DatasetInfo("tiny", "next_token", 1, 5, 5, symbols=list("abcde")))


@pytest.fixture
def make_config():
    def make(kind="gru", channels=8, **train):
        model = {"kind": kind, "channels": channels}
        defaults = {"epochs": 3, "batch_size": 8, "lr": 0.02}
        return Config.from_dict({"model": model, "train": {**defaults, **train}})

    return make
