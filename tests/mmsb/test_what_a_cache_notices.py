"""What changed since a run is computed anew or refused, never overlooked."""

import pytest
import torch
from torch.nn.utils import prune

from nsm_graph import Relation, topology
from nsm_graph.mmsb import PageEmbedding, Propagation, TokenPropagation, from_mask
from nsm_graph.testing import assert_close_to_norm

X = torch.randn(8, 8, dtype=torch.double)


def make(graph=None, **options):
    return Propagation(8, 2, 2, shadow_graph=graph, **options).double().eval()


def edges_of(rule):
    return rule(topology.NodeSet.from_counts([8])).edge_index


@pytest.mark.parametrize("is_replaced", [True, False])
def test_attributes_handed_over_again(is_replaced):
    stack, given = make(topology.blocks(by="kind")), {"kind": torch.arange(8) % 2}
    stack.run(X, attributes=given, cache=True)
    if is_replaced:
        given["kind"] = torch.arange(8) // 4
    else:
        given["kind"].copy_(torch.arange(8) // 4)
    result = stack.update(X, [], attributes=given)
    assert_close_to_norm(result, stack(X, attributes=given), 1e-12)


def test_edges_and_biases_edited_in_place():
    edges = edges_of(topology.ring(1))
    relation = Relation.from_edge_index(edges, (8, 8)).with_bias(torch.zeros(16).double())
    for graph, edit in (
        (edges.clone(), lambda graph: graph[0].copy_(edges[0].roll(3))),
        (relation, lambda graph: graph.bias.normal_()),
    ):
        stack = make(graph)
        stack.run(X, cache=True)
        edit(graph)
        assert_close_to_norm(stack.update(X, []), stack(X), 1e-12)


def test_the_stacks_own_shadow_graph_may_be_exchanged_for_any_kind():
    edges = edges_of(topology.ring(1))
    stack = make(topology.causal())
    names = list(stack.state_dict())
    for graph in (edges, Relation.from_edge_index(edges, (8, 8)), edges.flip(0), topology.band(1)):
        stack.run(X, cache=True)
        stack.shadow_graph = graph
        with pytest.raises(ValueError, match="weights or shadow graph are not those"):
            stack.update(X, [])
        assert_close_to_norm(stack(X), stack(X, shadow_graph=graph), 1e-12)
    assert list(stack.state_dict()) == names
    with pytest.raises(ValueError, match="shadow_graph must be a topology"):
        stack.shadow_graph = 3


def train_with_uncounted_writes(stack):
    stack.train()
    stack.passes[0].lin_in.weight.data.mul_(2.0)
    stack.eval()


CHANGES = {
    "activation": lambda s: setattr(s.passes[0], "activation", "gelu"),
    "eps": lambda s: setattr(s.passes[0].norm_route, "eps", 0.1),
    "final_norm": lambda s: setattr(s, "final_norm", torch.nn.LayerNorm(8).double()),
    "pass": lambda s: s.passes.append(s.passes[0]),
    "bias": lambda s: setattr(s.passes[0].lin_in, "bias", torch.nn.Parameter(torch.ones(32))),
    "pruned": lambda s: prune.random_unstructured(s.passes[0].lin_in, "weight", 0.5),
    "trained": train_with_uncounted_writes,
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_parts_and_settings_are_noticed(change):
    stack = make(topology.causal(), bias=False)
    stack.run(X, cache=True)
    CHANGES[change](stack)
    for call in (lambda: stack.update(X, []), lambda: stack.append(X)):
        with pytest.raises(ValueError, match="weights or shadow graph are not those"):
            call()


def test_pages_that_are_not_finite_end_with_the_page_that_brought_them():
    stack, pages = make(topology.causal()), X.clone()
    pages[5] = torch.nan
    stack.run(pages, cache=True)
    assert_close_to_norm(stack.update(X, [5]), stack(X), 1e-12)


def test_hooks_that_updates_would_leave_out_are_refused():
    stack = make(topology.causal())
    stack.run(X, cache=True)
    stack.passes[1].router.lin_qkv.register_forward_hook(lambda *_: None)
    for call in (lambda: stack.update(X, []), lambda: stack.run(X, cache=True)):
        with pytest.raises(ValueError, match="would not call its forward hooks"):
            call()


def test_autocast_is_refused():
    stack = make(topology.causal()).float()
    stack.run(X.float(), cache=True)
    with torch.autocast("cpu", torch.bfloat16):
        for call in (stack.append, lambda x: stack.run(x, cache=True)):
            with pytest.raises(ValueError, match="autocast is active"):
                call(X.float())


def test_a_cache_that_is_none_is_refused():
    stack = make(topology.causal())
    with pytest.raises(ValueError, match="cache must be a PropagationCache"):
        stack.update(X, [], cache=stack.run(X, cache=True))


def test_the_embedding_belongs_to_what_was_kept():
    embedding = PageEmbedding(9, 8, 8, dropout=0.1)
    model = TokenPropagation(embedding.double(), make(topology.causal())).eval()
    tokens = torch.tensor([3, 1, 4])
    model.run(tokens, cache=True)
    torch.nn.init.ones_(embedding.word.weight)
    with pytest.raises(ValueError, match="the embedding's weights are not those"):
        model.append(tokens)
    model.train()
    for call in (model.append, lambda tokens: model.run(tokens, cache=True)):
        with pytest.raises(ValueError, match="its dropout is active"):
            call(tokens)


def test_an_example_without_pages_has_nothing_to_pool():
    model = TokenPropagation(PageEmbedding(9, 8, 8), make(), torch.nn.Linear(8, 8)).double()
    with pytest.raises(ValueError, match=r"these have none: \[1\]"):
        model.pool(X[:3], torch.tensor([0, 0, 2]))


def test_masks_that_are_none_are_refused():
    stack = make(topology.causal())
    stack.run(X, cache=True)
    with pytest.raises(ValueError, match=r"row indices or a mask.*torch.uint8"):
        stack.update(X, torch.ones(8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"from_mask got \+inf"):
        from_mask(torch.full((2, 2), torch.inf))
