"""The loop over segments in plain torch: the definition, with derivatives of any order.

Legend: B examples of a step, N states, C channels, of which the last G are gated and the first
K = C - G kept, H heads, D = C / H, L tokens of a group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nsm_graph.ops.hoist import HoistWeights, TokenGroups
from nsm_graph.ops.hoist import reference as hoisting
from nsm_graph.ops.segment_loop.inputs import LoopSegments, LoopWeights, TokenResults
from nsm_graph.ops.segment_loop.scan import LoopScan, advance, convolve


def token_loop(
    states: Tensor,
    x: Tensor,
    first: Tensor,
    projections: HoistWeights,
    segments: LoopSegments,
    w: LoopWeights,
    heads: int,
    talk_heads: int,
    cell: Tensor | None,
    scan: LoopScan | None,
) -> TokenResults:
    """Hoists what depends on tokens only, then loops over segments; scans each one before it."""
    groups = TokenGroups(first, segments.token_ptr)
    key, value, routed, routing = hoisting.hoist(x, groups, projections, heads)
    num_states = projections.logits.size(0) // heads
    lengths = segments.token_ptr.diff().repeat_interleave(num_states).to(x.device)
    rows = torch.arange(lengths.numel(), device=x.device).repeat_interleave(lengths)
    mass = routing.detach().new_zeros(lengths.numel()).index_add(0, rows, routing.detach())
    reads: list[Tensor] = []
    read_first = None
    if scan is not None:
        ptr = segments.token_ptr
        convolved = convolve(scan, first, ptr, segments.num_active)

        def read_first(states: Tensor, group: int, count: int) -> Tensor:
            counts = ptr[group : group + count + 1].diff()
            start, end = int(ptr[group]), int(ptr[group + count])
            weights = routing[start * num_states : end * num_states]
            states, found = advance(scan, states, convolved[start:end], weights, counts)
            reads.append(found)
            return states

    after, final, *last = segment_loop(
        states, routed, key, value, segments, w, heads, talk_heads, cell, read_first
    )
    found = None
    if scan is not None and scan.layout.reads > 0:
        nothing = x.new_empty(0, scan.channels)
        found = torch.cat([nothing, *reads])
    return TokenResults(after, final, mass, last[0] if last else None, found)


def segment_loop(
    states: Tensor,
    routed: Tensor,
    key: Tensor,
    value: Tensor,
    segments: LoopSegments,
    w: LoopWeights,
    heads: int,
    talk_heads: int,
    cell: Tensor | None = None,
    read_first: Callable[[Tensor, int, int], Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """States after every step, ``[groups N, C]``, and after each example's last, ``[B N, C]``.

    Of an LSTM also the cell after each example's last step. Where given, ``read_first`` takes the
    states, the first group and the number of groups of a step, and gives the states that it reads.
    """
    token_ptr, num_active = segments
    num_groups = token_ptr.numel() - 1
    if num_groups == 0:
        nothing = 0 * (key[:0].sum() + value[:0].sum() + states[:0].sum())
        carried = [states] if cell is None else [states, cell]
        return routed + nothing, *[rows + nothing for rows in carried]
    num_states = routed.size(0) // num_groups
    after, finished, finished_cells = [], [], []
    group = 0
    for count in num_active.tolist():
        if count == 0:
            break
        counts = token_ptr[group : group + count + 1].diff()
        first, end = int(token_ptr[group]), int(token_ptr[group + count])
        state = states[: count * num_states]
        finished.append(states[count * num_states :])
        if read_first is not None:
            state = read_first(state, group, count)
        key_BLC, mask_BL = _padded(key[first:end], counts)
        value_BLC, _ = _padded(value[first:end], counts)
        rows = slice(group * num_states, (group + count) * num_states)
        query = F.linear(state, w.query, w.query_bias).unflatten(0, (count, num_states))
        attended = _attend(query, key_BLC, value_BLC, heads, mask_BL)
        update = routed[rows] + F.linear(attended.flatten(0, 1), w.out, w.out_bias)
        kept, gated = state.split([state.size(1) - w.gated, w.gated], dim=1)
        update = torch.cat([update, kept], dim=1)
        if cell is None:
            gated = _gru(gated, update, w)
        else:
            finished_cells.append(cell[count * num_states :])
            gated, cell = _lstm(gated, update, cell[: count * num_states], w)
        if w.qkv is not None:
            qkv = F.linear(gated, w.qkv, w.qkv_bias).unflatten(0, (count, num_states))
            query, keys, values = qkv.chunk(3, dim=-1)
            talk = _attend(query, keys, values, talk_heads, None).flatten(0, 1)
            assert w.mix is not None
            gated = gated + F.linear(talk, w.mix, w.mix_bias)
            gated = F.layer_norm(gated, gated.shape[1:], w.scale, w.shift)
        states = torch.cat([kept, gated], dim=1)
        after.append(states)
        group += count
    # Examples finish from the back.
    final = torch.cat([states, *finished[::-1]])
    if cell is None:
        return torch.cat(after), final
    return torch.cat(after), final, torch.cat([cell, *finished_cells[::-1]])


def _gru(state: Tensor, update: Tensor, w: LoopWeights) -> Tensor:
    gates = F.linear(torch.cat([state, update], 1), w.gates, w.gates_bias).sigmoid()
    reset, mix = gates.chunk(2, dim=1)
    both = torch.cat([reset * state, update], 1)
    assert w.candidate is not None
    candidate = F.linear(both, w.candidate, w.candidate_bias).tanh()
    return (1 - mix) * state + mix * candidate


def _lstm(state: Tensor, update: Tensor, cell: Tensor, w: LoopWeights) -> tuple[Tensor, Tensor]:
    gates = F.linear(torch.cat([state, update], 1), w.gates, w.gates_bias)
    i, f, o, g = gates.chunk(4, dim=1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _padded(rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, L, C]``, and which places hold a token."""
    parts = rows.split(counts.tolist())
    padded = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    places = torch.arange(padded.size(1), device=rows.device)
    return padded, places < counts.to(rows.device).unsqueeze(1)


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = q @ k.transpose(-1, -2) * q.size(-1) ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
