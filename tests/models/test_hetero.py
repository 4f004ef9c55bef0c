"""HeteroData goes in and comes out."""

import pytest
import torch
from small_machines import make_machine
from torch_geometric.data import Batch, HeteroData
from torch_geometric.nn import GINEConv, SAGEConv


def sequence(num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    data = HeteroData()
    data["token"].x = torch.randn(num_tokens, 3, generator=generator)
    data["token"].y = torch.arange(num_tokens)
    return data


def graph(num_tokens):
    data = sequence(num_tokens)
    edges = torch.arange(num_tokens).repeat(2)
    data["token", "bond", "token"].edge_index = torch.stack([edges, edges.roll(1)])
    return data


@pytest.mark.parametrize("head", ["example", "token"])
@pytest.mark.parametrize("top_k", [None, 2])
def test_sequences_in_a_batch(head, top_k):
    machine = make_machine(head=head, top_k=top_k)
    batch = Batch.from_data_list([sequence(4), sequence(7)])
    out = machine.from_hetero(batch)
    expected = machine.run(batch["token"].x, batch["token"].batch, record=True)
    assert torch.equal(out.out, expected.out)
    assert torch.equal(out["state"].x, expected.state.states)
    assert out["state"].batch.tolist() == [0, 0, 0, 1, 1, 1]
    assert out["state"].ptr.tolist() == [0, 3, 6]
    assert out["state"].slot.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(out["token"].y, batch["token"].y)
    assert ("read" in out["token"]) == (head == "token")
    # Every token's weights sum to 1, and no edge leaves its example.
    routes = out["token", "routes", "state"]
    total = torch.zeros(11).index_add(0, routes.edge_index[0], routes.weight)
    torch.testing.assert_close(total, torch.ones(11))
    src, dst = routes.edge_index
    assert torch.equal(batch["token"].batch[src], out["state"].batch[dst])
    assert src.numel() == 11 * (3 if top_k is None else top_k)
    assert out.validate()
    # The input stays as it was.
    assert "state" not in batch.node_types


def test_routes_are_in_the_numbering_of_the_input():
    machine = make_machine(position=None)
    batch = Batch.from_data_list([sequence(2), sequence(7)])
    routes = machine.from_hetero(batch)["token", "routes", "state"]
    dense = torch.zeros(9, 6)
    dense[routes.edge_index[0], routes.edge_index[1]] = routes.weight
    tokens = machine.embedding(batch["token"].x)
    logits = machine.cell.router.lin_logits(tokens).view(9, 3, 2)  # [tokens, slots, heads]
    logits = logits + torch.nn.functional.logsigmoid(machine.manager.importance)[:, None]
    expected = logits.softmax(1).mean(2)
    torch.testing.assert_close(dense[:2, :3], expected[:2])
    torch.testing.assert_close(dense[2:, 3:], expected[2:])


def test_graphs_with_a_conv_read_the_token_edges():
    machine = make_machine(segment_length=None, num_steps=2, conv=SAGEConv(4, 4))
    batch = Batch.from_data_list([graph(4), graph(6)])
    out = machine.from_hetero(batch)
    expected = machine(
        batch["token"].x,
        batch["token"].batch,
        edge_index=batch["token", "bond", "token"].edge_index,
    )
    assert torch.equal(out.out, expected)
    # The routing of the last pass, once for each token and state.
    assert out["token", "routes", "state"].edge_index.size(1) == 30


def test_edge_features_come_along():
    machine = make_machine(
        segment_length=None, conv=GINEConv(torch.nn.Linear(4, 4)), edge_embeddings=3
    )
    data = graph(5)
    data["token", "bond", "token"].edge_attr = torch.randint(3, (10,))
    before = machine.from_hetero(data).out
    data["token", "bond", "token"].edge_attr = (data["token", "bond", "token"].edge_attr + 1) % 3
    assert not torch.equal(machine.from_hetero(data).out, before)


def test_a_single_example_needs_no_batch():
    machine, data = make_machine(), sequence(5)
    out = machine.from_hetero(data)
    torch.testing.assert_close(out.out, machine(data["token"].x))
    assert out["state"].batch.tolist() == [0, 0, 0]


def test_attention_alone_routes_nothing():
    out = make_machine(mix="attention").from_hetero(sequence(5))
    assert ("token", "routes", "state") not in out.edge_types


def test_edges_that_no_conv_reads_are_left_alone():
    machine = make_machine()
    out = machine.from_hetero(graph(5))
    torch.testing.assert_close(out.out, machine(graph(5)["token"].x))
    assert out["token", "bond", "token"].edge_index.size(1) == 10


def test_refuses_data_without_tokens():
    data = HeteroData()
    data["atom"].x = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r'node type "token" with x, but data has .*atom'):
        make_machine().from_hetero(data)
    data["token"].num_nodes = 3
    with pytest.raises(ValueError, match='node type "token" with x'):
        make_machine().from_hetero(data)


def test_refuses_two_kinds_of_token_edges():
    data = graph(4)
    data["token", "near", "token"].edge_index = torch.zeros(2, 1, dtype=torch.long)
    machine = make_machine(segment_length=None, conv=SAGEConv(4, 4))
    with pytest.raises(ValueError, match="edge type"):
        machine.from_hetero(data)
