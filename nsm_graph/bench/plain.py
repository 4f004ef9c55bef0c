"""The documented machine as one would write it by hand, with the parameters of ours.

Twice: edge by edge with PyG's own parts, and as a dense loop in plain torch. Both read batches of
examples of one length that is a multiple of the segment, and predict from the mean of the states.

Legend: B examples, L tokens of a segment, N states, C channels, H heads, D = C / H, T tokens in
all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.utils import scatter, softmax

from nsm_graph.models import NeuralStateMachine


def embed(machine: NeuralStateMachine, x: Tensor) -> Tensor:
    """Embedded tokens with the positions of whole segments."""
    tokens = machine.embedding(x)
    position: Any = machine.position
    table = position.table
    return (tokens.unflatten(0, (-1, table.size(0))) + table).flatten(0, 1)


def predict(machine: NeuralStateMachine, states_BNC: Tensor) -> Tensor:
    return machine.head.lin_out(states_BNC.mean(1))


# Message passing ###################################################################


def message_passing(machine: NeuralStateMachine, x: Tensor, num_examples: int) -> Tensor:
    """Each segment through edges: gather both ends, softmax by group, scatter the messages."""
    cell: Any = machine.cell
    length = machine.segment_length or 1
    num_states = machine.manager.slots.numel()
    tokens_BTC = embed(machine, x).unflatten(0, (num_examples, -1))
    states = machine.manager.bank.repeat(num_examples, 1)
    importance = F.logsigmoid(machine.manager.importance)
    reads = _all_pairs(num_examples, length, num_states)
    talks = _all_pairs(num_examples, num_states, num_states)
    slot = reads[1] % num_states
    for segment_BLC in tokens_BTC.split(length, dim=1):
        tokens = segment_BLC.flatten(0, 1)
        routed = _route(cell.router, tokens, reads, slot, states.size(0), importance)
        key = cell.attention.lin_token(tokens)
        query = cell.attention.lin_query(states)
        attended = _attend(query, key, key, reads, cell.attention.heads)
        update = routed + cell.attention.lin_out(attended)
        states = _gates(cell.propagator, states, update)
        query, key, value = cell.communication.lin_qkv(states).chunk(3, dim=1)
        mixed = _attend(query, key, value, talks, cell.communication.heads)
        states = cell.communication.norm(states + cell.communication.lin_out(mixed))
    return predict(machine, states.unflatten(0, (num_examples, num_states)))


def _all_pairs(num_examples: int, num_src: int, num_dst: int) -> Tensor:
    """Edges from every source of an example to every target of it."""
    src = torch.arange(num_examples * num_src).view(num_examples, num_src, 1)
    dst = torch.arange(num_examples * num_dst).view(num_examples, 1, num_dst)
    return torch.stack([x.expand(-1, num_src, num_dst).flatten() for x in (src, dst)])


def _route(
    router: Any, tokens: Tensor, edges: Tensor, slot: Tensor, num_rows: int, importance: Tensor
) -> Tensor:
    src, dst = edges
    logits = router.lin_logits(tokens).unflatten(1, (router.num_states, router.heads))
    scores = logits[src, slot] + importance[slot].unsqueeze(1)
    weights = softmax(scores, src, num_nodes=tokens.size(0)).mean(1, keepdim=True)
    return router.lin_out(scatter(weights * tokens[src], dst, 0, num_rows, "sum"))


def _attend(query: Tensor, key: Tensor, value: Tensor, edges: Tensor, heads: int) -> Tensor:
    src, dst = edges
    q, k, v = (x.unflatten(1, (heads, -1)) for x in (query, key, value))
    scores = (q[dst] * k[src]).sum(-1) * q.size(-1) ** -0.5
    weights = softmax(scores, dst, num_nodes=q.size(0)).unsqueeze(-1)
    return scatter(weights * v[src], dst, 0, q.size(0), "sum").flatten(1)


def _gates(propagator: Any, states: Tensor, update: Tensor) -> Tensor:
    reset, mix = propagator.lin_gates(torch.cat([states, update], -1)).sigmoid().chunk(2, dim=-1)
    candidate = propagator.lin_candidate(torch.cat([reset * states, update], -1)).tanh()
    return (1 - mix) * states + mix * candidate


# A dense loop ######################################################################


def dense_loop(machine: NeuralStateMachine, x: Tensor, num_examples: int) -> Tensor:
    """Everything that depends on tokens only in one product each; steps unbound before the loop."""
    cell: Any = machine.cell
    router, attention, talk = cell.router, cell.attention, cell.communication
    length, heads = machine.segment_length or 1, attention.heads
    num_states = machine.manager.slots.numel()
    tokens_BSLC = embed(machine, x).unflatten(0, (num_examples, -1, length))
    tokens_SBLC = tokens_BSLC.transpose(0, 1).contiguous()
    logits = router.lin_logits(tokens_SBLC).unflatten(-1, (num_states, heads))
    logits = logits + F.logsigmoid(machine.manager.importance).unsqueeze(1)
    weights_SBLN = logits.softmax(-2).mean(-1)
    routed_SBNC = router.lin_out(weights_SBLN.transpose(-1, -2) @ tokens_SBLC)
    key_SBHLD = attention.lin_token(tokens_SBLC).unflatten(-1, (heads, -1)).transpose(2, 3)
    states = machine.manager.bank.expand(num_examples, -1, -1)
    for routed_BNC, key_BHLD in zip(routed_SBNC.unbind(0), key_SBHLD.unbind(0), strict=True):
        query = attention.lin_query(states)
        attended = _attend_dense(query, key_BHLD, key_BHLD, heads)
        states = _gates(cell.propagator, states, routed_BNC + attention.lin_out(attended))
        query, key, value = talk.lin_qkv(states).chunk(3, dim=-1)
        key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (key, value))
        mixed = talk.lin_out(_attend_dense(query, key, value, heads))
        states = talk.norm(states + mixed)
    return predict(machine, states)


def _attend_dense(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    query = query.unflatten(-1, (heads, -1)).transpose(1, 2)
    weights = (query @ key.transpose(-1, -2) * query.size(-1) ** -0.5).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)
