"""Public packages with a memory beside the tokens, where they are installed.

They are other models, not other ways to run ours: of one layer, with our channels, heads, states
and segments, they read as many tokens. Those that read symbols get 256 kinds of them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

SYMBOLS = 256

#: A module, and what one call of it reads; its result is what a loss is taken of.
Peer = tuple[nn.Module, Callable[[], Tensor]]


def make_packages(x_BLC: Tensor, states: int, heads: int, segment: int) -> dict[str, Peer]:
    """By name of the package."""
    return {
        name: make(x_BLC, states, heads, segment)
        for name, make in PACKAGES.items()
        if find_spec(name.replace("-", "_")) is not None
    }


def _perceiver(x_BLC: Tensor, states: int, heads: int, segment: int) -> Peer:
    from perceiver_pytorch import Perceiver

    channels = x_BLC.size(2)
    module = Perceiver(
        num_freq_bands=1, depth=1, max_freq=1.0, input_channels=channels, input_axis=1,
        num_latents=states, latent_dim=channels, cross_heads=heads, latent_heads=heads,
        cross_dim_head=channels // heads, latent_dim_head=channels // heads, num_classes=10,
        fourier_encode_data=False,
    )  # fmt: skip
    return module, lambda: module(x_BLC)


def _block_recurrent(x_BLC: Tensor, states: int, heads: int, segment: int) -> Peer:
    from block_recurrent_transformer_pytorch import BlockRecurrentTransformer

    _, length, channels = x_BLC.shape
    module = BlockRecurrentTransformer(
        num_tokens=SYMBOLS, dim=channels, depth=1, dim_head=channels // heads, heads=heads,
        max_seq_len=length, block_width=segment, num_state_vectors=states, recurrent_layers=(1,),
    )  # fmt: skip
    symbols = _symbols(x_BLC)
    return module, lambda: module(symbols)[0]


def _recurrent_memory(x_BLC: Tensor, states: int, heads: int, segment: int) -> Peer:
    import recurrent_memory_transformer_pytorch as package

    channels = x_BLC.size(2)
    module: Any = package.RecurrentMemoryTransformer(
        num_tokens=SYMBOLS, num_memory_tokens=states, dim=channels, depth=1,
        dim_head=channels // heads, heads=heads, seq_len=segment, causal=True,
    )  # fmt: skip
    module = package.RecurrentMemoryTransformerWrapper(module)
    symbols = _symbols(x_BLC)
    return module, lambda: module(symbols)[0]


def _symbols(x_BLC: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(SYMBOLS, x_BLC.shape[:2], generator=generator)


PACKAGES: dict[str, Callable[[Tensor, int, int, int], Peer]] = {
    "perceiver-pytorch": _perceiver,
    "block-recurrent-transformer-pytorch": _block_recurrent,
    "recurrent-memory-transformer-pytorch": _recurrent_memory,
}
