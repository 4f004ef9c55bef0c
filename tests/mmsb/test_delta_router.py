"""The delta router: a layer like the others, and self-attention on the complete graph."""

import pytest
import torch
from torch import nn
from torch_geometric.explain import Explainer, GNNExplainer

from nsm_graph import Relation
from nsm_graph.mmsb import DeltaRouter
from nsm_graph.testing import random_relation


def torch_attention(router):
    attention = nn.MultiheadAttention(6, router.heads, batch_first=True).double().eval()
    attention.in_proj_weight.data = router.lin_qkv.weight.data.clone()
    attention.in_proj_bias.data = router.lin_qkv.bias.data.clone()
    attention.out_proj.weight.data = router.lin_out.weight.data.clone()
    attention.out_proj.bias.data = router.lin_out.bias.data.clone()
    return attention


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_equals_self_attention(heads):
    router, pages = DeltaRouter(6, heads).double(), torch.randn(5, 6, dtype=torch.double)
    expected, weights = torch_attention(router)(
        pages[None], pages[None], pages[None], average_attn_weights=False
    )
    relation = Relation.complete([0, 5], [0, 5])
    out, (edge_index, alpha) = router(pages, relation, return_attention_weights=True)
    torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-10)
    assert torch.equal(edge_index, relation.edge_index)
    dense = relation.to_dense(alpha)[0].permute(2, 0, 1)
    torch.testing.assert_close(dense, weights[0], rtol=0, atol=1e-10)


def test_message_passing_and_fast_path_agree_and_hooks_see_messages():
    router, relation = DeltaRouter(8, 2), random_relation(6, 6, 15)
    pages, seen = torch.randn(6, 8), []
    fast = router(pages, relation)
    torch.testing.assert_close(router(pages, relation.edge_index), fast)
    handle = router.register_message_forward_hook(lambda *given: seen.append(given[2].size(0)))
    torch.testing.assert_close(router(pages, relation), fast)
    handle.remove()
    assert seen == [15]


def test_queries_and_sources_apart_are_the_projection():
    for bias in (True, False):
        router, pages = DeltaRouter(8, 2, bias=bias), torch.randn(6, 8)
        apart = router.project_queries(pages), *router.project_sources(pages)
        for one, other in zip(router.project(pages), apart, strict=True):
            torch.testing.assert_close(one, other)


def test_gradcheck():
    router = DeltaRouter(4, 2).double()
    pages = torch.randn(4, 4, dtype=torch.double, requires_grad=True)
    edges = random_relation(4, 4, 7).edge_index
    leaves = [pages, *router.parameters()]
    assert torch.autograd.gradcheck(lambda *_: router(pages, edges), leaves)


def test_training_drops_weights_on_every_kind_of_edges_and_keeps_their_mean():
    torch.manual_seed(0)
    router, pages = DeltaRouter(4, 1, dropout=0.5), torch.randn(30, 4)
    relation = Relation.complete([0, 30], [0, 30])
    mean = torch.stack([router(pages, relation) for _ in range(2000)]).mean(0)
    _, (_, weights) = router(pages, relation, return_attention_weights=True)
    assert 0.4 < (weights == 0).float().mean() < 0.6
    calm = router.eval()(pages, relation)
    torch.testing.assert_close(mean, calm, rtol=0, atol=0.05)
    assert torch.equal(router(pages, relation), calm)


def test_an_explainer_sees_the_edges():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = DeltaRouter(6, 2)

        def forward(self, x, edge_index):
            return self.router(x, edge_index)

    explainer = Explainer(
        Classifier(), GNNExplainer(epochs=2), explanation_type="model", edge_mask_type="object",
        model_config={"mode": "regression", "task_level": "node", "return_type": "raw"},
    )  # fmt: skip
    edges = random_relation(5, 5, 9).edge_index
    explanation = explainer(torch.randn(5, 6), edges)
    assert explanation.edge_mask.shape == (9,)
    assert explanation.edge_mask.sum() > 0


def test_repr_and_bad_input():
    assert repr(DeltaRouter(8, 2)) == "DeltaRouter(8, heads=2)"
    relation = Relation.complete([0, 5], [0, 5])
    with pytest.raises(ValueError, match="heads must divide"):
        DeltaRouter(6, 4)
    with pytest.raises(ValueError, match=r"pages must have shape \(nodes, 6\)"):
        DeltaRouter(6, 2)(torch.randn(5, 3), relation)
    with pytest.raises(ValueError, match="relation goes from 5 nodes"):
        DeltaRouter(6, 2)(torch.randn(4, 6), relation)
