"""From a row of numbers for each token to its steps: the modules' own, by the order of a layout."""

import pytest
import torch

from nsm_graph.nn.scan_heads import MemoryHeads, TransitionHeads
from nsm_graph.ops.delta_scan.cpu.arrays import Layout, make_layout
from nsm_graph.ops.delta_scan.tokens import hard_gate, steps_of, unit

CHANNELS, WIDTH, STATES = 6, 3, 4


def linear_rows(x, parts):
    return torch.cat([part(x) for part in parts if part is not None], -1)


@pytest.mark.parametrize("stretch", [0.0, 0.5, 2.0])
@pytest.mark.parametrize(("decay", "write"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize(("transition", "memory"), [(2, 0), (0, 2), (2, 1)])
def test_steps_are_those_of_the_heads(transition, memory, decay, write, stretch):
    options = {"reflections": 2, "decay": decay, "write": write, "stretch": stretch}
    composing = TransitionHeads(CHANNELS, transition, WIDTH, **options) if transition else None
    recalling = MemoryHeads(CHANNELS, memory, WIDTH, STATES, stretch=stretch) if memory else None
    x, weights = 3 * torch.randn(2, 5, CHANNELS), torch.randn(2, 5, STATES).softmax(-1)
    layout = make_layout(transition, memory, 2, WIDTH, STATES, decay, write, 1)
    names = {} if composing is None else dict(composing.named_children())
    held = {} if recalling is None else dict(recalling.named_children())

    def by_head(part):
        """Modules have slots first, and heads within."""
        if part is None:
            return None
        return lambda x: part(x).unflatten(-1, (STATES, memory)).transpose(-1, -2).flatten(-2)

    rows = linear_rows(x, [
        names.get("lin_key"), by_head(held.get("lin_key")), by_head(held.get("lin_query")),
        names.get("lin_value"), held.get("lin_value"), names.get("lin_beta"),
        names.get("lin_decay"), names.get("lin_write"), held.get("lin_beta"),
    ])  # fmt: skip
    assert rows.size(-1) == layout.num_columns
    found = steps_of(rows, layout, stretch, weights)
    assert (found.transition is None) == (composing is None)
    assert (found.memory is None) == (recalling is None) == (found.query is None)
    pairs = []
    if composing is not None:
        pairs += zip(found.transition, composing.steps(x, weights, None), strict=True)
    if recalling is not None:
        steps, query = recalling.steps(x, None, None)
        pairs += [*zip(found.memory, steps, strict=True), (found.query, query)]
    for actual, expected in pairs:
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_places_of_a_layout():
    layout = make_layout(2, 1, 3, 5, 7, True, True, 2)
    keys, held, values = 2 * 3 * 5, 7, 2 * 5
    assert layout == Layout(
        2, 1, 3, 5, 7, True, True, 2, memory_key=keys, query=keys + held, value=keys + 2 * held,
        memory_value=44 + values, gates=54 + 5, decay=59 + 2 * 3, write=65 + 2, memory_beta=67 + 2,
        num_columns=69 + 1,
    )  # fmt: skip
    assert make_layout(0, 0, 0, 0, 0, False, False, 0).num_columns == 0


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e15, 1e25])
def test_a_unit_vector_and_its_slope_at_any_size(size):
    x = torch.randn(3, 4, dtype=torch.float64)
    short = (size * x).float().requires_grad_()
    exact = (size * x).requires_grad_()
    direction = torch.randn(3, 4, dtype=torch.float64)
    (slope,) = torch.autograd.grad((unit(short) * direction.float()).sum(), short)
    length = exact.square().sum(-1, keepdim=True).sqrt()
    (wanted,) = torch.autograd.grad((exact / length * direction).sum(), exact)
    torch.testing.assert_close(unit(short).double(), exact / length, rtol=0, atol=1e-6)
    torch.testing.assert_close(size * slope.double(), size * wanted, rtol=0, atol=3e-6)


def test_a_row_of_zeros_stays_one_and_has_no_slope():
    x = torch.zeros(2, 4, requires_grad=True)
    unit(x).sum().backward()
    assert not unit(x).any() and not x.grad.any()


def test_gates_close_and_open_exactly():
    z = torch.tensor([-1.2, -1.0, 0.0, 1.0, 1.2], requires_grad=True)
    gate = hard_gate(z)
    assert gate[0] == 0 and gate[2] == 0.5 and gate[4] == 1 and (gate[1] > 0) and (gate[3] < 1)
    (slope,) = torch.autograd.grad(gate.sum(), z)
    assert slope[0] == 0 and slope[4] == 0 and (slope[1:4] > 0).all()
    assert torch.equal(hard_gate(z, 0.0), z.sigmoid())
