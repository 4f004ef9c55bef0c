"""What every layer owes a PyG user, asked of all of them alike."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch_geometric.explain import AttentionExplainer, Explainer, GNNExplainer

from nsm_graph import Partition, Relation
from nsm_graph.nn import (
    HybridAttention,
    MemoryConv,
    StateCommunication,
    StatePool,
    StatePropagator,
    TokenReadout,
    TokenToStateRouter,
)


def complete(num_tokens, num_states):
    """A new relation for every call: nothing cached in an earlier one may help."""
    return Relation.complete([0, num_tokens, 2 * num_tokens], [0, num_states, 2 * num_states])


def general(num_tokens, num_states):
    relation = complete(num_tokens, num_states)
    return Relation.from_edge_index(relation.edge_index[:, ::2], relation.size)


def plain(num_tokens, num_states):
    return general(num_tokens, num_states).edge_index


class Case:
    """A layer of each kind, with inputs for 2 examples of T tokens and N states."""

    def __init__(self, name, text, make, arguments, has_edges=True):
        self.name, self.text, self.make = name, text, make
        self.arguments, self.has_edges = arguments, has_edges

    def __repr__(self):
        return self.name


def tokens(t, dtype=None):
    return torch.randn(2 * t, 4, dtype=dtype)


def states(n, dtype=None):
    return torch.randn(2 * n, 6, dtype=dtype)


ATTENTION = [
    Case(
        "router",
        "TokenToStateRouter(4, 6, num_states=3, heads=2)",
        lambda: TokenToStateRouter(4, 6, 3, 2),
        lambda t, n, edges, dtype=None: ((tokens(t, dtype), states(n, dtype)), edges(t, n)),
    ),
    Case(
        "hybrid_attention",
        "HybridAttention((4, 6), heads=2)",
        lambda: HybridAttention((4, 6), 2),
        lambda t, n, edges, dtype=None: ((tokens(t, dtype), states(n, dtype)), edges(t, n)),
    ),
    Case(
        "communication",
        "StateCommunication(6, heads=2)",
        lambda: StateCommunication(6, 2),
        lambda t, n, edges, dtype=None: (states(n, dtype), edges(n, n)),
    ),
    Case(
        "readout",
        "TokenReadout(4, 6, heads=2, causal=False)",
        lambda: TokenReadout(4, 6, 2),
        lambda t, n, edges, dtype=None: ((states(n, dtype), tokens(t, dtype)), edges(n, t)),
    ),
]
NODEWISE = [
    Case(
        "gru",
        "StatePropagator(6, cell='gru')",
        lambda: StatePropagator(6),
        lambda t, n, edges, dtype=None: (states(n, dtype), states(n, dtype)),
        has_edges=False,
    ),
    Case(
        "lstm",
        "StatePropagator(6, cell='lstm')",
        lambda: StatePropagator(6, cell="lstm"),
        lambda t, n, edges, dtype=None: tuple(states(n, dtype) for _ in range(3)),
        has_edges=False,
    ),
    Case(
        "pool",
        "StatePool('attention')",
        lambda: StatePool("attention", state_channels=6),
        lambda t, n, edges, dtype=None: (
            states(n, dtype),
            torch.arange(2).repeat_interleave(n),
            2,
        ),
        has_edges=False,
    ),
    Case(
        "memory_conv",
        "MemoryConv(6, num_states=3, heads=2)",
        lambda: MemoryConv(6, 3, 2),
        lambda t, n, edges, dtype=None: (states(t, dtype), None, Partition.uniform(2, t)),
        has_edges=False,
    ),
]
LAYERS = ATTENTION + NODEWISE
KINDS = [complete, general, plain]


def first(out):
    return out[0] if isinstance(out, tuple) else out


def flat(out):
    """All tensors of an output, whatever its form."""
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, dict):
        return [t for key in sorted(out) for t in flat(out[key])]
    return [] if out is None else [t for part in out for t in flat(part)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("case", LAYERS, ids=repr)
def test_repr_says_what_it_is(case):
    assert case.text in str(case.make())


@pytest.mark.parametrize("case", LAYERS, ids=repr)
@pytest.mark.parametrize("copied", ["state_dict", "deepcopy", "pickle"])
def test_copies_give_the_same_result(case, copied):
    layer, arguments = case.make(), case.arguments(5, 3, complete)
    if copied == "state_dict":
        twin = case.make()
        pairs = zip(layer.parameters(), twin.parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs)
        twin.load_state_dict(layer.state_dict())
    elif copied == "deepcopy":
        twin = copy.deepcopy(layer)
    else:
        twin = pickle.loads(pickle.dumps(layer))
    for a, b in zip(flat(layer(*arguments)), flat(twin(*arguments)), strict=True):
        assert torch.equal(a, b)
    assert {id(p) for p in twin.parameters()}.isdisjoint({id(p) for p in layer.parameters()})


@pytest.mark.parametrize("case", LAYERS, ids=repr)
def test_reset_parameters_draws_anew_and_repeats_with_the_seed(case):
    torch.manual_seed(3)
    layer = case.make()
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert any(not torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    torch.manual_seed(5)
    layer.reset_parameters()
    drawn = copy.deepcopy(layer.state_dict())
    torch.manual_seed(5)
    layer.reset_parameters()
    assert all(torch.equal(v, drawn[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("case", LAYERS, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(case, kind):
    if kind is not complete and not case.has_edges:
        pytest.skip("takes no edges")
    layer = case.make().double()
    arguments = case.arguments(2, 3, kind, torch.double)
    if case.name == "communication":
        arguments = (arguments[0][:6], kind(3, 3))
    leaves = [t for t in flat(arguments[:1]) if t.is_floating_point()]
    leaves = [t.requires_grad_() for t in leaves] + list(layer.parameters())
    assert torch.autograd.gradcheck(
        lambda *_: tuple(t for t in flat(layer(*arguments)) if t.is_floating_point()), leaves
    )


@pytest.mark.parametrize("case", ATTENTION, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_false_means_no_weights(case, kind):
    layer, arguments = case.make(), case.arguments(5, 3, kind)
    out = layer(*arguments)
    assert isinstance(out, torch.Tensor)
    for given in (None, False):
        assert torch.equal(layer(*arguments, return_attention_weights=given), out)
    same, (edge_index, weights) = layer(*arguments, return_attention_weights=True)
    torch.testing.assert_close(same, out)
    given = arguments[1]
    expected = given.edge_index if isinstance(given, Relation) else given
    assert torch.equal(edge_index, expected)
    assert weights.size(0) == edge_index.size(1)
    assert ((weights >= 0) & (weights <= 1)).all()


@pytest.mark.parametrize("case", ATTENTION, ids=repr)
def test_fast_path_and_message_passing_agree(case):
    layer, arguments = case.make(), case.arguments(5, 3, complete)
    features, relation = arguments
    torch.testing.assert_close(layer(features, relation.edge_index), layer(features, relation))


@pytest.mark.parametrize("case", ATTENTION, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_fire_see_messages_and_change_nothing(case, kind):
    layer, arguments = case.make(), case.arguments(5, 3, kind)
    out, messages, aggregated = layer(*arguments), [], []
    handles = [
        layer.register_message_forward_hook(lambda *a: messages.append(a[2])),
        layer.register_aggregate_forward_hook(lambda *a: aggregated.append(a[2])),
    ]
    torch.testing.assert_close(layer(*arguments), out)
    edges = arguments[1]
    num_edges = edges.num_edges if isinstance(edges, Relation) else edges.size(1)
    assert [m.size(0) for m in messages] == [num_edges]
    assert len(aggregated) == 1
    for handle in handles:
        handle.remove()
    layer(*arguments)
    assert len(messages) == 1


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("case", ATTENTION[1:], ids=repr)
def test_adj_t_equals_edge_index(case):
    layer, arguments = case.make(), case.arguments(5, 3, general)
    features, relation = arguments
    src, dst = relation.edge_index
    adj_t = torch.sparse_coo_tensor(
        torch.stack([dst, src]), torch.ones(src.numel()), (relation.num_dst, relation.num_src)
    )
    torch.testing.assert_close(
        layer(features, adj_t.to_sparse_csr()), layer(features, relation.edge_index)
    )


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_router_says_that_it_takes_no_adj_t():
    adj_t = torch.eye(3).to_sparse_csr()
    with pytest.raises(ValueError, match="edge_index must be a"):
        TokenToStateRouter(4, 6, 3, 2)((torch.randn(3, 4), torch.randn(3, 6)), adj_t)


LAZY = [
    ("router", lambda: TokenToStateRouter(-1, 6, 3, 2), ATTENTION[0]),
    ("hybrid_attention", lambda: HybridAttention((-1, 6), 2), ATTENTION[1]),
    ("readout", lambda: TokenReadout(-1, 6, 2, out_channels=4), ATTENTION[3]),
]


@pytest.mark.parametrize(("name", "make", "case"), LAZY, ids=[name for name, _, _ in LAZY])
@pytest.mark.parametrize("kind", [complete, plain])
def test_lazy_sizes_come_from_the_first_call(name, make, case, kind):
    arguments = case.arguments(5, 3, kind)
    layer = make()
    assert "-1" in str(layer)
    out = layer(*arguments)
    sized = case.make()
    sized.load_state_dict(layer.state_dict())
    torch.testing.assert_close(sized(*arguments), out)
    assert copy.deepcopy(layer)(*arguments).shape == out.shape
    wide = torch.randn(10, 9)
    pair = (arguments[0][0], wide) if name == "readout" else (wide, arguments[0][1])
    with pytest.raises((ValueError, RuntimeError)):
        layer(pair, arguments[1])


# Explainers ###################################################################


class OneGraph(nn.Module):
    """The layer as a node classifier on one graph, for explainers."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.layer = {
            "router": lambda: TokenToStateRouter(6, 6, 5, 2),
            "hybrid_attention": lambda: HybridAttention(6, 2),
            "communication": lambda: StateCommunication(6, 2),
            "readout": lambda: TokenReadout(6, 6, 2),
        }[name]()

    def forward(self, x, edge_index):
        return self.layer(x if self.name == "communication" else (x, x), edge_index)


