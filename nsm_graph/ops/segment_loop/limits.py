"""What the kernels for GPUs do not know, said before Triton is needed."""

from __future__ import annotations

import torch

from nsm_graph.ops.backend import HAS_TRITON, NEEDS_TRITON

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: Rows stay in a program's registers: states of an example, channels, and numbers of both, at most.
MOST_STATES, MOST_CHANNELS, MOST_NUMBERS = 64, 128, 4096


def why_not_triton(
    dtype: torch.dtype, num_states: int, channels: int, gated: int, *, is_lstm: bool
) -> str | None:
    """Why the kernels for GPUs cannot serve a loop; None where they can."""
    if not HAS_TRITON:
        return f"the kernel for a GPU {NEEDS_TRITON}"
    if dtype not in DTYPES:
        return f"the kernel for a GPU does not know {dtype}"
    if is_lstm:
        return "the kernel for a GPU has no LSTM's gates"
    if gated < channels:
        return (
            f"the kernel for a GPU keeps no channels, but gates write {gated} of {channels} "
            f"channels"
        )
    numbers = block_size(num_states) * block_size(channels)
    if num_states > MOST_STATES or channels > MOST_CHANNELS or numbers > MOST_NUMBERS:
        return (
            f"the kernel for a GPU holds up to {MOST_STATES} states of up to {MOST_CHANNELS} "
            f"channels, {MOST_NUMBERS} numbers in powers of 2, but an example has {num_states} of "
            f"{channels}"
        )
    return None


def block_size(size: int) -> int:
    """The next power of 2: blocks have such sizes, and masks; products of them need 16."""
    return max(1 << (size - 1).bit_length(), 16)
