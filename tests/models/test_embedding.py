"""Features and symbols to tokens."""

import pytest
import torch
from machine_oracle import Options, read_example, weights_of
from small_machines import make_machine

from nsm_graph.models.embedding import TokenEmbedding


def test_features_go_through_a_linear_map():
    layer, x = TokenEmbedding(3, 4), torch.randn(5, 3)
    torch.testing.assert_close(layer(x), x @ layer.lin.weight.T + layer.lin.bias)


def test_columns_of_symbols_add_up():
    layer = TokenEmbedding(2, 4, [5, 3])
    x = torch.tensor([[4, 0], [1, 2]])
    expected = layer.tables[0].weight[x[:, 0]] + layer.tables[1].weight[x[:, 1]]
    torch.testing.assert_close(layer(x), expected)
    assert len(TokenEmbedding(3, 4, 7).tables) == 3


def test_a_machine_reads_symbols_as_its_equations_say():
    machine = make_machine(dtype=torch.double, in_channels=2, num_embeddings=[5, 3], position=None)
    x = torch.stack([torch.randint(5, (7,)), torch.randint(3, (7,))], 1)
    expected, _, _ = read_example(weights_of(machine), Options(3), x)
    torch.testing.assert_close(machine(x), expected, rtol=0, atol=1e-10)
    flat = make_machine(in_channels=1, num_embeddings=5)
    x = torch.randint(5, (7,))
    assert torch.equal(flat(x), flat(x.unsqueeze(1)))


def test_every_symbol_that_occurs_gets_a_gradient_and_no_other():
    machine = make_machine(in_channels=1, num_embeddings=5)
    machine(torch.tensor([0, 3, 3])).sum().backward()
    grad = machine.embedding.tables[0].weight.grad.abs().sum(1)
    assert (grad > 0).tolist() == [True, False, False, True, False]


S = torch.tensor([0, 1, 4])
BAD = [
    (1, 5, S + 1, "x holds the symbol 5, but num_embeddings is 5; symbols go from 0 to 4"),
    (1, 5, S - 1, "x holds the symbol -1"),
    (1, 5, S.float(), r"x must hold symbols \(integers\), but has dtype torch.float32"),
    (1, 5, S.bool(), r"x must hold symbols \(integers\), but has dtype torch.bool"),
    (1, 5, S.view(1, 3), r"x must have shape \(tokens, 1\) or \(tokens,\), but has \(1, 3\)"),
    (1, 5, S.view(3, 1, 1), r"x must have shape"),
    (2, [5, 3], S, r"x must have shape \(tokens, 2\), but has \(3,\)"),
    (2, [5, 3], torch.tensor([[0, 3]]), "x holds the symbol 3, but num_embeddings is 3"),
]


@pytest.mark.parametrize(("columns", "sizes", "x", "message"), BAD, ids=[m for *_, m in BAD])
def test_refuses_bad_symbols(columns, sizes, x, message):
    with pytest.raises(ValueError, match=message):
        make_machine(in_channels=columns, num_embeddings=sizes)(x)


def test_refuses_bad_features():
    layer = TokenEmbedding(3, 4, name="edge_attr")
    with pytest.raises(ValueError, match="edge_attr holds NaN or infinity, first in row 1"):
        layer.check(torch.tensor([[0.0, 0, 0], [0, torch.inf, 0]]))
    with pytest.raises(ValueError, match=r"edge_attr must be floating point.*num_embeddings="):
        layer.check(torch.zeros(2, 3).int())
    # Large is not infinite, even where the sum overflows.
    layer.check(torch.full((2, 3), 3e38))


def test_refuses_bad_tables():
    for columns, sizes in ((2, [5, 0]), (3, [5, 5]), (1, -1), (-1, 5)):
        with pytest.raises(ValueError, match="num_embeddings must give one positive size"):
            TokenEmbedding(columns, 4, sizes)
