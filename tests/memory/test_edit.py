"""Edits of the node set against plain loops, on tensors, modules and optimizers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nsm_graph.memory import NodeEdit, apply_edit

NUM_SLOTS = 6


def bits(tensor):
    """The bit patterns: -0.0 differs from 0.0 and NaN equals itself."""
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int64)


def make(new_to_old, before=None, after=None, weights=None):
    new_to_old = torch.tensor(new_to_old)
    before = range(4) if before is None else before
    after = range(len(new_to_old)) if after is None else after
    weights = None if weights is None else torch.tensor(weights)
    return NodeEdit(new_to_old, torch.tensor([*before]), torch.tensor([*after]), weights)


# Rows #############################################################################


@given(st.lists(st.integers(-1, 3), max_size=6), st.sampled_from([(), (2,), (2, 3)]))
def test_rows_follow_one_to_one(new_to_old, rest):
    rows = torch.randn(4, *rest)
    edit = NodeEdit(
        torch.tensor(new_to_old, dtype=torch.long), torch.arange(4), torch.arange(len(new_to_old))
    )
    out = edit.apply(rows, fresh=7.0)
    assert out.shape == (len(new_to_old), *rest)
    for new, old in enumerate(new_to_old):
        expected = torch.full(rest, 7.0) if old < 0 else rows[old]
        assert torch.equal(bits(out[new]), bits(expected))
    assert edit.is_fresh.tolist() == [old < 0 for old in new_to_old]


@given(st.data())
def test_merged_rows_are_weighted_means(data):
    num_new, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    size = num_new * width
    old = data.draw(st.lists(st.integers(-1, 3), min_size=size, max_size=size))
    shares = st.lists(st.integers(1, 5), min_size=size, max_size=size)
    weights = data.draw(st.one_of(st.none(), shares))
    rows = torch.randn(4, 2, dtype=torch.float64)
    edit = NodeEdit(
        torch.tensor(old).view(num_new, width),
        torch.arange(4),
        torch.arange(num_new),
        None if weights is None else torch.tensor(weights, dtype=torch.float64).view(num_new, -1),
    )
    out = edit.apply(rows, fresh=7.0)
    for new in range(num_new):
        parts = [
            (rows[old[i]], 1.0 if weights is None else float(weights[i]))
            for i in range(new * width, (new + 1) * width)
            if old[i] >= 0
        ]
        if not parts:
            expected = torch.full((2,), 7.0, dtype=torch.float64)
        else:
            expected = sum(row * w for row, w in parts) / sum(w for _, w in parts)
        torch.testing.assert_close(out[new], expected)


@pytest.mark.parametrize(
    ("new_to_old", "weights"),
    [
        ([2, 0, 1], None),
        ([2, 0, 1], [0.3, 5.0, 1e-9]),
        ([[2, -1], [-1, 0], [1, -1]], None),
        ([[2, 3], [3, 0], [1, -1]], [[0.7, 0.0], [0.0, 0.1], [3.0, 9.0]]),
    ],
)
def test_n7_survivors_keep_their_bits(new_to_old, weights):
    rows = torch.tensor([[0.1, -0.0], [math.nan, 1e-42], [math.inf, -3.3], [5.0, 5.0]])
    out = make(new_to_old, weights=weights).apply(rows)
    assert torch.equal(bits(out), bits(rows[[2, 0, 1]]))


def test_rows_that_do_not_take_part_spread_nothing():
    rows = torch.tensor([[math.nan], [1.0], [2.0], [4.0]])
    edit = make([[1, -1, -1], [2, 3, -1], [2, 3, 0]], weights=[[1.0] * 3, [1.0] * 3, [1.0, 1.0, 0]])
    assert edit.apply(rows).tolist() == [[1.0], [3.0], [3.0]]


def test_a_split_copies_a_row():
    assert make([1, 1, 3]).apply(torch.arange(4.0)).tolist() == [1, 1, 3]


@pytest.mark.parametrize("new_to_old", [[2, -1, 0], [[2, 2], [-1, -1], [0, -1]]])
def test_any_dimension_may_count_states(new_to_old):
    rows = torch.randn(5, 4, 2)
    fresh = torch.randn(1, 5, 2)
    out = make(new_to_old).apply(rows, fresh, dim=1)
    assert torch.equal(out, torch.stack([rows[:, 2], fresh[0], rows[:, 0]], dim=1))
    assert torch.equal(make(new_to_old).apply(rows.transpose(1, 2), fresh, dim=-1).mT, out)


def test_whole_numbers_and_masks_follow():
    edit = make([3, -1, 0])
    assert edit.apply(torch.tensor([5, 6, 7, 8]), fresh=-1).tolist() == [8, -1, 5]
    assert edit.apply(torch.tensor([True, False, False, True])).tolist() == [True, False, True]


@pytest.mark.parametrize("new_to_old", [[2, -1, 0, 2], [[2, 1], [-1, -1], [0, -1], [2, 3]]])
def test_gradients_reach_old_and_fresh_rows(new_to_old):
    rows = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    fresh = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(make(new_to_old).apply, [rows, fresh])


def test_fresh_slots():
    edit = make([[0, 1], [-1, -1], [-1, 2], [-1, -1]], after=[0, 2, 3, 5])
    assert edit.is_fresh.tolist() == [False, True, False, True]
    assert edit.fresh_slots.tolist() == [2, 5]


# Tensors indexed by slot ##########################################################


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("dim", [0, 1])
@given(order=st.permutations([0, 1, 2, 3]))
def test_slots_move_as_blocks_and_nothing_else_does(block, dim, order):
    shape = [2, 2]
    shape[dim] = NUM_SLOTS * block
    tensor = torch.randn(shape)
    before, after = [0, 1, 3, 5], [0, 2, 3, 4, 5]
    edit = make([*order[:3], -1, order[3]], before, after)
    old = tensor.unflatten(dim, (NUM_SLOTS, block)).movedim(dim, 0).clone()
    edit.apply_to_slots(tensor, NUM_SLOTS, dim)
    new = tensor.unflatten(dim, (NUM_SLOTS, block)).movedim(dim, 0)
    source = {0: before[order[0]], 2: before[order[1]], 3: before[order[2]], 5: before[order[3]]}
    for slot in range(NUM_SLOTS):
        assert torch.equal(new[slot], old[source.get(slot, slot)])


def test_a_merge_of_slots():
    tensor = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    edit = make([[0, 2], [1, -1]], [0, 1, 3], [0, 1], weights=[[1.0, 3.0], [1.0, 0.0]])
    edit.apply_to_slots(tensor, NUM_SLOTS)
    assert tensor.tolist() == [0.25 * 1 + 0.75 * 8, 2, 4, 8, 16, 32]


# Modules ##########################################################################


class Owner(nn.Module):
    """Two blocks a slot along the rows, three along the columns, and a buffer."""

    slot_dims = {"rows": 0, "columns": 1, "seen": 0, "lin.weight": 0, "missing": 0}

    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(NUM_SLOTS * 2, 3))
        self.columns = nn.Parameter(torch.randn(4, NUM_SLOTS * 3))
        self.other = nn.Parameter(torch.randn(NUM_SLOTS, 2))
        self.lin = nn.Linear(2, NUM_SLOTS, bias=False)
        self.register_buffer("seen", torch.randn(NUM_SLOTS))
        self.missing = None
        self.resets = []

    def reset_slots(self, slots):
        self.resets.append(slots.tolist())

    def by_slot(self):
        """Name -> tensor with slots first."""
        return {
            "rows": self.rows.unflatten(0, (NUM_SLOTS, 2)),
            "columns": self.columns.unflatten(1, (NUM_SLOTS, 3)).movedim(1, 0),
            "lin.weight": self.lin.weight.unflatten(0, (NUM_SLOTS, 1)),
            "seen": self.seen,
        }


def snapshot(owner):
    return {name: tensor.detach().clone() for name, tensor in owner.by_slot().items()}


REORDER = ([3, 0, 1], [0, 1, 2, 4], [0, 2, 4])  # old rows, slots before, slots after
REORDER_SOURCE = {0: 4, 2: 0, 4: 1}  # slot -> slot it came from


def test_an_edit_reaches_every_declared_tensor_of_nested_modules():
    owner = Owner()
    module = nn.Sequential(nn.ModuleList([owner]), nn.ReLU())
    old, other = snapshot(owner), owner.other.detach().clone()
    apply_edit(make(*REORDER), NUM_SLOTS, [module])
    for name, tensor in owner.by_slot().items():
        for slot in range(NUM_SLOTS):
            assert torch.equal(tensor[slot], old[name][REORDER_SOURCE.get(slot, slot)]), name
    assert torch.equal(owner.other, other)
    assert owner.resets == []


def test_a_module_reached_twice_and_a_shared_tensor_are_edited_once():
    owner, twin = Owner(), Owner()
    twin.rows = owner.rows
    old = snapshot(owner)
    apply_edit(make(*REORDER), NUM_SLOTS, [owner, nn.Sequential(owner), twin])
    for name, tensor in owner.by_slot().items():
        for slot in range(NUM_SLOTS):
            assert torch.equal(tensor[slot], old[name][REORDER_SOURCE.get(slot, slot)]), name


def test_fresh_slots_are_reset_once_for_each_owner():
    first, second = Owner(), Owner()
    edit = make([0, -1, 1, -1], [0, 2], [0, 1, 2, 5])
    apply_edit(edit, NUM_SLOTS, [first, nn.Sequential(first, second)])
    assert first.resets == [[1, 5]]
    assert second.resets == [[1, 5]]


def test_parameters_without_a_size_yet_are_left_alone():
    class Lazy(nn.Module):
        slot_dims = {"weight": 0}

        def __init__(self):
            super().__init__()
            self.weight = nn.parameter.UninitializedParameter()

    lazy = Lazy()
    apply_edit(make([0, -1], [0], [0, 1]), NUM_SLOTS, [lazy])
    assert nn.parameter.is_lazy(lazy.weight)


# Optimizers #######################################################################

OPTIMIZERS = {
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=0.1), {"exp_avg", "exp_avg_sq"}),
    "amsgrad": (
        lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
        {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    ),
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"momentum_buffer"}),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.1), {"sum"}),
    "RMSprop": (
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
        {"square_avg", "momentum_buffer", "grad_avg"},
    ),
    "Adadelta": (lambda p: torch.optim.Adadelta(p), {"square_avg", "acc_delta"}),
    "NAdam": (lambda p: torch.optim.NAdam(p, lr=0.1), {"exp_avg", "exp_avg_sq"}),
    "Adamax": (lambda p: torch.optim.Adamax(p, lr=0.1), {"exp_avg", "exp_inf"}),
    "Rprop": (lambda p: torch.optim.Rprop(p, lr=0.1), {"prev", "step_size"}),
}
MEAN_OF_SURVIVORS = {
    "exp_avg_sq",
    "max_exp_avg_sq",
    "sum",
    "square_avg",
    "acc_delta",
    "step_size",
}


def train(owner, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sum((p * torch.randn_like(p)).sum() for p in owner.parameters())
        loss.backward()
        optimizer.step()


def state_by_slot(owner, optimizer):
    """(parameter, state name) -> tensor with slots first."""
    shapes = {"rows": (0, 2), "columns": (1, 3), "lin.weight": (0, 1)}
    found = {}
    for parameter, (dim, block) in shapes.items():
        for name, value in optimizer.state[owner.get_parameter(parameter)].items():
            if torch.is_tensor(value) and value.dim() > 0:
                rows = value.unflatten(dim, (NUM_SLOTS, block)).movedim(dim, 0)
                found[parameter, name] = rows.clone()
    return found


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_n7_moments_follow_their_rows(kind):
    build, names = OPTIMIZERS[kind]
    owner = Owner()
    optimizer = build(owner.parameters())
    train(owner, optimizer)
    old = state_by_slot(owner, optimizer)
    assert {name for _, name in old} == names
    untouched = {k: v for k, v in optimizer.state[owner.other].items() if torch.is_tensor(v)}
    untouched = {k: v.clone() for k, v in untouched.items()}
    # Slots 4, 0 move to 0, 3; slots 2 and 5 are fresh; slots 1 and 2 go.
    edit = make([3, -1, 0, -1], [0, 1, 2, 4], [0, 2, 3, 5])
    apply_edit(edit, NUM_SLOTS, [owner], [optimizer])
    new = state_by_slot(owner, optimizer)
    for key, rows in new.items():
        assert torch.equal(bits(rows[0]), bits(old[key][4])), key
        assert torch.equal(bits(rows[3]), bits(old[key][0])), key
        for slot in (1, 4):
            assert torch.equal(rows[slot], old[key][slot]), key
        for slot in (2, 5):
            if key[1] in MEAN_OF_SURVIVORS:
                torch.testing.assert_close(rows[slot], (old[key][4] + old[key][0]) / 2)
            else:
                assert (rows[slot] == 0).all(), key
    for name, value in untouched.items():
        assert torch.equal(optimizer.state[owner.other][name], value)
    train(owner, optimizer, steps=1)
    assert all(p.isfinite().all() for p in owner.parameters())


def test_moments_of_a_merge_are_means():
    owner = Owner()
    optimizer = torch.optim.AdamW(owner.parameters())
    train(owner, optimizer)
    old = state_by_slot(owner, optimizer)
    apply_edit(make([[0, 1]], [0, 3], [0]), NUM_SLOTS, [owner], [optimizer])
    for key, rows in state_by_slot(owner, optimizer).items():
        torch.testing.assert_close(rows[0], (old[key][0] + old[key][3]) / 2)


@pytest.mark.parametrize("kind", ["AdamW", "RMSprop", "Adagrad", "Rprop"])
def test_a_fresh_row_neither_jumps_nor_freezes(kind):
    build, _ = OPTIMIZERS[kind]
    parameter = Owner()
    optimizer = build(parameter.parameters())
    train(parameter, optimizer, steps=50)
    edit = make([0, 1, 2, -1], [0, 1, 2], [0, 1, 2, 3])
    apply_edit(edit, NUM_SLOTS, [parameter], [optimizer])
    old = parameter.rows.detach().clone()
    train(parameter, optimizer, steps=1)
    moved = (parameter.rows.detach() - old).unflatten(0, (NUM_SLOTS, 2)).abs().mean((1, 2))
    assert 0.02 * moved[:3].mean() < moved[3] < 5 * moved[:3].mean()


def test_an_optimizer_that_has_not_stepped_yet():
    owner = Owner()
    optimizer = torch.optim.AdamW(owner.parameters())
    apply_edit(make(*REORDER), NUM_SLOTS, [owner], [optimizer])
    assert len(optimizer.state) == 0


def test_step_counters_stay():
    owner = Owner()
    optimizer = torch.optim.AdamW(owner.parameters())
    train(owner, optimizer)
    apply_edit(make([0, -1], [0], [0, 1]), NUM_SLOTS, [owner], [optimizer])
    assert float(optimizer.state[owner.rows]["step"]) == 3


# Errors ###########################################################################


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"after": [0, 1, 2]}, "new_to_old has 2 rows, but there are 3 new slots"),
        ({"new_to_old": [0, 4]}, r"names row 4, but there are 4 old rows; use 0\.\.3, or -1"),
        ({"new_to_old": [-2, 1]}, "names row -2, but there are 4 old rows"),
        ({"weights": [1.0]}, r"shape of new_to_old, \(2,\), but has \(1,\)"),
        ({"weights": [1.0, -0.5]}, "weights must not be negative"),
        ({"weights": [1.0, 0.0]}, "every row that is not fresh needs a positive one"),
        ({"weights": [1.0, math.nan]}, "weights must not be negative"),
    ],
)
def test_wrong_edits(changes, message):
    given_arguments = {"new_to_old": [0, 1], "before": range(4), "after": [0, 1], "weights": None}
    with pytest.raises(ValueError, match=message):
        make(**{**given_arguments, **changes})


def test_weights_of_fresh_rows_do_not_matter():
    edit = make([0, -1], weights=[1.0, 0.0])
    assert edit.apply(torch.arange(1.0, 5), fresh=9.0).tolist() == [1, 9]


def test_rows_must_be_those_of_the_edit():
    with pytest.raises(ValueError, match="starts from 4 states, but rows has 3 along dim 1"):
        make([0, 1]).apply(torch.zeros(4, 3), dim=1)
