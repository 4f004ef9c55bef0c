"""Snapping states to codes: nearest, how sure, and what gradients and averages make of it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsm_graph.memory import StateManager
from nsm_graph.nn import StateSnap


def make(slots=3, codes=4, channels=2, seed=0, dtype=torch.double, **options):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(slots, codes, channels, generator=generator, dtype=torch.double)
    return StateSnap(table.to(dtype), **options)


def draw(examples, slots=3, channels=2, seed=1, dtype=torch.double):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, slots, channels, generator=generator, dtype=torch.double).to(dtype)


def loops(codes, states, slots=None):
    """Nearest code, margin and snapped states by comparing every pair."""
    slots = range(codes.size(0)) if slots is None else slots
    out, chosen, margins = [], [], []
    for state in states:
        distances = []
        for k in range(codes.size(1)):
            square = sum((state[j] - codes[m, k]).square().sum() for j, m in enumerate(slots))
            distances.append(float(square) ** 0.5)
        code = distances.index(min(distances))
        rest = distances[:code] + distances[code + 1 :]
        margins.append(1 - distances[code] / min(rest) if rest else 1.0)
        chosen.append(code)
        out.append(torch.stack([codes[m, code] for m in slots]))
    return torch.stack(out), chosen, margins


@settings(max_examples=40)
@given(
    examples=st.integers(1, 6),
    codes=st.integers(1, 5),
    channels=st.integers(1, 3),
    slots=st.sampled_from([None, [0, 1, 2], [2], [1, 2]]),
    seed=st.integers(0, 99),
)
def test_equals_a_comparison_of_every_pair(examples, codes, channels, slots, seed):
    snap = make(3, codes, channels, seed).eval()
    states = draw(examples, 3 if slots is None else len(slots), channels, seed)
    snapped = snap(states, None if slots is None else torch.tensor(slots))
    out, chosen, margins = loops(snap.codes, states, slots)
    assert torch.equal(snapped.states, out)
    assert snapped.code.tolist() == chosen
    torch.testing.assert_close(snapped.margin.tolist(), margins, rtol=1e-10, atol=1e-10)


def test_ties_go_to_the_lowest_code_and_are_unsure():
    snap = StateSnap(torch.tensor([[[1.0], [-1.0], [1.0]]])).eval()
    snapped = snap(torch.tensor([[[0.0]], [[2.0]], [[-1.0]]]))
    assert snapped.code.tolist() == [0, 0, 1]
    assert snapped.margin.tolist() == [0.0, 0.0, 1.0]


def test_a_state_on_two_equal_codes_is_unsure():
    snap = StateSnap(torch.tensor([[[1.0], [1.0], [5.0]]])).eval()
    assert snap(torch.tensor([[[1.0]], [[5.0]]])).margin.tolist() == [0.0, 1.0]


def test_states_in_16_bits_are_compared_in_single_precision():
    # Rounded to 16 bits, both distances would be 0.
    snap = StateSnap(torch.tensor([[[1.0], [1.001]]])).eval()
    snapped = snap(torch.tensor([[[1.0]]], dtype=torch.bfloat16))
    assert snapped.states.dtype == torch.bfloat16
    assert snapped.margin.item() == 1.0


def test_a_code_itself_is_sure_and_stays():
    snap = make(dtype=torch.float).eval()
    codes = snap.codes.transpose(0, 1)
    snapped = snap(codes)
    assert torch.equal(snapped.states, codes)
    assert snapped.code.tolist() == [0, 1, 2, 3]
    assert (snapped.margin == 1).all()
    again = snap(snapped.states)
    assert torch.equal(again.states, snapped.states)


def test_distances_near_a_code_keep_their_digits():
    # The product form |a|^2 - 2 ab + |b|^2 would see nothing of this.
    codes = torch.tensor([[[1000.0], [1000.25]]])
    snapped = StateSnap(codes).eval()(torch.tensor([[[1000.125]], [[1000.1875]]]))
    assert snapped.code.tolist() == [0, 1]
    torch.testing.assert_close(snapped.margin, torch.tensor([0.0, 2 / 3]))


def test_errors_that_are_smaller_than_half_a_distance_end_with_the_segment():
    snap = make(dtype=torch.float).eval()
    codes = snap.codes.transpose(0, 1)
    apart = torch.cdist(codes.flatten(1), codes.flatten(1))
    least = apart[apart > 0].min()
    noise = torch.randn(4, 3, 2)
    noise = noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1) * 0.49 * least
    snapped = snap(codes + noise)
    assert torch.equal(snapped.states, codes)
    assert ((snapped.margin > 0) & (snapped.margin < 1)).all()


def test_neighbours_in_the_batch_make_no_difference():
    snap = make(dtype=torch.float).eval()
    states = draw(7, dtype=torch.float)
    together = snap(states)
    for b in range(7):
        alone = snap(states[b : b + 1])
        assert torch.equal(alone.states[0], together.states[b])
        assert torch.equal(alone.margin[0], together.margin[b])


def test_permuting_states_with_their_slots_permutes_the_result():
    snap, states = make().eval(), draw(5)
    order = torch.tensor([2, 0, 1])
    snapped = snap(states[:, order], order)
    assert torch.equal(snapped.states, snap(states).states[:, order])
    assert torch.equal(snapped.code, snap(states).code)


def test_no_examples():
    snapped = make()(draw(0))
    assert snapped.states.shape == (0, 3, 2)
    assert snapped.code.shape == snapped.margin.shape == (0,)


# Gradients and averages #########################################################


@pytest.mark.parametrize("is_training", [False, True])
def test_gradients_pass_straight_through_and_the_value_is_the_code(is_training):
    snap = make(dtype=torch.float, decay=1.0).train(is_training)
    states = draw(6, dtype=torch.float).requires_grad_()
    snapped = snap(states)
    direction = torch.randn(6, 3, 2)
    (grad,) = torch.autograd.grad((snapped.states * direction).sum(), states)
    assert torch.equal(grad, direction)
    assert not snapped.margin.requires_grad
    # To the last bit what it is without gradients: an error that stays would add up.
    assert torch.equal(snapped.states, snap(states.detach()).states)


def test_codes_follow_the_states_that_are_drawn_to_them_in_training():
    snap, states = make(decay=0.9), draw(6)
    before = snap.codes.clone()
    _, chosen, _ = loops(before, states)
    snap(states)
    for k in range(4):
        own = [b for b in range(6) if chosen[b] == k]
        expected = before[:, k]
        if own:
            expected = 0.9 * before[:, k] + 0.1 * states[own].mean(0)
        torch.testing.assert_close(snap.codes[:, k], expected, rtol=1e-12, atol=1e-12)
    assert set(chosen) != {0, 1, 2, 3}  # some code had no states and stayed
    assert not torch.equal(snap.codes, before)


def test_only_the_slots_that_are_there_follow():
    snap, states = make(decay=0.5), draw(4, slots=2)
    before = snap.codes.clone()
    snap(states, torch.tensor([0, 2]))
    assert torch.equal(snap.codes[1], before[1])
    assert not torch.equal(snap.codes[0], before[0])
    assert not torch.equal(snap.codes[2], before[2])


def test_a_diverged_example_does_not_reach_the_codes():
    snap = StateSnap(torch.tensor([[[0.0], [10.0]]]), decay=0.5)
    snap(torch.tensor([[[2.0]], [[torch.nan]], [[torch.inf]], [[8.0]]]))
    assert snap.codes.flatten().tolist() == [1.0, 9.0]


@pytest.mark.parametrize(("decay", "is_training"), [(1.0, True), (0.5, False)])
def test_codes_stay_in_evaluation_and_with_a_decay_of_one(decay, is_training):
    snap = make(decay=decay).train(is_training)
    before = snap.codes.clone()
    snap(draw(6))
    assert torch.equal(snap.codes, before)


def test_with_a_decay_of_zero_codes_are_the_means_of_the_last_batch():
    snap = StateSnap(torch.tensor([[[0.0], [10.0]]]), decay=0.0)
    snap(torch.tensor([[[1.0]], [[3.0]], [[9.0]]]))
    assert snap.codes.flatten().tolist() == [2.0, 9.0]


# Codebooks ######################################################################


@given(labels=st.lists(st.sampled_from([-3, 0, 7]), min_size=1, max_size=8))
def test_codes_are_the_means_of_the_states_of_each_label(labels):
    states = draw(len(labels))
    snap = StateSnap.from_labels(states, torch.tensor(labels))
    for k, label in enumerate(sorted(set(labels))):
        own = [b for b, other in enumerate(labels) if other == label]
        torch.testing.assert_close(snap.codes[:, k], states[own].mean(0), rtol=1e-12, atol=1e-12)
    assert snap.num_codes == len(set(labels))
    assert snap.decay == 0.99


def test_means_of_many_states_are_as_exact_as_one_state():
    states = torch.full((20_000, 1, 1), 1 / 3)
    snap = StateSnap.from_labels(states, torch.zeros(20_000, dtype=torch.long))
    assert torch.equal(snap.codes, states[:1])
    assert snap.codes.dtype == torch.float


def test_the_codebook_is_a_copy():
    codes = torch.zeros(1, 2, 1)
    snap = StateSnap(codes)
    codes.fill_(5.0)
    assert (snap.codes == 0).all()
    assert "codes" in snap.state_dict()
    assert list(snap.parameters()) == []


def test_a_state_dict_makes_the_round_trip():
    snap, twin = make(seed=0).eval(), make(seed=1).eval()
    twin.load_state_dict(snap.state_dict())
    for other in (twin, copy.deepcopy(snap)):
        assert torch.equal(other(draw(5)).states, snap(draw(5)).states)
    assert str(snap) == "StateSnap(num_states=3, num_codes=4, channels=2)"


def test_edits_reach_the_codes():
    snap = make(dtype=torch.float).eval()
    manager = StateManager(2, 3)
    manager.register_dependent(snap)
    before = snap.codes.clone()
    manager.importance_ema.copy_(torch.tensor([0.5, 0.1, 0.5]))
    manager.prune(lowest=1)
    assert torch.equal(snap.codes[[0, 2]], before[[0, 2]])
    states = draw(5, slots=2, dtype=torch.float)
    expected = snap(states, manager.slots)
    manager.allocate(1)
    assert torch.equal(snap.codes[[0, 2]], before[[0, 2]])
    assert (snap.codes[1] == 0).all()
    # A fresh slot knows nothing: where its state is zero, it makes no difference.
    wide = torch.stack([states[:, 0], torch.zeros(5, 2), states[:, 1]], 1)
    after = snap(wide, manager.slots)
    assert torch.equal(after.code, expected.code)
    torch.testing.assert_close(after.margin, expected.margin)


# What is refused ################################################################


@pytest.mark.parametrize(
    ("codes", "options", "message"),
    [
        (torch.zeros(2, 3), {}, r"codes must have shape \(slots, codes, channels\).*\(2, 3\)"),
        (torch.zeros(2, 0, 3), {}, r"all positive, but has \(2, 0, 3\)"),
        (torch.full((1, 1, 1), torch.nan), {}, "codes hold NaN or infinity"),
        (torch.full((1, 1, 1), torch.inf), {}, "derive them from finite states"),
        (torch.zeros(1, 1, 1), {"decay": 1.5}, r"decay must lie in \[0, 1\], but is 1\.5"),
        (torch.zeros(1, 1, 1), {"decay": -0.1}, r"decay must lie in \[0, 1\], but is -0\.1"),
    ],
    ids=["dimensions", "empty", "nan", "inf", "decay", "negative decay"],
)
def test_codebooks_that_make_no_sense_are_refused(codes, options, message):
    with pytest.raises(ValueError, match=message):
        StateSnap(codes, **options)


@pytest.mark.parametrize(
    ("shape", "slots"), [((5, 2, 2), None), ((5, 3, 1), None), ((15, 2), None), ((5, 3, 2), [0, 1])]
)
def test_states_of_another_shape_are_refused(shape, slots):
    slots = None if slots is None else torch.tensor(slots)
    num_slots = 3 if slots is None else 2
    message = rf"states must have shape \(examples, {num_slots}, 2\), but has \({shape[0]}, "
    with pytest.raises(ValueError, match=message):
        make(dtype=torch.float)(torch.zeros(shape), slots)


def test_labels_must_fit_the_states():
    with pytest.raises(
        ValueError, match=r"one label for each example, but got \(4, 3, 2\) and \(3,\)"
    ):
        StateSnap.from_labels(draw(4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"expected states \(B, M, C\).*got \(4, 2\) and \(4,\)"):
        StateSnap.from_labels(torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(ValueError, match=r"codes must have shape .*all positive"):
        StateSnap.from_labels(draw(0), torch.zeros(0, dtype=torch.long))


def test_states_that_are_not_finite_are_not_healed_silently():
    states = draw(2, dtype=torch.float)
    states[1, 0, 0] = torch.nan
    snapped = make(dtype=torch.float).eval()(states)
    assert snapped.margin[1].isnan()
    assert snapped.states[1].isnan().any()
    assert snapped.states[0].isfinite().all()
