"""The bank, its importance and its edits, against a plain Python model."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nsm_graph as nsm
from nsm_graph.memory import NodeEdit, StateManager
from nsm_graph.nn import TokenToStateRouter

SLOTS = 6


def filled(initial_states=4, min_states=1, max_states=SLOTS):
    """A manager in which every number differs."""
    manager = StateManager(
        3, max_states, initial_states=initial_states, min_states=min_states, decay=0.9
    )
    with torch.no_grad():
        manager.importance.normal_()
        manager.importance_ema.copy_(torch.rand(max_states))
    return manager


def small_machine(**options):
    machine = nsm.NeuralStateMachine(
        2, 8, 3, 4, segment_length=2, heads=2, pool="flatten", max_states=5, **options
    )
    machine(torch.randn(4, 2))
    return machine


def train(machine, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        machine(torch.randn(6, 2), torch.tensor([0, 0, 0, 0, 1, 1])).square().sum().backward()
        optimizer.step()


# Construction #####################################################################


def test_at_first_the_lowest_slots_are_active_and_importance_is_neutral():
    manager = StateManager(16, 8, initial_states=3)
    assert manager.slots.tolist() == [0, 1, 2]
    assert manager.num_active == 3
    assert manager.bank.shape == (8, 16)
    assert (manager.importance == 0).all()
    assert manager.importance_ema.tolist() == [0.125] * 8
    assert manager.bank.std() > 0.1
    assert StateManager(16, 8).num_active == 8


def test_reset_parameters_goes_back_to_the_start():
    manager = filled()
    old = manager.bank.detach().clone()
    manager.prune(lowest=2)
    manager.reset_parameters()
    assert manager.slots.tolist() == [0, 1, 2, 3]
    assert not torch.equal(manager.bank, old)
    assert (manager.importance == 0).all()
    assert manager.importance_ema.tolist() == pytest.approx([1 / SLOTS] * SLOTS)


@pytest.mark.parametrize("batch_size", [0, 1, 3])
def test_n2_initial_states_are_the_active_rows_of_each_example(batch_size):
    manager = filled()
    manager.edit(NodeEdit(torch.tensor([0, 2]), manager.slots, torch.tensor([1, 4])))
    states = manager.initial(batch_size)
    assert states.shape == (2 * batch_size, 3)
    for b in range(batch_size):
        assert torch.equal(states[2 * b], manager.bank[1])
        assert torch.equal(states[2 * b + 1], manager.bank[4])


@pytest.mark.parametrize("initial_states", [2, SLOTS])
def test_gradients_reach_the_active_rows(initial_states):
    manager = filled(initial_states)
    manager.initial(3).sum().backward()
    active = [3.0] * initial_states + [0.0] * (SLOTS - initial_states)
    assert manager.bank.grad[:, 0].tolist() == active


# Moving average ###################################################################


def test_the_moving_average_in_closed_form():
    manager = filled()
    start = manager.importance_ema.double()
    observations = [torch.rand(8) for _ in range(5)]
    for signal in observations:
        manager.update_importance(signal)
    for slot in range(4):
        expected = 0.9**5 * start[slot]
        for age, signal in enumerate(reversed(observations)):
            expected += 0.1 * 0.9**age * (signal[slot] + signal[slot + 4]).double() / 2
        assert float(manager.importance_ema[slot]) == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(manager.importance_ema[4:].double(), start[4:])


def test_rows_may_name_their_slots():
    manager = filled()
    start = manager.importance_ema.clone()
    manager.update_importance(torch.tensor([1.0, 3.0, 5.0]), slots=torch.tensor([2, 2, 0]))
    assert float(manager.importance_ema[2]) == pytest.approx(0.9 * float(start[2]) + 0.1 * 2)
    assert float(manager.importance_ema[0]) == pytest.approx(0.9 * float(start[0]) + 0.1 * 5)
    for slot in (1, 3, 4, 5):
        assert manager.importance_ema[slot] == start[slot]


def test_the_active_slots_are_the_default():
    manager = filled()
    manager.edit(NodeEdit(torch.tensor([1, 3]), manager.slots, torch.tensor([1, 5])))
    start = manager.importance_ema.clone()
    manager.update_importance(torch.tensor([1.0, 2.0]))
    changed = (manager.importance_ema != start).nonzero().flatten()
    assert changed.tolist() == [1, 5]
    assert float(manager.importance_ema[5]) == pytest.approx(0.9 * float(start[5]) + 0.2)


def test_no_observation_changes_nothing():
    manager = filled()
    start = manager.importance_ema.clone()
    manager.update_importance(torch.zeros(0))
    assert torch.equal(manager.importance_ema, start)


# Allocation and pruning ###########################################################


def test_n7_allocation_takes_the_lowest_free_slots_with_fresh_values():
    manager = filled()
    manager.edit(NodeEdit(torch.tensor([0, 3]), manager.slots, torch.tensor([0, 3])))
    old = {name: value.clone() for name, value in manager.state_dict().items()}
    edit = manager.allocate(2)
    assert edit.new_to_old.tolist() == [0, -1, -1, 1]
    assert edit.slots_before.tolist() == [0, 3]
    assert edit.slots_after.tolist() == manager.slots.tolist() == [0, 1, 2, 3]
    for name in ("bank", "importance", "importance_ema"):
        new = manager.state_dict()[name]
        for slot in (0, 3, 4, 5):
            assert torch.equal(new[slot], old[name][slot])
    assert not torch.equal(manager.bank[1], old["bank"][1])
    assert not torch.equal(manager.bank[1], manager.bank[2])
    assert manager.importance[1:3].tolist() == [0, 0]
    mean = float((old["importance_ema"][0] + old["importance_ema"][3]) / 2)
    assert manager.importance_ema[1:3].tolist() == pytest.approx([mean, mean])


def test_n7_pruning_removes_the_least_important_and_keeps_the_rest_bit_for_bit():
    manager = filled()
    manager.importance_ema.copy_(torch.tensor([0.4, 0.1, 0.3, 0.2, 0.0, 0.0]))
    old = {name: value.clone() for name, value in manager.state_dict().items()}
    edit = manager.prune(lowest=2)
    assert edit.slots_after.tolist() == manager.slots.tolist() == [0, 2]
    assert edit.new_to_old.tolist() == [0, 2]
    for name in ("bank", "importance", "importance_ema"):
        assert torch.equal(manager.state_dict()[name], old[name])


def test_ties_go_to_the_lowest_slot():
    manager = filled()
    manager.importance_ema.fill_(0.5)
    assert manager.prune(lowest=1).slots_after.tolist() == [1, 2, 3]
    assert manager.prune(below=0.6).slots_after.tolist() == [3]


@pytest.mark.parametrize(
    ("below", "left"), [(0.25, [0, 2]), (0.1, [0, 1, 2, 3]), (0.2, [0, 2, 3]), (9.0, [0, 2])]
)
def test_pruning_below_a_threshold(below, left):
    manager = filled(min_states=2)
    manager.importance_ema.copy_(torch.tensor([0.4, 0.1, 0.3, 0.2, 0.0, 0.0]))
    assert manager.prune(below=below).slots_after.tolist() == left


def test_pruning_nothing_is_an_edit_that_changes_nothing():
    manager = filled()
    old = copy.deepcopy(manager.state_dict())
    edit = manager.prune(lowest=0)
    assert edit.new_to_old.tolist() == [0, 1, 2, 3]
    assert all(torch.equal(value, old[name]) for name, value in manager.state_dict().items())


def test_an_edit_may_move_split_and_merge():
    manager = filled()
    old = manager.bank.detach().clone()
    manager.edit(
        NodeEdit(
            torch.tensor([[3, -1], [0, 1], [3, -1]]),
            manager.slots,
            torch.tensor([0, 2, 5]),
            torch.tensor([[1.0, 0.0], [1.0, 3.0], [1.0, 0.0]]),
        )
    )
    assert manager.slots.tolist() == [0, 2, 5]
    assert torch.equal(manager.bank[0], old[3])
    torch.testing.assert_close(manager.bank[2], 0.25 * old[0] + 0.75 * old[1])
    assert torch.equal(manager.bank[5], old[3])


class Plain:
    """What the manager promises, in plain Python: slot -> the values that follow it."""

    def __init__(self, manager, min_states, max_states):
        self.manager, self.low, self.high = manager, min_states, max_states
        self.active = set(range(manager.num_active))

    def run(self, operation, argument):
        """The active set afterwards, or None where the operation must be refused."""
        ema = self.manager.importance_ema.tolist()
        order = sorted(self.active, key=lambda slot: (ema[slot], slot))
        spare = len(self.active) - self.low
        free = [slot for slot in range(self.high) if slot not in self.active]
        if operation == "allocate":
            if not 1 <= argument <= len(free):
                return None
            return self.active | set(free[:argument])
        if operation == "lowest":
            return None if not 0 <= argument <= spare else self.active - set(order[:argument])
        threshold = ema[order[len(order) // 2]]
        gone = [slot for slot in order if ema[slot] < threshold][:spare]
        return self.active - set(gone)


operations = st.lists(
    st.tuples(st.sampled_from(["allocate", "lowest", "below", "train"]), st.integers(-1, 4)),
    max_size=12,
)


@settings(max_examples=60)
@given(operations, st.integers(1, 3), st.integers(0, 99))
def test_any_sequence_of_edits_equals_the_plain_model(sequence, min_states, seed):
    torch.manual_seed(seed)
    manager = filled(initial_states=3, min_states=min_states)
    router = TokenToStateRouter(2, 3, num_states=SLOTS, heads=2)
    manager.register_dependent(router)
    parameters = [*manager.parameters(), *router.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    manager.register_optimizer(optimizer)
    plain = Plain(manager, min_states, SLOTS)

    def everything():
        """Every tensor with a row per slot: values and moments."""
        tensors = [manager.bank, manager.importance, manager.importance_ema]
        tensors += [router.lin_logits.weight, router.lin_logits.bias]
        for parameter in tensors.copy():
            state = optimizer.state.get(parameter, {})
            tensors += [state[name] for name in ("exp_avg", "exp_avg_sq") if name in state]
        return [t.detach().clone().unflatten(0, (SLOTS, -1)) for t in tensors]

    for operation, argument in sequence:
        if operation == "train":
            optimizer.zero_grad()
            sum((p * torch.randn_like(p)).sum() for p in parameters).backward()
            optimizer.step()
            manager.update_importance(torch.rand(manager.num_active))
            continue
        old, expected = everything(), plain.run(operation, argument)
        limit = sorted(manager.importance_ema[manager.slots].tolist())[manager.num_active // 2]
        calls = {
            "allocate": lambda n=argument: manager.allocate(n),
            "lowest": lambda n=argument: manager.prune(lowest=n),
            "below": lambda limit=limit: manager.prune(below=limit),
        }
        if expected is None:
            with pytest.raises(ValueError, match="cannot"):
                calls[operation]()
            expected = plain.active
        else:
            before = plain.active
            edit = calls[operation]()
            assert edit.slots_before.tolist() == sorted(before)
            assert edit.slots_after.tolist() == sorted(expected)
            assert edit.fresh_slots.tolist() == sorted(expected - before)
        assert manager.slots.tolist() == sorted(expected)
        assert manager.active.nonzero().flatten().tolist() == sorted(expected)
        assert min_states <= manager.num_active <= SLOTS
        fresh = expected - plain.active
        for was, now in zip(old, everything(), strict=True):
            for slot in set(range(SLOTS)) - fresh:
                assert torch.equal(was[slot], now[slot])
        plain.active = expected


# What else an edit reaches ########################################################


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_n7_an_edit_reaches_router_head_and_optimizer_of_a_machine(kind):
    machine = small_machine()
    optimizer = {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
        "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    }[kind](machine.parameters())
    machine.manager.register_optimizer(optimizer)
    train(machine, optimizer)
    router, head = machine.cell.router.lin_logits, machine.head.lin_out
    by_slot = {
        "rows": lambda t: t.unflatten(0, (5, 2)),
        "columns": lambda t: t.unflatten(1, (5, 8)).movedim(1, 0),
    }
    tensors = [(router.weight, "rows"), (router.bias, "rows"), (head.weight, "columns")]
    old = [by_slot[kind](p.detach().clone()) for p, kind in tensors]
    moments = [
        {n: by_slot[kind](v.clone()) for n, v in optimizer.state[p].items() if v.dim() > 0}
        for p, kind in tensors
    ]
    assert all(len(m) > 0 for m in moments)
    machine.manager.allocate(1)
    for (p, kind), was, moment in zip(tensors, old, moments, strict=True):
        now = by_slot[kind](p.detach())
        for slot in (0, 1, 2, 4):
            assert torch.equal(now[slot], was[slot])
        assert not torch.equal(now[3], was[3])
        for name, value in moment.items():
            new = by_slot[kind](optimizer.state[p][name])
            for slot in (0, 1, 2, 4):
                assert torch.equal(new[slot], value[slot])
            if name == "exp_avg_sq":
                torch.testing.assert_close(new[3], value[:3].mean(0))
            else:
                assert (new[3] == 0).all()
    train(machine, optimizer)


def test_a_pruned_machine_ignores_the_slots_that_went():
    machine = small_machine().eval()
    x = torch.randn(4, 2)
    machine.manager.edit(
        NodeEdit(torch.tensor([0, 2]), machine.manager.slots, torch.tensor([0, 2]))
    )
    out = machine(x)
    with torch.no_grad():
        machine.manager.bank[[1, 3, 4]] = math.nan
        machine.cell.router.lin_logits.weight.unflatten(0, (5, 2))[[1, 3, 4]] = 1e9
    assert torch.equal(machine(x), out)


def test_registering_twice_edits_once():
    manager = filled()
    optimizer = torch.optim.SGD(manager.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        manager.register_optimizer(optimizer)
        manager.register_dependent(manager)
    manager.bank.square().sum().backward()
    optimizer.step()
    old = optimizer.state[manager.bank]["momentum_buffer"].clone()
    manager.edit(NodeEdit(torch.tensor([1, 2, 3, 0]), manager.slots, manager.slots))
    new = optimizer.state[manager.bank]["momentum_buffer"]
    assert torch.equal(new[:4], old[[1, 2, 3, 0]])


# N10: lifetimes ###################################################################


def test_n10_a_state_dict_restores_the_active_set():
    manager = filled()
    manager.edit(NodeEdit(torch.tensor([0, 3]), manager.slots, torch.tensor([1, 4])))
    other = filled(initial_states=SLOTS)
    assert other.slots.tolist() == [*range(SLOTS)]  # cached, and must not survive the loading
    other.load_state_dict(manager.state_dict())
    assert other.slots.tolist() == [1, 4]
    assert torch.equal(other.initial(2), manager.initial(2))
    assert torch.equal(other.importance_ema, manager.importance_ema)
    assert other.allocate(1).slots_after.tolist() == [0, 1, 4]


@pytest.mark.parametrize("assign", [False, True])
def test_n10_a_machine_restores_the_active_set(assign):
    machine, other = small_machine().eval(), small_machine().eval()
    machine.manager.allocate(2)
    machine.manager.edit(
        NodeEdit(torch.tensor([0, 2, 4]), machine.manager.slots, torch.tensor([0, 2, 4]))
    )
    assert other.manager.slots.tolist() == [0, 1, 2]
    other.load_state_dict(machine.state_dict(), assign=assign)
    assert other.manager.slots.tolist() == [0, 2, 4]
    x = torch.randn(5, 2)
    assert torch.equal(other(x), machine(x))


DUPLICATES = [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_a_copied_manager_is_independent(duplicate):
    manager = filled()
    manager.register_optimizer(torch.optim.AdamW(manager.parameters()))
    manager.prune(lowest=1)
    twin = duplicate(manager)
    assert twin._optimizers == []  # they hold the parameters of the original
    assert twin.slots.tolist() == manager.slots.tolist()
    slots, bank = manager.slots.tolist(), manager.bank.detach().clone()
    twin.allocate(2)
    assert manager.slots.tolist() == slots
    assert torch.equal(manager.bank, bank)
    with pytest.raises(ValueError, match="does not hold the parameter `bank`"):
        twin.register_optimizer(torch.optim.AdamW(manager.parameters()))
    twin.register_optimizer(torch.optim.AdamW(twin.parameters()))


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_a_copied_machine_edits_its_own_parts(duplicate):
    machine = small_machine().eval()
    optimizer = torch.optim.AdamW(machine.parameters())
    machine.manager.register_optimizer(optimizer)
    train(machine, optimizer)
    twin = duplicate(machine)
    x = torch.randn(5, 2)
    out = machine(x)
    assert torch.equal(twin(x), out)
    old = twin.cell.router.lin_logits.weight.detach().clone()
    twin.manager.allocate(1)
    assert not torch.equal(twin.cell.router.lin_logits.weight, old)
    assert torch.equal(machine(x), out)
    assert twin(x).shape == out.shape


def test_dtype_follows_the_module():
    manager = filled().double()
    manager.update_importance(torch.rand(4))
    manager.allocate(1)
    assert manager.importance_ema.dtype == manager.bank.dtype == torch.float64
    assert manager.active.dtype == torch.bool


def test_repr():
    assert repr(filled(min_states=2)) == "StateManager(3, max_states=6, active=4, min_states=2)"


# Errors ###########################################################################


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_states": 9}, "initial_states <= max_states, but got 1, 9 and 8"),
        ({"min_states": 0}, "but got 0, 8 and 8"),
        ({"initial_states": 2, "min_states": 3}, "but got 3, 2 and 8"),
        ({"max_states": 0}, "but got 1, 0 and 0"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), but is 1\.0"),
        ({"decay": -0.1}, r"decay must lie in \[0, 1\), but is -0\.1"),
        ({"state_channels": 0}, "state_channels must be positive, but is 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        StateManager(**{"state_channels": 4, "max_states": 8, **options})


def refused(manager, message, call):
    """An edit that is refused leaves nothing half-done."""
    old = copy.deepcopy(manager.state_dict())
    with pytest.raises(ValueError, match=message):
        call()
    assert all(torch.equal(value, old[name]) for name, value in manager.state_dict().items())
    assert manager.slots.tolist() == old["active"].nonzero().flatten().tolist()


@pytest.mark.parametrize("n", [0, -1, 3])
def test_wrong_allocation(n):
    manager = filled()
    message = rf"cannot allocate {n} states: 4 of max_states=6 are active, so 1\.\.2"
    refused(manager, message, lambda: manager.allocate(n))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowest": 3}, "cannot prune 3 of 4 states: min_states=2 must stay, so at most 2"),
        ({"lowest": -1}, "cannot prune -1 of 4 states"),
        ({}, "prune takes exactly one of lowest=, below= and slots="),
        ({"lowest": 1, "below": 0.1}, "prune takes exactly one of lowest=, below= and slots="),
    ],
)
def test_wrong_pruning(options, message):
    manager = filled(min_states=2)
    refused(manager, message, lambda: manager.prune(**options))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ([0, 1], [0, 1], r"starts from slots \[0, 1\], but active are \[0, 1, 2, 3\]"),
        ([0, 1, 2, 3], [0], "leaves 1 states, but min_states=2 must stay"),
        ([0, 1, 2, 3], [0, 0], r"must be ascending slots in 0\.\.5, but is \[0, 0\]"),
        ([0, 1, 2, 3], [2, 1], r"ascending slots .* but is \[2, 1\]; reorder with new_to_old"),
        ([0, 1, 2, 3], [0, 6], r"slots in 0\.\.5, but is \[0, 6\]"),
        ([0, 1, 2, 3], [-1, 2], r"slots in 0\.\.5, but is \[-1, 2\]"),
    ],
)
def test_wrong_edits(before, after, message):
    manager = filled(min_states=2)
    edit = NodeEdit(torch.arange(len(after)), torch.tensor(before), torch.tensor(after))
    refused(manager, message, lambda: manager.edit(edit))


@pytest.mark.parametrize(
    ("signal", "slots", "message"),
    [
        (torch.zeros(5), None, "signal has 5 rows, which is no multiple of the 4 active"),
        (torch.zeros(4, 1), None, r"one number per state row, but has shape \(4, 1\)"),
        (torch.zeros(4), torch.zeros(3).long(), r"shape \(4,\) and slots has shape \(3,\)"),
        (torch.zeros(2), torch.tensor([0, 6]), "slots names slot 6, but there are 6 slots"),
        (torch.tensor([0, 0, math.nan, 0]), None, "signal holds NaN or infinity"),
        (torch.tensor([0, math.inf, 0, 0]), None, "signal holds NaN or infinity"),
    ],
)
def test_wrong_signals(signal, slots, message):
    manager = filled()
    refused(manager, message, lambda: manager.update_importance(signal, slots))


def test_an_optimizer_of_something_else():
    with pytest.raises(ValueError, match="does not hold the parameter `bank` of this manager"):
        filled().register_optimizer(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))


def test_refuses_a_dependent_with_another_number_of_slots():
    manager = StateManager(4, 8)
    with pytest.raises(
        ValueError, match=r"built for 4 slots, .* max_states=8; give it num_states=8"
    ):
        manager.register_dependent(torch.nn.Sequential(TokenToStateRouter(3, 4, num_states=4)))


def test_refuses_a_dependent_that_cannot_fill_fresh_slots():
    class Half(torch.nn.Module):
        slot_dims = {"weight": 0}

    with pytest.raises(ValueError, match="Half declares slot_dims but has no reset_slots"):
        StateManager(4, 8).register_dependent(Half())


def test_a_mask_written_in_place_is_noticed():
    manager = StateManager(4, 8)
    assert manager.num_active == 8
    manager.active[3:] = False
    assert manager.slots.tolist() == [0, 1, 2]
