"""What a run is: data, model and training, each a typed section whose checks name the key.

A key that is :obj:`None` is not given: the dataset or the model then uses its own default, which is
written once, there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsm_graph.training.checks import check_choice, check_keys, check_range, check_types, given
from nsm_graph.training.memory_config import MemoryConfig
from nsm_graph.training.model_config import KINDS, ModelConfig


@dataclass(kw_only=True)
class DataConfig:
    """Which data, and how they are prepared.

    Args:
        name: Dataset: digits, mnist, text, tu, zinc, or a sequence task: parity, s3, a5, s5,
            modular_arithmetic, modular_arithmetic_brackets, mqar, copy, selective_copy, induction,
            bindings.
        root: Folder that holds <NAME>/raw.
        cache: Folder for processed files.
        seed: Draws the validation part or the folds; independent of the run's seed, so that seeds
            share a split.
        validation_fraction: digits: share of the training images kept for validation.
        permuted: mnist: whether pixels come in one fixed random order.
        path: text: the file.
        dataset: tu: which of its datasets, such as PROTEINS.
        splits: tu: file with folds in the format of gnn-comparison.
        fold: tu: which fold is the test part.
        num_folds: tu: number of folds drawn where there is no file.
        node_features: tu: for sets whose nodes carry nothing, degree or constant.
        use_node_attr: tu: whether continuous node attributes are read.
        use_edge_attr: tu: whether continuous edge attributes are read.
        pe: graphs: positional encoding, random_walk or laplacian.
        pe_channels: graphs: size of the positional encoding.
        chunk_length: text: characters per stream that one step reads.
        max_length: sequence tasks: longest training sequences.
        test_length: sequence tasks: length of the test sequences.
        train_examples: sequence tasks: sequences in an epoch.
        test_examples: sequence tasks: sequences of the validation and of the test.
        num_pairs: mqar: pairs that are shown.
        filler: mqar: what stands between, random or zero.
        num_tokens: copy, selective_copy: tokens to remember.
        vocab_size: mqar, copy, selective_copy, induction: number of symbols.
        max_bindings: bindings: most bindings that are left.
        num_keys: bindings: number of keys.
        noise: bindings: share of noise.
        max_released: bindings: most keys that are released.
        has_dense_labels: modular_arithmetic_brackets: whether more than the last token has a label.
        augment: digits, mnist: whether training images are shifted by at most one pixel, at random.
    """

    name: str = "digits"
    root: str = "datasets"
    cache: str | None = None
    seed: int = 0
    validation_fraction: float | None = None
    permuted: bool | None = None
    path: str | None = None
    dataset: str | None = None
    splits: str | None = None
    fold: int | None = None
    num_folds: int | None = None
    node_features: str | None = None
    use_node_attr: bool | None = None
    use_edge_attr: bool | None = None
    pe: str | None = None
    pe_channels: int | None = None
    chunk_length: int | None = None
    max_length: int | None = None
    test_length: int | None = None
    train_examples: int | None = None
    test_examples: int | None = None
    num_pairs: int | None = None
    filler: str | None = None
    num_tokens: int | None = None
    vocab_size: int | None = None
    max_bindings: int | None = None
    num_keys: int | None = None
    noise: float | None = None
    max_released: int | None = None
    has_dense_labels: bool | None = None
    augment: bool = False

    def __post_init__(self) -> None:
        check_types(self, "data.")
        if self.augment and (self.name not in ("digits", "mnist") or self.permuted):
            got = f"{self.name}{' permuted' if self.permuted else ''}"
            raise ValueError(
                f"data.augment: expected images in reading order (digits, mnist); got {got}"
            )
        check_choice("data.pe", self.pe, ("random_walk", "laplacian"))
        if (self.pe is None) != (self.pe_channels is None):
            raise ValueError(
                f"data.pe, data.pe_channels: expected both or none; "
                f"got {self.pe!r} and {self.pe_channels}"
            )
        check_range("data.validation_fraction", self.validation_fraction, 0, 0.9)
        check_range("data.fold", self.fold, 0)
        check_range("data.pe_channels", self.pe_channels, 1)
        for key in ("chunk_length", "max_length", "test_length", "train_examples", "test_examples"):
            check_range(f"data.{key}", getattr(self, key), 1)
        if self.chunk_length is not None and self.name != "text":
            raise ValueError(
                f"data.chunk_length: expected only with data.name=text; got data.name={self.name}"
            )

    @property
    def options(self) -> dict[str, Any]:
        """What goes to the dataset: everything that was given and is not the loop's business."""
        own = ("name", "root", "cache", "seed", "chunk_length", "augment")
        return {key: value for key, value in given(self).items() if key not in own}


