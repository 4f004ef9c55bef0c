"""The gates: against the documented equations and torch's own LSTM."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nsm_graph.nn import StatePropagator


def make(cell="gru", *, seed=0, **options):
    torch.manual_seed(seed)
    return StatePropagator(4, cell=cell, **options).double()


@given(num_states=st.integers(0, 5), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_gru_equals_the_documented_gates(num_states, width, seed):
    layer = make(input_channels=width, seed=seed)
    s = torch.randn(num_states, 4, dtype=torch.double, requires_grad=True)
    u = torch.randn(num_states, width, dtype=torch.double, requires_grad=True)
    step = layer(s, u)
    w_r, w_z = layer.lin_gates.weight.split(4)
    b_r, b_z = layer.lin_gates.bias.split(4)
    r = (torch.cat([s, u], 1) @ w_r.T + b_r).sigmoid()
    z = (torch.cat([s, u], 1) @ w_z.T + b_z).sigmoid()
    w_c, b_c = layer.lin_candidate.weight, layer.lin_candidate.bias
    c = (torch.cat([r * s, u], 1) @ w_c.T + b_c).tanh()
    expected = (1 - z) * s + z * c
    torch.testing.assert_close(step.state, expected, rtol=0, atol=1e-10)
    assert step.cell is None
    for name, gate in (("reset", r), ("update", z), ("candidate", c)):
        torch.testing.assert_close(step.gates[name], gate, rtol=0, atol=1e-10)
    leaves = [s, u, *layer.parameters()]
    probe = torch.randn_like(expected)
    ours = torch.autograd.grad((step.state * probe).sum(), leaves)
    theirs = torch.autograd.grad((expected * probe).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@given(num_states=st.integers(1, 5), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_lstm_equals_torch_with_copied_weights(num_states, width, seed):
    layer = make("lstm", input_channels=width, seed=seed)
    torch_cell = nn.LSTMCell(width, 4).double()
    # torch's order of gates is input, forget, candidate, output.
    order = torch.cat([torch.arange(4) + 4 * g for g in (0, 1, 3, 2)])
    with torch.no_grad():
        torch_cell.weight_hh.copy_(layer.lin_gates.weight[order, :4])
        torch_cell.weight_ih.copy_(layer.lin_gates.weight[order, 4:])
        torch_cell.bias_ih.copy_(layer.lin_gates.bias[order])
        torch_cell.bias_hh.zero_()
    s, c = torch.randn(2, num_states, 4, dtype=torch.double, requires_grad=True)
    u = torch.randn(num_states, width, dtype=torch.double, requires_grad=True)
    step = layer(s, u, c)
    state, cell = torch_cell(u, (s, c))
    torch.testing.assert_close(step.state, state, rtol=0, atol=1e-10)
    torch.testing.assert_close(step.cell, cell, rtol=0, atol=1e-10)
    assert sorted(step.gates) == ["candidate", "forget", "input", "output"]
    probe = torch.randn_like(state)
    ours = torch.autograd.grad(((step.state + step.cell) * probe).sum(), [s, c, u])
    theirs = torch.autograd.grad(((state + cell) * probe).sum(), [s, c, u])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_an_open_update_gate_lets_the_candidate_in():
    layer = make()
    nn.init.zeros_(layer.lin_gates.weight)
    layer.lin_gates.bias.data = torch.tensor([0.0] * 4 + [50.0] * 4).double()
    step = layer(torch.randn(3, 4).double(), torch.randn(3, 4).double())
    torch.testing.assert_close(step.state, step.gates["candidate"])


def test_the_forget_gate_starts_open():
    layer = StatePropagator(4, cell="lstm")
    assert layer.lin_gates.bias[4:8].tolist() == [1.0] * 4
    assert layer.lin_gates.bias[:4].abs().max() < 1.0


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_masked_states_stay_bit_for_bit(cell):
    layer = make(cell).float()
    s, u, c = torch.randn(3, 5, 4)
    mask = torch.tensor([True, False, True, False, False])
    carried = c if cell == "lstm" else None
    step, free = layer(s, u, carried, mask=mask), layer(s, u, carried)
    assert torch.equal(step.state[~mask], s[~mask])
    assert torch.equal(step.state[mask], free.state[mask])
    assert not torch.equal(free.state[~mask], s[~mask])
    if cell == "lstm":
        assert torch.equal(step.cell[~mask], c[~mask])
        assert torch.equal(step.cell[mask], free.cell[mask])


BAD = [
    (lambda p, s: p(s[:, :3], s), r"state must have shape \(nodes, 4\)"),
    (lambda p, s: p(s, s[:, :3]), r"update must have shape \(nodes, 4\)"),
    (lambda p, s: p(s.int(), s), "state must be floating point"),
    (lambda p, s: p(s, s[:2]), "update has 2 rows, but state has 5"),
    (lambda p, s: p(s, s, mask=torch.ones(4, dtype=torch.bool)), "mask must"),
    (lambda p, s: p(s, s, mask=torch.ones(5)), "mask must"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_refuses_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(StatePropagator(4), torch.randn(5, 4))


def test_an_lstm_needs_its_cell():
    layer, s = StatePropagator(4, cell="lstm"), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"carries a cell of shape \(2, 4\), but cell is None"):
        layer(s, s)
    with pytest.raises(ValueError, match=r"but cell is \(1, 4\); start with zeros"):
        layer(s, s, s[:1])


def test_refuses_bad_options():
    with pytest.raises(ValueError, match="cell must be one of 'gru', 'lstm', but is 'rnn'"):
        StatePropagator(4, cell="rnn")
    with pytest.raises(ValueError, match="state_channels must be positive, but is 0"):
        StatePropagator(0)
    with pytest.raises(ValueError, match="input_channels must be positive"):
        StatePropagator(4, input_channels=0)
