"""Config and dataset -> model: what is given reaches the machine, what does not fit is named."""

from pathlib import Path

import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.nn import GINConv, GINEConv

from nsm_graph.data import DatasetInfo
from nsm_graph.training import Config
from nsm_graph.training.build import build_model, model_inputs
from nsm_graph.training.parse import config_parser, parse, recipe

SEQUENCES = DatasetInfo("tiny", "classification", 2, None, 3)
MOLECULES = DatasetInfo("tiny", "regression", 1, 5, 1, edge_embeddings=4, pe_channels=6)

EXAMPLES = Path(__file__).parents[2] / "examples"


def nsm(data=None, **model):
    base = {"kind": "nsm", "state_channels": 8, "num_states": 3, "heads": 2}
    return Config.from_dict(
        {"data": data or {}, "model": {**base, **model}, "train": {"epochs": 1}}
    )


def molecules():
    return Batch.from_data_list(
        [
            Data(
                x=torch.randint(5, (size, 1)),
                edge_index=torch.tensor([[0, 1], [1, 0]]),
                edge_attr=torch.tensor([1, 2]),
                y=torch.rand(1, 1),
                pe=torch.rand(size, 6),
            )
            for size in (2, 4)
        ]
    )


def test_a_machine_for_sequences():
    options = {"communication": "ring", "position": "none", "top_k": 2, "mix": "bias"}
    config = nsm(segment_length=4, cell="lstm", pool="attention", **options)
    model = build_model(config, SEQUENCES)
    assert model.segment_length == 4
    assert model.position is None
    assert model.cell.propagator.cell == "lstm"
    assert model(torch.rand(10, 2), torch.tensor([0] * 6 + [1] * 4)).shape == (2, 3)


@pytest.mark.parametrize("name", ["complete", "ring", "star", "knn", "none"])
def test_every_communication(name):
    model = build_model(nsm(segment_length=4, communication=name), SEQUENCES)
    assert model(torch.rand(6, 2)).shape == (1, 3)


@pytest.mark.parametrize("conv", [None, "gin", "gine"])
def test_a_machine_for_graphs(conv):
    given = {} if conv is None else {"conv": conv}
    pe = {"name": "zinc", "pe": "laplacian", "pe_channels": 6}
    config = nsm(num_steps=2, token_channels=12, data=pe, **given)
    model = build_model(config, MOLECULES)
    batch = molecules()
    inputs = model_inputs(config.model, batch)
    assert ("edge_index" in inputs, "edge_attr" in inputs) == (conv is not None, conv == "gine")
    assert model(**inputs).shape == (2, 1)
    kind = {"gin": GINConv, "gine": GINEConv}.get(conv)
    if kind is not None:
        assert sum(isinstance(module, kind) for module in model.modules()) == 2


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"model.communication: expected one of complete, ring"):
        build_model(nsm(segment_length=4, communication="gossip"), SEQUENCES)
    with pytest.raises(
        ValueError, match=r"model.conv: gine reads edge attributes, and tiny has no"
    ):
        build_model(nsm(num_steps=1, conv="gine"), SEQUENCES)


@pytest.mark.parametrize(
    ("task", "info"),
    [
        ("digits", DatasetInfo("digits", "classification", 1, None, 10)),
        ("mnist", DatasetInfo("mnist", "classification", 1, None, 10)),
        ("text", DatasetInfo("text", "next_token", 1, 65, 65)),
        ("proteins", DatasetInfo("PROTEINS", "classification", 3, None, 2, pe_channels=8)),
        ("zinc", DatasetInfo("ZINC", "regression", 1, 28, 1, edge_embeddings=4, pe_channels=16)),
    ],
)
def test_every_recipe_and_example_builds(task, info):
    example = EXAMPLES / f"{task}.yaml"
    base = example if example.exists() else recipe(task)
    config, _ = parse(config_parser("test", ""), [], base=base)
    assert sum(p.numel() for p in build_model(config, info).parameters()) > 1000
