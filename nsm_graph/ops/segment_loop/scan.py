"""The ordered scan of a segment's tokens as a part of the loop: what it is given, what it is.

Legend: B examples of a step, S tokens of the longest, N states, T and M transition and memory heads
of D channels, which are the first of each state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nsm_graph.ops.delta_scan import prepare, run
from nsm_graph.ops.delta_scan.cpu.arrays import Layout
from nsm_graph.ops.delta_scan.tokens import steps_of


class LoopScan(NamedTuple):
    """What a scan of one layer reads, and what it has learned."""

    x: Tensor  #: [T, C_t], the tokens as a scan reads them, in the order of the loop's own
    weight: Tensor  #: [columns, C_t], of everything that it projects tokens to: see `layout`
    bias: Tensor  #: [columns]
    convolution: Tensor | None  #: [C_t, 2 C_t], of the token before and a token, added to a token
    convolution_bias: Tensor | None  #: [C_t]
    tail: Tensor | None  #: [B, C_t], the token before the first of each example; None = zeros
    layout: Layout  #: from :func:`nsm_graph.ops.delta_scan.cpu.arrays.make_layout`
    stretch: float  #: of the gates

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What has gradients, in the order above."""
        parameters = (self.weight, self.bias, self.convolution, self.convolution_bias)
        return (self.x, *parameters, self.tail)

    @property
    def channels(self) -> int:
        """Channels of what a token reads."""
        return (self.layout.transition + self.layout.memory) * self.layout.width


#: Tensors of a :class:`LoopScan`, which stand first.
NUM_TENSORS = LoopScan._fields.index("layout")


def check_scan(
    scan: LoopScan, x: Tensor, num_examples: int, num_states: int, channels: int
) -> None:
    """Raises unless the scan fits tokens ``x`` and so many examples, states and channels."""
    if (scan.convolution is None) != (scan.convolution_bias is None):
        raise ValueError("scan.convolution and its bias belong together; pass both or none")
    layout, width = scan.layout, x.size(1)
    sizes = {
        "x": tuple(x.shape), "weight": (layout.num_columns, width), "bias": (layout.num_columns,),
        "convolution": (width, 2 * width), "convolution_bias": (width,),
        "tail": (num_examples, width),
    }  # fmt: skip
    for name, size in sizes.items():
        tensor = getattr(scan, name)
        if tensor is None and name in ("convolution", "convolution_bias", "tail"):
            continue
        if (tensor.shape, tensor.dtype, tensor.device) != (size, x.dtype, x.device):
            raise ValueError(
                f"scan.{name} must have shape {size} in {x.dtype} on {x.device}, but has "
                f"{tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}"
            )
    if layout.num_states != num_states:
        raise ValueError(
            f"scan.layout is for {layout.num_states} states, but examples have {num_states}; make "
            f"it for as many"
        )
    if not 0 < scan.channels <= channels:
        raise ValueError(
            f"scan.layout has {layout.transition} + {layout.memory} heads of {layout.width} "
            f"channels, but states have {channels} channels: give it at least one, at most those"
        )


def convolve(scan: LoopScan, first: Tensor, token_ptr: Tensor, num_active: Tensor) -> Tensor:
    """The tokens of all groups, one group after another, each with the one before it in mind.

    Before the first token of a group stands the last of its example's group before.
    """
    starts, lengths, found, before = first.tolist(), token_ptr.diff().tolist(), [], []
    group = 0
    tail = scan.tail
    if tail is None:
        tail = scan.x.new_zeros(int(num_active.max()) if len(num_active) > 0 else 0, 1)
    last = list(tail.expand(-1, scan.x.size(1)).unsqueeze(1))
    for count in num_active.tolist():
        for example in range(count):
            own = scan.x[starts[group] : starts[group] + lengths[group]]
            found.append(own)
            before.append(torch.cat([last[example], own[:-1]]))
            last[example] = own[-1:]
            group += 1
    if group == 0:
        return scan.x[:0]
    x = torch.cat(found)
    if scan.convolution is None:
        return x
    return x + F.linear(
        torch.cat([torch.cat(before), x], 1), scan.convolution, scan.convolution_bias
    )


def advance(
    scan: LoopScan, states: Tensor, x: Tensor, weights: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """The states of B examples after their segments, and what the tokens read.

    Args:
        scan: See :class:`LoopScan`; its tokens are not looked at.
        states: ``[B N, C]``.
        x: The segments' convolved tokens, one segment after another, ``[tokens, C_t]``.
        weights: Their routing weights by segment, state and token, ``[tokens N]``.
        counts: ``[B]``, tokens of each segment.

    Returns:
        ``[B N, C]`` and ``[tokens, (T + M) D]``; the latter is empty where nobody reads.
    """
    layout, sizes = scan.layout, counts.tolist()
    size = (len(sizes), layout.num_states)

    def padded(rows: Tensor) -> Tensor:
        return pad_sequence(list(rows.split(sizes)), batch_first=True)

    shares = weights.split([count * layout.num_states for count in sizes])
    weights_BSN = padded(torch.cat([w.view(layout.num_states, -1).t() for w in shares]))
    places = torch.arange(max(sizes), device=x.device)
    real_BS = places < counts.to(x.device).unsqueeze(1)
    rows_BSX = padded(F.linear(x, scan.weight, scan.bias))
    steps = steps_of(rows_BSX, layout, scan.stretch, weights_BSN)
    scanned, others = states[:, : scan.channels], states[:, scan.channels :]
    heads_BNHD = scanned.unflatten(-1, (-1, layout.width)).unflatten(0, size)
    after, reads = [], []
    if steps.transition is not None:
        weight = None
        if layout.reads > 0:
            mean = torch.full_like(weights_BSN, 1 / layout.num_states)
            weight = mean if layout.reads == 1 else weights_BSN
        prepared = prepare(steps.transition.only(real_BS), weight=weight, backend="reference")
        own = heads_BNHD[:, :, : layout.transition].permute(0, 2, 3, 1)
        own, read = run(own, prepared)
        after.append(own.permute(0, 3, 1, 2))
        reads.append(read)
    if steps.memory is not None:
        query = steps.query if layout.reads > 0 else None
        prepared = prepare(steps.memory.only(real_BS), query=query, backend="reference")
        own, read = run(heads_BNHD[:, :, layout.transition :].transpose(1, 2), prepared)
        after.append(own.transpose(1, 2))
        reads.append(read)
    new = torch.cat([torch.cat(after, 2).flatten(2).flatten(0, 1), others], 1)
    found = [read for read in reads if read is not None]
    return new, torch.cat(found, 2).flatten(2)[real_BS] if found else x.new_empty(0)
