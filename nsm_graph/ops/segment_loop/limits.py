"""What the kernels for GPUs do not know, said before Triton is needed."""

from __future__ import annotations

import torch

from nsm_graph.ops.backend import HAS_TRITON, NEEDS_TRITON

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: A step's rows stay in a program's registers: states of an example and channels, at most.
MOST_STATES, MOST_CHANNELS = 64, 128


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
    if num_states > MOST_STATES or channels > MOST_CHANNELS:
        return (
            f"the kernel for a GPU holds at most {MOST_STATES} states of {MOST_CHANNELS} channels, "
            f"but an example has {num_states} of {channels}"
        )
    return None
