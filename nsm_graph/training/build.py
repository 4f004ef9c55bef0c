"""Config and dataset -> model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import GINConv, GINEConv

from nsm_graph import topology
from nsm_graph.data import DatasetInfo
from nsm_graph.models.baselines import (
    RecurrentBaseline,
    TransformerBaseline,
    count_parameters,
    match_parameters,
)
from nsm_graph.models.delta_net import DeltaNetBaseline
from nsm_graph.models.machine import NeuralStateMachine
from nsm_graph.nn import SegmentScan, StateAllocator
from nsm_graph.topology import Topology
from nsm_graph.training.config import Config
from nsm_graph.training.memory_config import MemoryConfig
from nsm_graph.training.model_config import ALLOCATOR_KEYS, SCAN_KEYS, ModelConfig

SCAN_CONFIG = ("scan_layers", *SCAN_KEYS)
HEADS = {
    "classification": "example",
    "regression": "example",
    "token_classification": "token",
    "next_token": "next_token",
}


def build_model(config: Config, info: DatasetInfo) -> nn.Module:
    """The model of a config, sized for a dataset.

    Raises:
        ValueError: If the model cannot read the dataset; the message names the key.
    """
    head = "next_token" if info.is_causal else HEADS[info.task]
    options: dict[str, Any] = {"num_embeddings": info.num_embeddings, "head": head}
    options |= {"pe_channels": info.pe_channels, **config.model.given}
    kind = config.model.kind
    if kind == "nsm":
        parts = (*SCAN_CONFIG, *ALLOCATOR_KEYS)
        options = {key: value for key, value in options.items() if key not in parts}
        options |= _machine_options(config, info)
        return NeuralStateMachine(info.in_channels, out_channels=info.out_channels, **options)
    channels = options.pop("channels")
    if kind == "deltanet":
        return DeltaNetBaseline(info.in_channels, channels, info.out_channels, **options)
    if kind == "transformer":
        return TransformerBaseline(info.in_channels, channels, info.out_channels, **options)
    return RecurrentBaseline(info.in_channels, channels, info.out_channels, cell=kind, **options)


def matched_baseline(config: Config, kind: str, info: DatasetInfo, target: nn.Module) -> Config:
    """The config with a baseline whose parameter count is nearest to that of `target`."""

    def with_width(channels: int) -> Config:
        tie = config.model.tie_embeddings
        model = ModelConfig(kind=kind, channels=channels, tie_embeddings=tie)
        return replace(config, model=model, memory=MemoryConfig())

    def make(channels: int) -> nn.Module:
        return build_model(with_width(channels), info)

    step = 4 if kind in ("transformer", "deltanet") else 1  # a width that its heads divide
    return with_width(match_parameters(make, count_parameters(target), step=step))


def model_inputs(config: ModelConfig, batch: Data) -> dict[str, Tensor | int | None]:
    """What of a batch the model reads, as keyword arguments."""
    inputs: dict[str, Tensor | int | None] = {
        "x": batch.x,
        "batch": batch.batch,
        "batch_size": batch.num_graphs,
        "pe": batch.get("pe"),
    }
    if config.conv is not None:
        inputs["edge_index"] = batch.edge_index
    if config.conv == "gine":
        inputs["edge_attr"] = batch.edge_attr
    return {key: value for key, value in inputs.items() if value is not None}


def _machine_options(config: Config, info: DatasetInfo) -> dict[str, Any]:
    """What the machine takes otherwise than the config says it."""
    model = config.model
    # The machine has no default for this: a graph is read as a whole.
    options: dict[str, Any] = {"segment_length": model.segment_length}
    if config.memory.watch is not None:
        options["watch"] = config.memory.watch
    if model.scan_layers is not None:
        options["scan"] = _scan(model)
    if model.address_channels is not None:
        options["allocator"] = _allocator(model)
    if model.position == "none":
        options["position"] = None
    if model.communication is not None:
        options["communication"] = _communication(model.communication, model.num_states or 1)
    if config.data.pe is not None:
        options["pe_kind"] = config.data.pe
    if model.conv is not None and model.num_steps is not None:
        channels = model.token_channels or model.state_channels or 0
        options["conv"] = [_conv(model.conv, channels) for _ in range(model.num_steps)]
    if model.conv == "gine":
        options |= _edges(info)
    return options


def _scan(model: ModelConfig) -> SegmentScan:
    channels = model.state_channels or 0
    given = {key: getattr(model, key) for key in SCAN_KEYS if getattr(model, key) is not None}
    if given.get("gated_heads") == 0:
        given["gated_heads"] = None
    return SegmentScan(
        model.token_channels or channels,
        channels,
        model.max_states or model.num_states or 0,
        model.heads or 4,
        layers=model.scan_layers or 1,
        **given,
    )


def _allocator(model: ModelConfig) -> StateAllocator:
    channels = model.state_channels or 0
    named = {name: getattr(model, key) for key, name in ALLOCATOR_KEYS.items()}
    given = {name: value for name, value in named.items() if value is not None}
    return StateAllocator(model.token_channels or channels, channels, **given)


def _communication(name: str, num_states: int) -> Topology | None:
    if name == "none":
        return None
    rules = {
        "complete": topology.complete,
        "ring": topology.ring,
        "star": topology.star,
        "knn": lambda: topology.knn(min(4, num_states - 1)),  # a bank may be that small
    }
    if name not in rules:
        raise ValueError(
            f"model.communication: expected one of {', '.join(rules)}, none; got {name!r}"
        )
    return rules[name]()


def _edges(info: DatasetInfo) -> dict[str, int]:
    if info.edge_embeddings is not None:
        return {"edge_embeddings": info.edge_embeddings}
    if info.edge_channels is not None:
        return {"edge_channels": info.edge_channels}
    raise ValueError(f"model.conv: gine reads edge attributes, and {info.name} has none; use gin")


def _conv(name: str, channels: int) -> nn.Module:
    # LayerNorm, not the usual BatchNorm: a graph's result must not depend on its neighbours in the
    # batch.
    mlp = nn.Sequential(
        nn.Linear(channels, channels),
        nn.LayerNorm(channels),
        nn.ReLU(),
        nn.Linear(channels, channels),
    )
    return GINConv(mlp, train_eps=True) if name == "gin" else GINEConv(mlp, train_eps=True)