@dataclass(kw_only=True)
class TrainConfig:
    """How the model is trained.

    The learning rate rises over `warmup` of the run, stays until `hold` of it is over, and falls to
    zero along a cosine. Where
    `epochs` is given the run is measured in steps; `max_seconds` then ends it early only if the
    machine is too slow, and the cosine is shortened to fit. With `max_seconds` alone the run is
    measured in seconds, and no two runs are equal.

    Args:
        epochs: Passes over the training data.
        max_seconds: Time budget.
        batch_size: Examples in a step; text: parallel streams.
        lr: Highest learning rate.
        weight_decay: Decay of matrices (AdamW).
        warmup: Share of the run in which the learning rate rises.
        hold: Share of the run at whose end the learning rate begins to fall; a curriculum that is
            still growing needs it high.
        clip: Highest norm of the gradient.
        keep: Which checkpoint stays: best (on validation) or last.
        accelerator: cpu, cuda, mps or auto.
        devices: Number of devices; 1 for now.
        threads: CPU threads of every operation; PyTorch's own choice if not given. A small model is
            about as fast on one, and does not stall where other programs share the processor.
        precision: Of Lightning Fabric: 32-true, bf16-mixed, 16-mixed, bf16-true, 64-true.
        label_smoothing: Classification: share of the target that is spread over all classes in the
            training loss; keeps up the pressure towards exact states when all answers are right.
        harden: nsm with a scan: the stretch of its gates grows from 0 to model.stretch between
            30 and 80 % of the run: soft gates learn, hard gates hold at any length.
        random_segments: nsm: every batch is read in segments of a random length, up to
            model.segment_length.
        curriculum: sequence tasks: training accuracy at which lengths grow towards
            data.max_length, from the shortest the task has; all lengths at once if not given.
        min_length: sequence tasks: shortest training sequences; the shortest the task has if not
            given.
    """

    epochs: int | None = None
    max_seconds: float | None = None
    batch_size: int = 64
    lr: float = 3e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    hold: float = 0.0
    clip: float | None = 1.0
    keep: str = "best"
    accelerator: str = "cpu"
    devices: int = 1
    threads: int | None = None
    precision: str = "32-true"
    label_smoothing: float = 0.0
    harden: bool = False
    random_segments: bool = False
    curriculum: float | None = None
    min_length: int | None = None

    def __post_init__(self) -> None:
        check_types(self, "train.")
        if self.epochs is None and self.max_seconds is None:
            raise ValueError(
                "train.epochs, train.max_seconds: expected at least one of them; got neither"
            )
        check_range("train.epochs", self.epochs, 1)
        check_range("train.max_seconds", self.max_seconds, 0, above=True)
        check_range("train.batch_size", self.batch_size, 1)
        check_range("train.lr", self.lr, 0, above=True)
        check_range("train.weight_decay", self.weight_decay, 0)
        check_range("train.warmup", self.warmup, 0, 0.9)
        check_range("train.hold", self.hold, 0, 0.95)
        check_range("train.clip", self.clip, 0, above=True)
        check_range("train.threads", self.threads, 1)
        check_range("train.label_smoothing", self.label_smoothing, 0, 0.9)
        check_range("train.curriculum", self.curriculum, 0, 1)
        check_range("train.min_length", self.min_length, 1)
        if self.devices != 1:
            raise ValueError(
                f"train.devices: expected 1 (several processes are not supported yet); "
                f"got {self.devices}"
            )
        check_choice("train.keep", self.keep, ("best", "last"))
        if self.harden and self.keep != "last":
            raise ValueError(
                f"train.harden: expected train.keep=last, since gates are hard at the end only; "
                f"got train.keep={self.keep}"
            )
        check_choice("train.accelerator", self.accelerator, ("cpu", "cuda", "mps", "auto"))
        check_choice(
            "train.precision",
            self.precision,
            ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"),
        )


