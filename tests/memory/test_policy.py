"""Policies, each against what it says in plain Python."""

import math

import pytest
import torch

from nsm_graph.memory import (
    Every,
    Grow,
    GrowTo,
    MemoryView,
    Merge,
    OnPlateau,
    Proposal,
    Prune,
    Split,
)  # fmt: skip


def view_of(mass, states=None, *, step=1, loss=None, slots=None, num_free=4, **signals):
    mass = torch.tensor(mass)
    return MemoryView(
        step, loss,
        slots=torch.arange(len(mass)) if slots is None else torch.tensor(slots),
        states=torch.eye(len(mass)) if states is None else torch.tensor(states),
        signals={"routing": mass, **{name: torch.tensor(x) for name, x in signals.items()}},
        age=torch.full((len(mass),), 100), num_free=num_free,
    )  # fmt: skip


def test_prune_below_a_share_of_the_mean_names_the_lowest_first():
    view = view_of([0.3, 0.02, 0.63, 0.05], slots=[1, 4, 5, 9])
    (proposal,) = Prune(below=0.25)(view)
    assert (proposal.kind, proposal.slots.tolist()) == ("prune", [4, 9])
    assert proposal.scores.tolist() == pytest.approx([0.02, 0.05])
    assert "0.25 of the mean" in proposal.reason
    assert Prune(below=0.01)(view) == []


def test_prune_lowest_of_another_signal():
    view = view_of([0.1, 0.2, 0.7], gradient=[3.0, 1.0, 2.0])
    (proposal,) = Prune(lowest=2, signal="gradient")(view)
    assert proposal.slots.tolist() == [1, 2]
    (proposal,) = Prune(lowest=5)(view)
    assert proposal.slots.tolist() == [0, 1, 2]


def test_merge_names_the_most_alike_pair_lower_slot_first():
    rows = [[1.0, 0.0], [0.0, 1.0], [2.0, 0.1], [0.7, 0.7]]
    (proposal,) = Merge(above=0.9)(view_of([0.25] * 4, rows, slots=[2, 3, 5, 7]))
    assert (proposal.kind, proposal.slots.tolist()) == ("merge", [[2, 5]])
    assert proposal.scores.item() == pytest.approx(2 / math.hypot(2, 0.1))
    assert Merge(above=0.9999)(view_of([0.25] * 4, rows)) == []
    assert Merge(above=-1.0)(view_of([1.0], [[1.0, 0.0]])) == []


def test_split_names_the_busiest_state_if_there_is_room():
    mass = [0.1, 0.7, 0.1, 0.1]
    (proposal,) = Split(above=2.5)(view_of(mass, slots=[0, 2, 3, 4]))
    assert (proposal.kind, proposal.slots.tolist()) == ("split", [2])
    assert Split(above=2.9)(view_of(mass)) == []
    assert Split(above=2.5)(view_of(mass, num_free=0)) == []


@pytest.mark.parametrize("mass", [[0.5, 0.5], [1.0, 0.0], [0.7, 0.2, 0.1], [3.0, 1.0]])
def test_occupancy_is_the_effective_number_of_states_over_their_number(mass):
    shares = [m / sum(mass) for m in mass]
    entropy = -sum(p * math.log(p) for p in shares if p > 0)
    assert view_of(mass).occupancy == pytest.approx(math.exp(entropy) / len(mass))


def test_grow_while_all_states_are_used():
    (proposal,) = Grow(above=0.99, count=3)(view_of([0.5, 0.5], num_free=2))
    assert (proposal.kind, int(proposal.slots)) == ("allocate", 2)
    assert Grow(above=0.99)(view_of([0.9, 0.1])) == []
    assert Grow(above=0.5)(view_of([0.5, 0.5], num_free=0)) == []


def test_grow_to_a_schedule():
    policy = GrowTo({0: 2, 10: 5, 20: 4})
    wanted = {1: 0, 10: 3, 25: 3}
    for step, count in wanted.items():
        proposals = policy(view_of([0.5, 0.5], step=step))
        assert [int(p.slots) for p in proposals] == ([count] if count else [])


def test_every_asks_at_multiples_only():
    asked = []
    policy = Every(3, lambda view: asked.append(view.step) or [])
    for step in range(1, 10):
        assert policy(view_of([1.0], step=step)) == []
    assert asked == [3, 6, 9]


def test_a_plateau_counts_steps_without_a_lower_loss_and_begins_anew():
    proposal = Proposal("allocate", torch.tensor(1), "because")
    policy = OnPlateau(2, lambda view: [proposal], min_drop=0.1)
    losses = [1.0, 0.8, 0.75, 0.71, 0.71, 0.5, 0.6, 0.6]
    found = [len(policy(view_of([1.0], loss=loss))) for loss in losses]
    #        drop drop wait  wait! wait  drop  wait wait!
    assert found == [0, 0, 0, 1, 0, 0, 0, 1]


def test_what_is_no_number_decides_nothing():
    nan = float("nan")
    rows = [[1.0, 0.0], [nan, 0.0], [1.0, 0.1]]
    (proposal,) = Merge(above=0.9)(view_of([0.3] * 3, rows))
    assert proposal.slots.tolist() == [[0, 2]]
    assert Merge(above=0.9)(view_of([0.5] * 2, rows[:2])) == []
    policy = OnPlateau(1, lambda view: [Proposal("allocate", torch.tensor(1), "so")])
    found = [len(policy(view_of([1.0], loss=loss))) for loss in (1.0, nan, 0.9, 0.8, 0.7)]
    assert found == [0, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="positive number, but is given nan"):
        Prune(below=nan)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Prune(), "exactly one of below= and lowest="),
        (lambda: Prune(below=0.1, lowest=1), "exactly one of below= and lowest="),
        (lambda: Prune(lowest=0), "positive number, but is given 0"),
        (lambda: Every(0, Prune(lowest=1)), "steps must be positive, but is 0"),
        (lambda: OnPlateau(0, Prune(lowest=1)), "patience must be positive, but is 0"),
        (lambda: Prune(lowest=1, signal="surprise")(view_of([1.0])), "does not watch 'surprise'"),
        (lambda: OnPlateau(1, Prune(lowest=1))(view_of([1.0])), r"call the editor's step\(loss\)"),
    ],
)
def test_wrong_policies(make, message):
    with pytest.raises(ValueError, match=message):
        make()
