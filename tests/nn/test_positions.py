"""Positional encodings against their formulas, written with math.sin and math.cos."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_geometric.data import Data
from torch_geometric.transforms import AddLaplacianEigenvectorPE, AddRandomWalkPE

from nsm_graph.nn import (
    GraphPosition,
    LearnedPosition,
    RelativePosition,
    RotaryPosition,
    SinusoidalPosition,
)


@given(channels=st.integers(1, 7), index=st.integers(0, 5_000_000))
def test_sinusoidal_equals_sines_and_cosines_of_the_index(channels, index):
    x = torch.randn(1, channels, dtype=torch.double)
    out = SinusoidalPosition(channels)(x, torch.tensor([index]))
    for c in range(channels):
        angle = index * 10_000 ** (-2 * (c // 2) / channels)
        expected = math.cos(angle) if c % 2 else math.sin(angle)
        assert out[0, c] - x[0, c] == pytest.approx(expected, abs=1e-8)


def test_sinusoidal_is_exact_far_into_a_float32_stream():
    index = torch.tensor([10_000_001])
    out = SinusoidalPosition(6)(torch.zeros(1, 6), index)
    assert out.dtype == torch.float32
    exact = SinusoidalPosition(6)(torch.zeros(1, 6, dtype=torch.double), index)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-6)


@given(pairs=st.integers(1, 4), place=st.integers(0, 100), seed=st.integers(0, 9))
def test_rotary_turns_pairs_of_channels(pairs, place, seed):
    torch.manual_seed(seed)
    layer = RotaryPosition(2 * pairs).double()
    key = torch.randn(1, 2, 2 * pairs, dtype=torch.double)
    out = layer(key, torch.tensor([place]))
    for c in range(pairs):
        angle = place * 10_000 ** (-2 * c / (2 * pairs))
        for h in range(2):
            a, b = key[0, h, 2 * c].item(), key[0, h, 2 * c + 1].item()
            turned = a * math.cos(angle) - b * math.sin(angle)
            raised = a * math.sin(angle) + b * math.cos(angle)
            assert out[0, h, 2 * c].item() == pytest.approx(turned, abs=1e-10)
            assert out[0, h, 2 * c + 1].item() == pytest.approx(raised, abs=1e-10)


def test_learned_and_relative_look_up_the_place():
    torch.manual_seed(0)
    x, place = torch.randn(4, 3), torch.tensor([0, 2, 1, 2])
    learned, relative = LearnedPosition(3, 5), RelativePosition(2, 5)
    assert torch.equal(learned(x, place), x + learned.table[place])
    assert torch.equal(relative(place), relative.table[place])
    assert learned.table.std() > 0.1
    assert relative.table.std() > 0.1


@pytest.mark.parametrize("layer", [LearnedPosition(3, 5), RelativePosition(2, 5)])
def test_learned_tables_end(layer):
    x = [torch.zeros(1, 3)] if isinstance(layer, LearnedPosition) else []
    with pytest.raises(ValueError, match="place 5, but the table has 5 places"):
        layer(*x, torch.tensor([5]))


def test_graph_position_projects_pygs_own_encodings():
    edge_index = torch.tensor([[0, 1, 1, 2, 2, 3, 3, 0], [1, 0, 2, 1, 3, 2, 0, 3]])
    data = Data(x=torch.randn(4, 5), edge_index=edge_index)
    data = AddRandomWalkPE(walk_length=3, attr_name="pe")(data)
    torch.manual_seed(0)
    layer = GraphPosition(3, 5)
    expected = data.x + data.pe @ layer.lin.weight.T + layer.lin.bias
    torch.testing.assert_close(layer(data.x, data.pe), expected)


def test_laplacian_signs_flip_in_training_only():
    edge_index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    data = AddLaplacianEigenvectorPE(k=1, attr_name="pe", is_undirected=True)(
        Data(x=torch.zeros(3, 5), edge_index=edge_index)
    )
    torch.manual_seed(0)
    layer = GraphPosition(1, 5, kind="laplacian")
    torch.nn.init.zeros_(layer.lin.bias)
    layer.eval()
    assert torch.equal(layer(data.x, data.pe), layer(data.x, data.pe))
    layer.train()
    seen = {layer(data.x, data.pe)[0, 0].sign().item() for _ in range(20)}
    assert seen == {-1.0, 1.0}


def test_refuses_bad_input():
    layer, x = GraphPosition(3, 5), torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"pe must have shape \(4, 3\), but has \(4, 2\)"):
        layer(x, torch.zeros(4, 2))
    with pytest.raises(ValueError, match="kind must be one of 'random_walk', 'laplacian'"):
        GraphPosition(3, 5, kind="degree")
    with pytest.raises(ValueError, match="a head has 3; choose heads"):
        RotaryPosition(3)
