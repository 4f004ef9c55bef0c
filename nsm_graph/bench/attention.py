"""Edge attention beside what people would use instead, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.utils import scatter, softmax

from nsm_graph.bench.record import BenchRecord, interleaved_medians, peak_mib
from nsm_graph.ops import edge_attention
from nsm_graph.relation import Relation

#: Targets, edges of each, heads, channels a head; there are twice as many sources.
SPARSE = ((4096, 16, 4, 32), (4096, 32, 4, 16))
#: Tokens, states that each keeps of how many, heads, channels a head.
ROUTING = ((16_384, 4, 1024, 4, 16),)
#: Examples, targets and sources of each, heads, channels a head.
COMPLETE = ((32, 16, 64, 4, 16), (8, 256, 1024, 4, 32))
#: Examples, nodes of each, heads, channels a head.
CAUSAL = ((1, 2048, 4, 32), (16, 256, 4, 32))
#: Targets, edges of each, heads, channels a head: a million edges.
LARGE = (65_536, 16, 4, 32)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def bench_attention(*, repetitions: int = 5, scale: float = 1.0) -> list[BenchRecord]:
    """General edges grouped by target, complete and causal relations, each beside its peers.

    A causal relation stands beside the same edges in a list as well, compressed beforehand.

    Args:
        repetitions: Timed turns of each.
        scale: Share of the targets and examples; less than 1 for a quick look.
    """
    records = []
    for num, degree, heads, channels in SPARSE:
        relation = _random_degree(int(num * scale), degree)
        case = f"sparse N{relation.num_dst} degree {degree} H{heads} D{channels}"
        peers = _graph_peers(relation, "target")
        targets = {"PyG": 12.0, "PyG compiled": 1.5, "DGL": 1.5}
        records += _compare(case, relation, heads, channels, "target", peers, targets, repetitions)
    for examples, num, length, heads, channels in COMPLETE:
        ptrs = (torch.arange(max(int(examples * scale), 1) + 1) * count for count in (length, num))
        relation = Relation.complete(*ptrs)
        case = f"complete B{examples} {num} x {length} H{heads} D{channels}"
        peers = {"SDPA": partial(_dense_view, relation)}
        targets = {"SDPA": 0.95}
        records += _compare(case, relation, heads, channels, "target", peers, targets, repetitions)
    for examples, num, heads, channels in CAUSAL:
        examples, num = max(int(examples * scale), 1), max(int(num * scale), 1)
        relation = Relation.causal(torch.arange(examples + 1) * num)
        case = f"causal B{examples} {num} nodes H{heads} D{channels}"
        peers = {
            "SDPA": partial(_dense_view, relation),
            "edge list": partial(_edge_list, relation),
        }
        targets = {"SDPA": 0.95}
        records += _compare(case, relation, heads, channels, "target", peers, targets, repetitions)
    return records


def bench_routing(*, repetitions: int = 5, scale: float = 1.0) -> list[BenchRecord]:
    """Edges grouped by source, where every token keeps its k states."""
    records = []
    for num_tokens, k, num_states, heads, channels in ROUTING:
        num_tokens = int(num_tokens * scale)
        keep = torch.rand(num_tokens, num_states).topk(k).indices
        src = torch.arange(num_tokens).repeat_interleave(k)
        edges = torch.stack([src, keep.flatten()])
        relation = Relation.from_edge_index(edges, (num_tokens, num_states))
        case = f"routing T{num_tokens} top-{k} of {num_states} H{heads} D{channels}"
        peers = _graph_peers(relation, "source")
        targets = {"PyG": 6.0}
        records += _compare(case, relation, heads, channels, "source", peers, targets, repetitions)
    return records


def bench_memory(*, repetitions: int = 1, scale: float = 1.0) -> list[BenchRecord]:
    """Peak memory of forward and backward over a million edges, beside messages per edge."""
    num, degree, heads, channels = LARGE
    relation = _random_degree(int(num * scale), degree)
    _ = relation.csr, relation.csc  # what a graph keeps, not what a call needs
    given = _inputs(relation, heads, channels)
    pyg = _pyg(relation, "target")
    ours = _ours(relation, "target")
    is_right = _agree(ours, pyg, given)
    time = interleaved_medians(
        {"ours": lambda: _step(ours, given), "PyG": lambda: _step(pyg, given)}, repetitions
    )
    mib = {name: peak_mib(partial(_step, f, given)) for name, f in (("ours", ours), ("PyG", pyg))}
    case = f"sparse E{relation.num_edges} H{heads} D{channels}: peak extra memory"
    return [
        BenchRecord(
            case, "PyG", time["ours"], time["PyG"], is_right, 10.0,
            ours_mib=mib["ours"], peer_mib=mib["PyG"], measure="mib",
        )
    ]  # fmt: skip


# Ours and theirs ###################################################################


def _ours(relation: Relation, normalise: Any) -> Attention:
    return lambda q, k, v: edge_attention(q, k, v, relation, normalise=normalise)


def _pyg(relation: Relation, normalise: str) -> Attention:
    """What message passing does: gather both ends, softmax by group, scatter the messages."""
    src, dst = relation.edge_index
    num_src, num_dst = relation.size
    group, num_groups = (dst, num_dst) if normalise == "target" else (src, num_src)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q[dst] * k[src]).sum(-1) * q.size(-1) ** -0.5
        weights = softmax(scores, group, num_nodes=num_groups)
        return scatter(v[src] * weights.unsqueeze(-1), dst, 0, num_dst, "sum")

    return attend


def _dgl(relation: Relation, normalise: str) -> Attention:
    import dgl

    src, dst = relation.edge_index
    names = ("source", "edge", "target")
    graph = dgl.heterograph(
        {names: (src, dst)}, {"source": relation.num_src, "target": relation.num_dst}
    )
    by = "dst" if normalise == "target" else "src"

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = dgl.ops.v_dot_u(graph, q, k) * q.size(-1) ** -0.5
        weights = dgl.ops.edge_softmax(graph, scores, norm_by=by)
        return dgl.ops.u_mul_e_sum(graph, v, weights)

    return attend


def _edge_list(relation: Relation) -> Attention:
    """The edges without what is known of them."""
    return _ours(Relation.from_edge_index(relation.edge_index, relation.size), "target")


def _graph_peers(relation: Relation, normalise: str) -> dict[str, Callable[[], Attention]]:
    peers: dict[str, Callable[[], Attention]] = {
        "PyG": lambda: _pyg(relation, normalise),
        "PyG compiled": lambda: torch.compile(_pyg(relation, normalise), dynamic=False),
    }
    if find_spec("dgl") is not None:
        peers["DGL"] = lambda: _dgl(relation, normalise)
    return peers


def _dense_view(relation: Relation) -> Attention:
    assert relation.sources is not None
    assert relation.targets is not None
    shape = relation.num_examples, -1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_BHND, k_BHLD, v_BHLD = (x.unflatten(0, shape).transpose(1, 2) for x in (q, k, v))
        out_BHND = F.scaled_dot_product_attention(
            q_BHND, k_BHLD, v_BHLD, is_causal=relation.is_causal
        )
        return out_BHND.transpose(1, 2).flatten(0, 1)

    return attend


# Runs ##############################################################################


def _compare(
    case: str,
    relation: Relation,
    heads: int,
    channels: int,
    normalise: str,
    peers: dict[str, Callable[[], Attention]],
    targets: dict[str, float],
    repetitions: int,
) -> list[BenchRecord]:
    """Ours at the current number of threads, each peer at its best: one thread or these."""
    given = _inputs(relation, heads, channels)
    ours = _ours(relation, normalise)
    num_threads = torch.get_num_threads()
    runs: dict[str, Callable[[], object]] = {"ours": lambda: _step(ours, given)}
    is_right: dict[str, bool] = {}
    for name, make in peers.items():
        for threads in sorted({1, num_threads}):
            torch.set_num_threads(threads)  # compiled code depends on it
            torch.compiler.reset()
            peer = make()
            is_right[name] = is_right.get(name, True) and _agree(ours, peer, given)
            runs[f"{name}, {threads}"] = partial(_step, peer, given, threads)
        torch.set_num_threads(num_threads)
    time = interleaved_medians(runs, repetitions)
    return [
        BenchRecord(
            case,
            name,
            time["ours"],
            min(ms for run, ms in time.items() if run.startswith(f"{name}, ")),
            is_right[name],
            targets.get(name, 1.0),
        )
        for name in peers
    ]


def _inputs(relation: Relation, heads: int, channels: int) -> list[Tensor]:
    """Query, key, value and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    rows = (relation.num_dst, relation.num_src, relation.num_src, relation.num_dst)
    given = [torch.randn(count, heads, channels, generator=generator) for count in rows]
    return [*(x.requires_grad_() for x in given[:3]), given[3]]


def _step(attend: Attention, given: list[Tensor], num_threads: int | None = None) -> list[Tensor]:
    """Output and gradients."""
    before = torch.get_num_threads()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    *inputs, direction = given
    out = attend(*inputs)
    grads = torch.autograd.grad(out, inputs, direction)
    torch.set_num_threads(before)
    return [out.detach(), *grads]


def _agree(ours: Attention, peer: Attention, given: list[Tensor]) -> bool:
    pairs = zip(_step(ours, given), _step(peer, given), strict=True)
    return all(float((a - b).norm()) <= 1e-5 * float(b.norm()) for a, b in pairs)


def _random_degree(num: int, degree: int) -> Relation:
    """Every target has so many edges, from any of twice as many sources."""
    generator = torch.Generator().manual_seed(0)
    src = torch.randint(2 * num, (num * degree,), generator=generator)
    dst = torch.arange(num).repeat_interleave(degree)
    return Relation.from_edge_index(torch.stack([src, dst]), (2 * num, num))