@pytest.mark.parametrize("case", ATTENTION, ids=repr)
@pytest.mark.parametrize("algorithm", [AttentionExplainer, GNNExplainer])
def test_explainers_work(case, algorithm):
    model = OneGraph(case.name)
    x = torch.randn(5, 6)
    edge_index = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 0, 2, 4]])
    explainer = Explainer(
        model,
        algorithm() if algorithm is AttentionExplainer else algorithm(epochs=3),
        explanation_type="model",
        node_mask_type=None if algorithm is AttentionExplainer else "attributes",
        edge_mask_type="object",
        model_config={"mode": "regression", "task_level": "node", "return_type": "raw"},
    )
    before = model(x, edge_index)
    explanation = explainer(x, edge_index)
    assert explanation.edge_mask.shape == (7,)
    assert explanation.edge_mask.max() > 0
    torch.testing.assert_close(model(x, edge_index), before)


# Compilation ##################################################################


# What Dynamo warns of while it falls back is not what is asked here.
quiet = pytest.mark.filterwarnings("ignore")


@quiet
@pytest.mark.parametrize("case", LAYERS, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(case, kind):
    if kind is not complete and not case.has_edges:
        pytest.skip("takes no edges")
    layer, arguments = case.make(), case.arguments(5, 3, kind)
    expected = layer(*arguments)
    torch._dynamo.reset()
    fresh = list(arguments)
    if isinstance(fresh[1], Relation):  # a relation on which nothing was cached yet
        relation = fresh[1]
        fresh[1] = relation.to(relation.device)
    explained = torch._dynamo.explain(layer)(*fresh)
    assert explained.graph_break_count == 0, explained.break_reasons[0].reason[:300]
    assert explained.graph_count == 1
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for a, b in zip(flat(compiled(*fresh)), flat(expected), strict=True):
        torch.testing.assert_close(a, b)


@quiet
@pytest.mark.parametrize("case", LAYERS, ids=repr)
@pytest.mark.parametrize("kind", [complete, plain])
def test_recompiles_at_most_twice(case, kind):
    if kind is not complete and not case.has_edges:
        pytest.skip("takes no edges")
    torch._dynamo.reset()
    counter, layer = CompileCounter(), case.make()
    compiled = torch.compile(layer, backend=counter)
    for num_tokens in (5, 6, 9, 16, 33, 2):
        arguments = case.arguments(num_tokens, 3, kind)
        out = compiled(*arguments)
        for a, b in zip(flat(out), flat(layer(*arguments)), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 3
