"""PyG's explainers see the user's graph, and none of the edges that a memory has of its own."""

import pytest
import torch
from torch_geometric.explain import AttentionExplainer, Explainer, GNNExplainer
from torch_geometric.nn import GATConv

import nsm_graph as nsm
from nsm_graph.nn import MemoryConv, TokenToStateRouter

MODES = {"mode": "multiclass_classification", "task_level": "node", "return_type": "raw"}


class Net(torch.nn.Module):
    def __init__(self, uses_edges: bool) -> None:
        super().__init__()
        self.first = GATConv(8, 16) if uses_edges else torch.nn.Linear(8, 16)
        self.uses_edges = uses_edges
        self.memory = MemoryConv(16, num_states=6)
        self.last = torch.nn.Linear(16, 3)

    def forward(self, x, edge_index):
        x = self.first(x, edge_index) if self.uses_edges else self.first(x)
        return self.last(self.memory(x)[0])


class Machine(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.machine = nsm.NeuralStateMachine(
            8, 16, 6, 3, segment_length=None, num_steps=2, conv=GATConv(16, 16), head="token"
        )

    def forward(self, x, edge_index):
        return self.machine(x, edge_index=edge_index)


def explain(model, algorithm):
    explainer = Explainer(
        model.eval(),
        algorithm,
        explanation_type="model",
        edge_mask_type="object",
        model_config=MODES,
    )
    # As many edges as the memory has between 6 nodes and 6 states: only names tell them apart.
    edge_index = torch.cartesian_prod(torch.arange(6), torch.arange(6)).T.contiguous()
    return explainer(torch.randn(6, 8), edge_index, index=3).edge_mask


@pytest.mark.parametrize("make", [lambda: Net(uses_edges=True), Machine], ids=["net", "machine"])
@pytest.mark.parametrize("algorithm", [GNNExplainer(epochs=3), AttentionExplainer()])
def test_the_edges_of_the_graph_are_explained(make, algorithm):
    mask = explain(make(), algorithm)
    assert mask.shape == (36,)
    assert bool((mask > 0).any())


def test_a_model_that_reads_no_edge_has_nothing_to_explain():
    # PyG says that the mask got no gradient: no message passed over the graph's edges.
    with pytest.raises(ValueError, match="gradients"):
        explain(Net(uses_edges=False), GNNExplainer(epochs=3))
    with pytest.raises(ValueError, match="attention"):
        explain(Net(uses_edges=False), AttentionExplainer())


class Routed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = TokenToStateRouter(8, 3, num_states=6, top_k=1)

    def forward(self, x, edge_index):
        return self.router((x, x), edge_index)


def test_a_router_that_drops_edges_is_explained_over_all_of_them():
    assert explain(Routed(), GNNExplainer(epochs=3)).shape == (36,)