#: The sections of a config, by their keys.
SECTIONS = {"data": DataConfig, "model": ModelConfig, "train": TrainConfig, "memory": MemoryConfig}


@dataclass(kw_only=True)
class Config:
    """One run.

    Args:
        data: The data.
        model: The model.
        train: The training.
        memory: nsm: how the node set changes in training.
        seed: Weights, order of the examples, dropout.
        compare: Baselines of equal parameter count, trained by the same loop for the same time:
            gru,lstm,transformer,deltanet or none.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig
    train: TrainConfig
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    seed: int = 0
    compare: str = "none"

    def __post_init__(self) -> None:
        check_types(self, "")
        check_range("seed", self.seed, 0)
        for name in self.compared:
            check_choice("compare", name, KINDS[1:] if self.compare != "none" else (*KINDS, "none"))
        if self.train.harden and self.model.kind == "nsm" and self.model.scan_layers is None:
            raise ValueError(
                "train.harden: expected only with an ordered scan, whose gates it hardens; set "
                "model.scan_layers, too"
            )
        if self.memory.is_given and self.model.kind != "nsm":
            raise ValueError(
                f"memory.every: expected with model.kind=nsm, which has states; got "
                f"model.kind={self.model.kind}"
            )
        self._check_memory()
        if len(set(self.compared)) < len(self.compared):
            raise ValueError(f"compare: expected each baseline once; got {self.compare}")

    def _check_memory(self) -> None:
        """Refuses limits of the memory that the model's states do not fit."""
        if self.memory.state_cost > 0 and self.model.address_channels is None:
            raise ValueError(
                "memory.state_cost: expected where examples have node sets of their own; set "
                "model.address_channels, too"
            )
        if not self.memory.is_given:
            return
        first = self.model.num_states or 0
        slots = self.model.max_states or first
        most = slots if self.memory.max_states is None else self.memory.max_states
        if not first <= most <= slots:
            raise ValueError(
                f"memory.max_states: expected {first} to {slots}, from model.num_states to "
                f"model.max_states; got {most}"
            )
        if self.memory.grows and most == first:
            raise ValueError(
                f"memory: expected room to grow; got model.num_states={first} and no more slots; "
                f"set model.max_states"
            )
        if self.memory.min_states > first:
            raise ValueError(
                f"memory.min_states: expected at most model.num_states={first}; got "
                f"{self.memory.min_states}"
            )

    @property
    def compared(self) -> list[str]:
        """The names in `compare`."""
        return [] if self.compare == "none" else [name.strip() for name in self.compare.split(",")]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """Builds a config from nested dicts; an unknown key is refused."""
        check_keys(values, cls, "")
        sections = SECTIONS
        built: dict[str, Any] = {key: value for key, value in values.items() if key not in sections}
        for name, section in sections.items():
            given = values.get(name) or {}
            if not isinstance(given, Mapping):
                raise ValueError(f"{name}: expected a section of keys; got {given!r}")
            check_keys(given, section, f"{name}.")
            built[name] = section(**given)
        return cls(**built)

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of everything that is given."""
        sections = {name: given(getattr(self, name)) for name in SECTIONS}
        return {**sections, "seed": self.seed, "compare": self.compare}

    def save(self, path: Path) -> None:
        """Writes the config as YAML."""
        import yaml

        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))
