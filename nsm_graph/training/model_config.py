"""The model section of a config: the machine, or one of its rivals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nsm_graph.training.checks import check_choice, check_range, check_types, given

KINDS = ("nsm", "gru", "lstm", "transformer", "deltanet")
SCAN_KEYS = (
    *("memory_heads", "gated_heads", "reflections", "decay", "write", "gated_dropout"),
    *("stretch", "convolution"),
)
#: Of an allocator, which is there where address_channels are given.
ALLOCATOR_KEYS = {
    "address_channels": "address_channels",
    "presence_gate": "gate",
    "prune_states": "prune",
    "match_scale": "match_scale",
    "novelty": "novelty",
    "state_budget": "budget",
}
OFF_AT_ZERO = ("memory_heads", "gated_heads")
BASELINE_KEYS = {
    "gru": ("channels", "tie_embeddings"),
    "lstm": ("channels", "tie_embeddings"),
    "transformer": ("channels", "num_layers", "heads", "dropout", "tie_embeddings"),
    "deltanet": ("channels", "num_layers", "heads", "reflections", "tie_embeddings"),
}


@dataclass(kw_only=True)
class ModelConfig:
    """Which model. Everything from state_channels on belongs to the machine and is refused for a
    baseline.

    Args:
        kind: nsm (the machine), or a baseline: gru, lstm, transformer, deltanet.
        channels: Baselines: width.
        num_layers: transformer, deltanet: layers.
        heads: nsm, transformer, deltanet: heads.
        dropout: nsm, transformer: dropout.
        state_channels: Width of a state.
        num_states: States of the bank.
        segment_length: Sequences: tokens read at once.
        num_steps: Graphs: passes over all nodes.
        cell: gru or lstm.
        mix: How routing and attention meet: sum, bias, attention or routing.
        communication: Topology between states: complete, ring, ... or none.
        pool: mean, flatten or attention.
        position: learned, sinusoidal, rotary, relative or none.
        top_k: States that each token keeps.
        routing_reduce: sum or mean.
        conv: Graphs: convolution between the passes, gin or gine.
        token_channels: Width of an embedded token.
        max_states: Slots of the bank.
        bptt_segments: Segments that the gradient passes back through.
        checkpoint_segments: Segments recomputed together in the backward pass, or sqrt.
        scan_layers: Layers of an ordered segment scan; without one, a segment is a bag of tokens.
        memory_heads: scan: heads that recall.
        gated_heads: scan: heads that the gates write; 0 lets them write all, after the scan.
        reflections: scan, deltanet: reflections of each token.
        decay: scan: whether tokens may decay states.
        write: scan: whether tokens may write into states.
        address_channels: Channels of a state's address; gives every example a node set of its own,
            which starts with num_states and grows up to max_states.
        presence_gate: address_channels: straight_through or continuous.
        prune_states: address_channels: whether states can leave an example again.
        match_scale: address_channels: where the scale of matches starts.
        novelty: address_channels: where the threshold of founding starts, as a share of
            that scale.
        state_budget: address_channels: states that an example may have on average.
        tie_embeddings: Tasks over symbols: one table for input and output.
        gated_dropout: scan: share of examples whose gated heads are hidden in training.
        stretch: scan: how soon gates reach 0 and 1 exactly; 0 for never.
        convolution: scan: whether a token knows the one before it.
    """

    kind: str = "nsm"
    channels: int | None = None
    num_layers: int | None = None
    heads: int | None = None
    dropout: float | None = None
    state_channels: int | None = None
    num_states: int | None = None
    segment_length: int | None = None
    num_steps: int | None = None
    cell: str | None = None
    mix: str | None = None
    communication: str | None = None
    pool: str | None = None
    position: str | None = None
    top_k: int | None = None
    routing_reduce: str | None = None
    conv: str | None = None
    token_channels: int | None = None
    max_states: int | None = None
    bptt_segments: int | None = None
    checkpoint_segments: int | str | None = None
    scan_layers: int | None = None
    memory_heads: int | None = None
    gated_heads: int | None = None
    reflections: int | None = None
    decay: bool | None = None
    write: bool | None = None
    gated_dropout: float | None = None
    stretch: float | None = None
    convolution: bool | None = None
    address_channels: int | None = None
    presence_gate: str | None = None
    prune_states: bool | None = None
    match_scale: float | None = None
    novelty: float | None = None
    state_budget: float | None = None
    tie_embeddings: bool | None = None

    def __post_init__(self) -> None:
        check_types(self, "model.")
        check_choice("model.kind", self.kind, KINDS)
        check_range("model.dropout", self.dropout, 0, 0.99)
        for key, value in self.given.items():
            if isinstance(value, int) and not isinstance(value, bool):
                check_range(f"model.{key}", value, 0 if key in OFF_AT_ZERO else 1)
        for key, choices in {
            "cell": ("gru", "lstm"),
            "mix": ("sum", "bias", "attention", "routing"),
            "pool": ("mean", "flatten", "attention"),
            "position": ("learned", "sinusoidal", "rotary", "relative", "none"),
            "routing_reduce": ("sum", "mean"),
            "conv": ("gin", "gine"),
            "presence_gate": ("straight_through", "continuous"),
        }.items():
            check_choice(f"model.{key}", getattr(self, key), choices)
        if isinstance(self.checkpoint_segments, str):
            check_choice("model.checkpoint_segments", self.checkpoint_segments, ("sqrt",))
        if self.kind == "nsm":
            self._check_machine()
        else:
            self._check_baseline()

    def _check_machine(self) -> None:
        for key in ("channels", "num_layers"):
            if getattr(self, key) is not None:
                raise ValueError(f"model.{key}: expected only with a baseline; got model.kind=nsm")
        for key in ("state_channels", "num_states"):
            if getattr(self, key) is None:
                raise ValueError(f"model.{key}: expected a number with model.kind=nsm; got none")
        if (self.segment_length is None) == (self.num_steps is None):
            raise ValueError(
                "model.segment_length, model.num_steps: expected one of them (sequences: "
                "segment_length, graphs: num_steps); "
                f"got {self.segment_length} and {self.num_steps}"
            )
        for key in SCAN_KEYS:
            if self.scan_layers is None and getattr(self, key) is not None:
                raise ValueError(
                    f"model.{key}: expected only with an ordered scan; set model.scan_layers, too"
                )
        for key in ALLOCATOR_KEYS:
            if self.address_channels is None and getattr(self, key) is not None:
                raise ValueError(
                    f"model.{key}: expected only where examples have node sets of their own; set "
                    f"model.address_channels, too"
                )
        check_range("model.match_scale", self.match_scale, 0, above=True)
        check_range("model.state_budget", self.state_budget, 1)
        check_range("model.gated_dropout", self.gated_dropout, 0, 0.99)
        if self.conv is not None and self.num_steps is None:
            raise ValueError(f"model.conv: expected only with num_steps; got {self.conv!r}")

    def _check_baseline(self) -> None:
        allowed = BASELINE_KEYS[self.kind]
        refused = [key for key in self.given if key not in allowed]
        if refused:
            raise ValueError(
                f"model.{refused[0]}: expected only {', '.join(allowed)} with "
                f"model.kind={self.kind}; got {', '.join(refused)}, which it does not have; "
                f"set them to null, or use --compare {self.kind}"
            )
        if self.channels is None:
            raise ValueError(
                f"model.channels: expected a number with model.kind={self.kind}; got none"
            )

    @property
    def given(self) -> dict[str, Any]:
        """Every key with a value, except the kind."""
        return {key: value for key, value in given(self).items() if key != "kind"}
