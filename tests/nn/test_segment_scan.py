"""The ordered segment scan: the equations, its contracts, and what order lets it do."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_oracle import ScanOptions, read_convolved, read_example
from torch._dynamo.testing import CompileCounter

from nsm_graph import Partition, Relation
from nsm_graph.memory import StateManager
from nsm_graph.nn import SegmentScan
from nsm_graph.nn.token_convolution import TokenConvolution
from nsm_graph.ops.delta_scan import delta_scan
from nsm_graph.ops.delta_scan.tokens import hard_gate, unit
from nsm_graph.testing import assert_close_to_norm

TOKEN_CHANNELS, WIDTH, SLOTS = 3, 2, 4


def make_scan(seed=0, dtype=torch.double, width=WIDTH, **options):
    """A small scan whose every number is drawn from the seed."""
    torch.manual_seed(seed)
    heads = options.pop("heads", 4)
    scan = SegmentScan(TOKEN_CHANNELS, width * heads, SLOTS, heads, **options).to(dtype)
    with torch.no_grad():  # away from the neutral start, where mistakes could hide
        for name, p in scan.named_parameters():
            if name.startswith("norms") and name.endswith("weight"):
                p.normal_(1.0, 0.3)
            elif name.startswith(("norms", "convolution")) or name.endswith("bias"):
                p.normal_(0.0, 0.5)
    return scan


@torch.no_grad()
def set_gates(scan, beta):
    """Gates that are the same for all tokens; what decays decays little."""
    for layer in scan.layers:
        for heads in filter(None, (layer.transition, layer.memory)):
            heads.lin_beta.weight.zero_()
            heads.lin_beta.bias.fill_(beta)
            if getattr(heads, "lin_decay", None) is not None:
                heads.lin_decay.weight.zero_()
                heads.lin_decay.bias.fill_(1.0)
    return scan


def oracle_options(scan, **options):
    for name in ("backend", "convolution"):  # the second is seen by its weights
        options.pop(name, None)
    return ScanOptions(SLOTS, heads=scan.heads, **options)


def draw(scan, tokens, states, *, with_slots=False, seed=1, dtype=torch.double):
    """Inputs for examples of so many tokens and states."""
    generator = torch.Generator().manual_seed(seed)
    src, dst = (torch.tensor([0, *counts]).cumsum(0) for counts in (tokens, states))
    relation = Relation.complete(src, dst)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.double).to(dtype)

    x, s = normal(sum(tokens), TOKEN_CHANNELS), normal(sum(states), scan.state_channels)
    # Weights of each token over the states of its example, in edge order: state by state.
    weights = []
    for num_tokens, num_states in zip(tokens, states, strict=True):
        weights.append(normal(num_tokens, num_states).softmax(1).T.flatten())
    slots = None
    if with_slots:
        rows = [torch.randperm(SLOTS, generator=generator)[:n] for n in states]
        slots = torch.cat(rows)
    tail = normal(len(tokens), TOKEN_CHANNELS)
    leaves = {"x": x, "s": s, "weights": torch.cat(weights), "tail": tail}
    return {n: t.requires_grad_() for n, t in leaves.items()} | {
        "relation": relation,
        "slots": slots,
    }


def call(scan, given, **changes):
    given = given | changes
    return scan(
        (given["x"], given["s"]),
        given["relation"],
        weights=given["weights"] if scan.needs_weights else None,
        slots=given["slots"],
        tail=given["tail"],
    )


def expected_of(scan, options, given):
    relation, w = given["relation"], dict(scan.named_parameters())
    states, reads, first_edge = [], [], 0
    for b in range(relation.num_examples):
        tokens, rows = (slice(*p.ptr[b : b + 2]) for p in (relation.sources, relation.targets))
        x, s = given["x"][tokens], given["s"][rows]
        num_edges = len(x) * len(s)
        weights = given["weights"][first_edge : first_edge + num_edges].view(len(s), len(x)).T
        first_edge += num_edges
        slots = list(range(SLOTS)) if given["slots"] is None else given["slots"][rows].tolist()
        tail = None if given["tail"] is None else given["tail"][b]
        after, read = read_example(w, options, x, s, slots, weights, tail)
        states.append(after)
        reads.append(read)
    return torch.cat(states), torch.cat(reads)


def gradients(outs, leaves):
    total = sum(
        (out * torch.cos(torch.arange(out.numel()) + 0.3).view_as(out)).sum() for out in outs
    )
    return torch.autograd.grad(total, leaves, allow_unused=True)


def assert_equals_the_oracle(scan, options, given):
    actual, expected = call(scan, given), expected_of(scan, options, given)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    inputs = {n: given[n] for n in ("x", "s", "weights", "tail")}
    leaves = inputs | dict(scan.named_parameters())
    pairs = zip(
        gradients(actual, [*leaves.values()]), gradients(expected, [*leaves.values()]), strict=True
    )
    for name, (a, b) in zip(leaves, pairs, strict=True):
        if b is None or a is None:
            assert (a is None or (a == 0).all()) and (b is None or (b == 0).all()), name
        else:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=name)


@st.composite
def scan_options(draw, backends=(None,)):
    gated = draw(st.sampled_from([None, 1, 2]))
    memory = draw(st.sampled_from([0, 1, 2]))
    heads = draw(st.integers(max(1, memory + (gated or 0)), 6))
    transition = heads - memory - (gated or 0)
    if transition + memory == 0:
        heads, transition = heads + 1, 1
    routed = draw(st.booleans())
    return {
        "heads": heads,
        "memory_heads": memory,
        "gated_heads": gated,
        "layers": draw(st.integers(1, min(3, transition + (memory > 0)))),
        "reflections": draw(st.sampled_from([1, 2, 3])),
        "decay": draw(st.booleans()),
        "write": draw(st.booleans()),
        "routed": routed,
        "read": draw(st.sampled_from(["mean", "routed"])),
        "convolution": draw(st.booleans()),
        "backend": None if routed else draw(st.sampled_from(backends)),
    }


TOKENS = st.lists(st.integers(0, 5), min_size=1, max_size=3).filter(lambda counts: sum(counts) > 0)
#: One of each kind, for contracts that cost more.
KINDS = {
    "transition": {"gated_heads": 1},
    "no convolution": {"gated_heads": 1, "convolution": False},
    "memory": {"memory_heads": 3, "gated_heads": 1},
    "both": {"memory_heads": 1, "gated_heads": None, "decay": True, "write": True},
    "layers": {"memory_heads": 1, "layers": 3, "read": "routed", "decay": True},
    "routed": {"memory_heads": 1, "routed": True, "gated_heads": 2},
}
kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


# The equations ##################################################################


@settings(max_examples=50)
@given(
    options=scan_options((None, "chunked", "reference")),
    tokens=TOKENS,
    has_tail=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_equations_with_every_gradient(options, tokens, has_tail, seed):
    scan = make_scan(seed, **options)
    given_ = draw(scan, tokens, [SLOTS] * len(tokens), seed=seed)
    if not has_tail:
        given_["tail"] = None
        actual, expected = (
            call(scan, given_),
            expected_of(scan, oracle_options(scan, **_rest(options)), given_),
        )
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        return
    assert_equals_the_oracle(scan, oracle_options(scan, **_rest(options)), given_)


def _rest(options):
    return {n: v for n, v in options.items() if n != "heads"}


@settings(max_examples=30)
@given(options=scan_options((None, "reference")), data=st.data(), seed=st.integers(0, 99))
def test_examples_may_hold_different_slots_and_different_numbers_of_them(options, data, seed):
    tokens = data.draw(TOKENS)
    states = data.draw(st.lists(st.integers(1, SLOTS), min_size=len(tokens), max_size=len(tokens)))
    scan = make_scan(seed, **options)
    given_ = draw(scan, tokens, states, with_slots=True, seed=seed)
    assert_equals_the_oracle(scan, oracle_options(scan, **_rest(options)), given_)


@kinds
@pytest.mark.parametrize("length", [15, 16, 17, 20, 31, 32, 33])
def test_segments_longer_than_a_chunk_equal_the_equations(length, options):
    scan = make_scan(**options)
    given = draw(scan, [length, 2], [SLOTS] * 2)
    expected = expected_of(scan, oracle_options(scan, **options), given)
    for a, b in zip(call(scan, given), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reflections", [1, 2, 3, 5])
def test_heads_of_both_kinds_read_side_by_side_at_any_length(reflections):
    scan = make_scan(memory_heads=1, reflections=reflections, dtype=torch.float)
    reference = copy.deepcopy(scan)
    reference.layers[0].backend = "reference"
    for length in range(1, 70, 4):
        given = draw(scan, [length], [SLOTS], dtype=torch.float)
        for a, b in zip(call(scan, given), call(reference, given), strict=True):
            assert a.shape == b.shape
            assert_close_to_norm(a, b, 1e-5, f"{length} tokens")


@pytest.mark.parametrize("transition", range(1, 8))
@pytest.mark.parametrize("layers", range(1, 5))
def test_layers_share_the_transition_heads_and_the_first_take_what_is_left(layers, transition):
    if layers > transition:
        pytest.skip("one head each at least")
    scan = make_scan(heads=transition + 1, layers=layers)
    shares = [layer.transition.heads for layer in scan.layers]
    assert shares == [n for n, _ in ScanOptions(SLOTS, transition + 1, layers=layers).shares()]


def in_both(seed, dtype, options, tokens, **more):
    """Results and gradients of both backends."""
    results = []
    for backend in ("chunked", "reference"):
        scan = make_scan(seed, dtype, **options | {"backend": backend} | more)
        given = draw(scan, tokens, [SLOTS] * len(tokens), seed=seed, dtype=dtype)
        outs = call(scan, given)
        leaves = [given[n] for n in ("x", "s", "weights", "tail")]
        results.append((outs, gradients(outs, [*leaves, *scan.parameters()]), given["s"]))
    return results


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=3).filter(lambda n: sum(n) > 0)


@settings(max_examples=12)
@given(
    options=scan_options().filter(lambda options: not options["routed"]),
    tokens=LENGTHS,
    seed=st.integers(0, 99),
)
def test_both_backends_agree_with_every_gradient(options, tokens, seed):
    (outs, grads, _), (expected, wanted, _) = in_both(seed, torch.double, options, tokens)
    for a, b in zip(outs, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    # By norm, over all gradients: a sum that cancels to zero has no relative precision.
    pairs = [(a, b) for a, b in zip(grads, wanted, strict=True) if b is not None]
    error = sum((a - b).norm() for a, b in pairs)
    assert error <= 1e-10 * sum(b.norm() for _, b in pairs)


@settings(max_examples=12)
@given(
    options=scan_options().filter(lambda options: not options["routed"]),
    tokens=LENGTHS,
    seed=st.integers(0, 99),
)
def test_both_backends_agree_in_single_precision(options, tokens, seed):
    # Of one layer: a LayerNorm between layers makes much of heads that have almost decayed.
    results = in_both(seed, torch.float, options | {"layers": 1}, tokens)
    ((states, _), _, before), ((expected, _), _, _) = results
    assert (states - expected).norm() <= 1e-5 * before.norm()


@kinds
def test_gated_heads_come_last_and_are_left_bit_for_bit(options):
    scan = make_scan(**options)
    given = draw(scan, [5, 3], [SLOTS] * 2)
    states, _ = call(scan, given)
    scanned = scan.scanned_channels
    assert torch.equal(states[:, scanned:], given["s"][:, scanned:])
    gated = scan.gated_heads
    assert scan.state_channels - scanned == (0 if gated is None else gated * WIDTH)
    assert scan.gated_channels == (scan.state_channels if gated is None else gated * WIDTH)
    assert scan.transition_channels == scanned - scan.memory_heads * WIDTH
    for head in states[:, :scanned].split(WIDTH, dim=1):
        assert (head - given["s"][:, :scanned].split(WIDTH, 1)[0]).abs().max() > 1e-3


@kinds
def test_hoisting_without_reads_gives_the_same_states(options):
    scan = make_scan(**options)
    given = draw(scan, [5, 0, 20], [SLOTS] * 3)
    expected, _ = call(scan, given)
    weights = given["weights"] if scan.needs_weights else None
    tokens = scan.convolve(given["x"], given["relation"].sources, given["tail"])
    hoisted = scan.hoist(tokens, given["relation"], weights, None, reads=False)
    states, reads = scan.advance(given["s"], hoisted, given["relation"])
    torch.testing.assert_close(states, expected, rtol=1e-12, atol=1e-12)
    assert (reads is None) == (len(scan.layers) == 1)


@kinds
def test_convolved_tokens_may_be_handed_over(options):
    scan = make_scan(**options)
    given = draw(scan, [4], [SLOTS])
    weights = given["weights"] if scan.needs_weights else None
    hoisted = scan.hoist(given["x"], given["relation"], weights, None, reads=True)
    states, reads = scan.advance(given["s"], hoisted, given["relation"])
    dense = given["weights"].view(SLOTS, 4).T
    expected = read_convolved(
        dict(scan.named_parameters()),
        oracle_options(scan, **options),
        [*given["x"]],
        given["s"],
        range(SLOTS),
        dense,
    )
    for a, b in zip((states, reads[0]), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# Gates and keys ###################################################################


def test_the_hard_gate_reaches_both_ends_exactly():
    z = torch.tensor([-100.0, -1.2, -1.0, 0.0, 1.0, 1.2, 100.0], requires_grad=True)
    expected = [0.0, 0.0, 2 / (1 + torch.e) - 0.5, 0.5, 1.5 - 2 / (1 + torch.e), 1.0, 1.0]
    torch.testing.assert_close(hard_gate(z), torch.tensor(expected))
    assert hard_gate(z)[[0, 1, 5, 6]].tolist() == [0.0, 0.0, 1.0, 1.0]
    hard_gate(z).sum().backward()
    assert (z.grad[[2, 3, 4]] > 0).all()
    assert (z.grad[[0, 1, 5, 6]] == 0).all()


@kinds
def test_gates_harden_from_a_sigmoid_to_their_full_stretch(options):
    scan = make_scan(stretch=2.0, **options)
    given = draw(scan, [5, 3], [SLOTS] * 2)
    hard = call(scan, given)
    scan.harden(0.0)
    soft = call(scan, given)
    for other, stretch in ((soft, 0.0), (hard, 2.0)):
        twin = make_scan(stretch=stretch, **options)
        for a, b in zip(other, call(twin, given), strict=True):
            assert torch.equal(a, b)
    scan.harden(0.25)  # half of one
    for a, b in zip(call(scan, given), call(make_scan(**options), given), strict=True):
        assert torch.equal(a, b)
    scan.harden(1.0)
    assert torch.equal(call(scan, given)[0], hard[0])
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], but is 1.5"):
        scan.harden(1.5)


def test_half_open_is_exact_in_any_precision_of_the_stretch():
    for stretch in (0.0, 0.1, 0.5, 2.0):
        assert hard_gate(torch.zeros(1), torch.tensor(stretch).bfloat16()) == 0.5


def test_drawing_parameters_anew_makes_gates_as_hard_as_at_first():
    scan = make_scan(stretch=2.0, memory_heads=1)
    scan.harden(0.0)
    scan.reset_parameters()
    layer = scan.layers[0]
    assert layer.transition.stretch == layer.memory.stretch == 2.0


def test_how_hard_gates_are_belongs_to_the_state_dict():
    scan, twin = make_scan(stretch=2.0), make_scan(stretch=2.0)
    scan.harden(0.5)
    twin.load_state_dict(scan.state_dict())
    assert twin.layers[0].transition.stretch == 1.0


def test_units_have_norm_one_and_zero_stays_zero_with_a_gradient_of_zero():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-30, 1e-30], [2e-15, 1e-15]], requires_grad=True)
    u = unit(x)
    torch.testing.assert_close(u[0], torch.tensor([0.6, 0.8]))
    assert (u[1] == 0).all()
    norms = u.norm(dim=1)
    assert ((norms == 0) | ((norms - 1).abs() < 1e-6)).all()
    u[:2].sum().backward(retain_graph=True)
    assert x.grad.isfinite().all()
    assert (x.grad[1] == 0).all()
    torch.testing.assert_close(x.grad[0], torch.tensor([4 * (4 - 3) / 125.0, -3 * (4 - 3) / 125.0]))


@pytest.mark.parametrize("size", [1e-5, 1e-10, 1e-12, 1e-14, 1e-17, 1e-18])
def test_the_gradient_of_a_short_key_is_finite(size):
    x = (torch.tensor([[1.0, 2.0]]) * size).requires_grad_()
    (unit(x) * torch.tensor([1.0, -1.0])).sum().backward()
    # d unit(x) is of the size 1 / |x|, which single precision can hold.
    exact = torch.tensor([[1.0, 2.0]], dtype=torch.double) * size
    exact = exact.requires_grad_()
    (exact / exact.norm() * torch.tensor([1.0, -1.0])).sum().backward()
    torch.testing.assert_close(x.grad.double() * size, exact.grad * size, rtol=1e-5, atol=1e-5)


@kinds
def test_keys_of_norm_zero_leave_the_states_with_finite_gradients(options):
    scan = make_scan(dtype=torch.float, **options | {"decay": False, "write": False})
    with torch.no_grad():
        for layer in scan.layers:
            for heads in (layer.transition, layer.memory):
                if heads is not None:
                    heads.lin_key.weight.zero_()
                    heads.lin_key.bias.zero_()
    given = draw(scan, [20, 3], [SLOTS] * 2, dtype=torch.float)
    states, reads = call(scan, given)
    assert torch.equal(states, given["s"])
    for grad in gradients((states, reads), [given["x"], given["s"], *scan.parameters()]):
        assert grad is None or grad.isfinite().all()


def test_closed_gates_leave_the_states_bit_for_bit():
    for options in KINDS.values():
        scan = make_scan(dtype=torch.float, **options | {"decay": False, "write": False})
        set_gates(scan, -100.0)
        given = draw(scan, [20, 3], [SLOTS] * 2, dtype=torch.float)
        assert torch.equal(call(scan, given)[0], given["s"])


# Contracts ########################################################################


@kinds
def test_every_split_of_a_stream_equals_the_whole(options):
    for dtype, tolerance, length in ((torch.double, 1e-10, 23), (torch.float, 1e-6, 9)):
        scan = set_gates(make_scan(dtype=dtype, width=8, **options), 1.0)
        given = draw(scan, [length], [SLOTS], dtype=dtype)
        whole, reads = call(scan, given, tail=None)
        weights = given["weights"].view(SLOTS, length)
        for cut in range(length + 1):
            states, tail, out = given["s"], None, []
            for part in (slice(0, cut), slice(cut, length)):
                x = given["x"][part]
                relation = Relation.complete([0, len(x)], [0, SLOTS])
                states, read = scan(
                    (x, states),
                    relation,
                    weights=weights[:, part].flatten() if scan.needs_weights else None,
                    tail=tail,
                )
                out.append(read)
                tail = TokenConvolution.next_tail(x, relation.sources, tail)
            assert_close_to_norm(states, whole, tolerance, f"cut at {cut}")
            assert_close_to_norm(torch.cat(out), reads, tolerance, f"cut at {cut}")


@kinds
def test_a_stream_without_its_tail_is_another_stream(options):
    scan = make_scan(**options)
    given = draw(scan, [5], [SLOTS])
    difference = (call(scan, given)[0] - call(scan, given, tail=None)[0]).abs().max()
    assert difference > 1e-3 if scan.convolution is not None else difference == 0


@kinds
@settings(max_examples=10)
@given(tokens=st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(lambda n: sum(n) > 0))
def test_neighbours_in_the_batch_make_no_difference(options, tokens):
    scan = make_scan(dtype=torch.float, **options)
    given_ = draw(scan, tokens, [SLOTS] * len(tokens), dtype=torch.float)
    states, reads = call(scan, given_)
    sizes = [n * SLOTS for n in tokens]
    parts = zip(
        given_["x"].split(tokens),
        given_["s"].split(SLOTS),
        given_["weights"].split(sizes),
        strict=True,
    )
    for b, (x, s, weights) in enumerate(parts):
        alone = {
            "x": x,
            "s": s,
            "weights": weights,
            "tail": given_["tail"][b : b + 1],
            "slots": None,
            "relation": Relation.complete([0, len(x)], [0, SLOTS]),
        }
        after, read = call(scan, alone)
        assert_close_to_norm(states.split(SLOTS)[b], after, 1e-5, f"example {b}")
        if len(x) > 0:
            assert_close_to_norm(reads.split(tokens)[b], read, 1e-5, f"example {b}")
        else:
            assert torch.equal(states.split(SLOTS)[b], s)


@kinds
def test_examples_without_tokens_keep_their_states_bit_for_bit(options):
    scan = make_scan(dtype=torch.float, **options)
    given = draw(scan, [0, 7, 0], [SLOTS] * 3, dtype=torch.float)
    states, reads = call(scan, given)
    assert torch.equal(states[:SLOTS], given["s"][:SLOTS])
    assert torch.equal(states[2 * SLOTS :], given["s"][2 * SLOTS :])
    assert reads.shape == (7, TOKEN_CHANNELS)
    nothing = draw(scan, [0, 0], [SLOTS] * 2, dtype=torch.float)
    states, reads = call(scan, nothing)
    assert torch.equal(states, nothing["s"])
    assert reads.shape == (0, TOKEN_CHANNELS)


@kinds
def test_permuting_states_with_their_slots_permutes_the_results(options):
    scan = make_scan(**options)
    given = draw(scan, [6, 3], [SLOTS, SLOTS])
    states, reads = call(scan, given)
    order = torch.tensor([2, 0, 3, 1])
    rows = torch.cat([order, order + SLOTS])
    weights = torch.cat(
        [part.view(SLOTS, -1)[order].flatten() for part in given["weights"].split([24, 12])]
    )
    permuted = call(scan, given, s=given["s"][rows], slots=rows % SLOTS, weights=weights)
    torch.testing.assert_close(permuted[0], states[rows], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(permuted[1], reads, rtol=1e-12, atol=1e-12)
    # One row of slots serves all examples, too.
    short = call(scan, given, s=given["s"][rows], slots=order, weights=weights)
    for a, b in zip(short, permuted, strict=True):
        assert torch.equal(a, b)
    if scan.memory_heads > 0:
        other = call(scan, given, slots=order)[0]
        assert (other - states).abs().max() > 1e-3


@kinds
def test_the_order_of_tokens_matters(options):
    # What tells the order is the scan alone.
    scan = make_scan(**options | {"convolution": False})
    set_gates(scan, 1.0)  # each token counts, and none erases
    given = draw(scan, [6], [SLOTS])
    states, _ = call(scan, given, tail=None)
    swapped = [0, 1, 3, 2, 4, 5]
    weights = given["weights"].view(SLOTS, 6)[:, swapped].flatten()
    other, _ = call(scan, given, x=given["x"][swapped], weights=weights, tail=None)
    scanned = scan.scanned_channels
    for a, b in zip(states[:, :scanned].split(2, 1), other[:, :scanned].split(2, 1), strict=True):
        assert (a - b).abs().max() > 1e-4


@pytest.mark.parametrize("slots", [(1, 3), (0,), (3, 0, 2)])
def test_memory_heads_of_some_slots_are_those_of_a_smaller_scan(slots):
    scan = make_scan(memory_heads=2, gated_heads=1)
    small = SegmentScan(
        TOKEN_CHANNELS, scan.state_channels, len(slots), 4, memory_heads=2, gated_heads=1
    ).double()
    weights = scan.state_dict()
    for name in ("lin_key", "lin_query"):
        for kind in ("weight", "bias"):
            full = weights[f"layers.0.memory.{name}.{kind}"].unflatten(0, (SLOTS, 2))
            weights[f"layers.0.memory.{name}.{kind}"] = full[list(slots)].flatten(0, 1)
    small.load_state_dict(weights)
    given = draw(scan, [5, 2], [len(slots)] * 2)
    actual = call(scan, given, slots=torch.tensor(slots))
    for a, b in zip(actual, call(small, given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_pass_gradcheck():
    scan = make_scan(memory_heads=1, gated_heads=None, layers=2, decay=True, write=True)
    given = draw(scan, [2, 1], [SLOTS] * 2)
    leaves = [given[n] for n in ("x", "s", "weights", "tail")]
    assert torch.autograd.gradcheck(lambda *_: call(scan, given), leaves)


# What order is for ################################################################


def test_without_a_convolution_a_symbol_is_one_map_whatever_came_before():
    scan = make_scan(gated_heads=1, convolution=False)
    assert not any("convolution" in name for name in scan.state_dict())
    given = draw(scan, [6], [SLOTS])
    whole, reads = call(scan, given)
    states = given["s"]
    for i, token in enumerate(given["x"]):
        relation = Relation.complete([0, 1], [0, SLOTS])
        states, read = scan((token.unsqueeze(0), states), relation)  # no tail
        torch.testing.assert_close(read[0], reads[i], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(states, whole, rtol=1e-12, atol=1e-12)


def parity_scan():
    """Symbol 1 turns the sign of the first channel, symbol 0 does nothing: one reflection."""
    scan = SegmentScan(1, 2, 1, heads=1, gated_heads=None, reflections=1)
    heads = scan.layers[0].transition
    with torch.no_grad():
        for p in scan.convolution.parameters():
            p.zero_()
        heads.lin_key.weight.zero_()
        heads.lin_key.bias.copy_(torch.tensor([1.0, 0.0]))
        heads.lin_beta.weight.fill_(20.0)  # open at 1, closed at 0: both exactly
        heads.lin_beta.bias.fill_(-10.0)
    return scan


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("segment", [1, 64, 2500])
@torch.no_grad()
def test_parity_is_exact_for_ten_thousand_tokens(segment, backend):
    length = 10_000 if segment > 1 else 1_000
    scan = parity_scan()
    scan.layers[0].backend = backend
    bits = torch.randint(2, (length,), generator=torch.Generator().manual_seed(0))
    states, tail, parity = torch.ones(1, 2), None, 0
    for part in bits.float().unsqueeze(1).split(segment):
        relation = Relation.complete([0, len(part)], [0, 1])
        states, _ = scan((part, states), relation, tail=tail)
        parity = (parity + int(part.sum())) % 2
        # To the last bit: nothing adds up along the stream.
        assert states.tolist() == [[1.0 - 2.0 * parity, 1.0]]


@torch.no_grad()
def test_the_permutations_of_three_are_exact_products_of_reflections():
    """S3 acts on the plane; a swap is one reflection, a rotation two."""
    swaps = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]])
    scan = SegmentScan(2, 3, 1, heads=1, gated_heads=None, reflections=1).double()
    heads = scan.layers[0].transition
    for p in scan.convolution.parameters():
        p.zero_()
    heads.lin_key.weight.copy_(swaps.T)  # token: one-hot of the swap
    heads.lin_key.bias.zero_()
    heads.lin_beta.weight.zero_()
    heads.lin_beta.bias.fill_(100.0)
    word = torch.randint(2, (2_000,), generator=torch.Generator().manual_seed(1))
    x = torch.nn.functional.one_hot(word, 2).double()
    expected = [0.0, 1.0, 2.0]
    for swap in word.tolist():
        expected[swap], expected[swap + 1] = expected[swap + 1], expected[swap]
    states, _ = scan(
        (x, torch.arange(3.0).double().unsqueeze(0)), Relation.complete([0, 2_000], [0, 1])
    )
    torch.testing.assert_close(states[0], torch.tensor(expected).double(), rtol=0, atol=1e-9)


@torch.no_grad()
def test_memory_heads_recall_a_value_by_its_key():
    scan = SegmentScan(8, 4, 4, heads=1, memory_heads=1, gated_heads=None).double()
    heads = scan.layers[0].memory
    for p in scan.parameters():
        p.zero_()
    heads.lin_key.weight[:, :4] = torch.eye(4)
    heads.lin_value.weight[:, 4:] = torch.eye(4)
    heads.lin_beta.bias.fill_(100.0)
    values = torch.randn(6, 4).double()
    keys = [0, 1, 2, 3, 1, 0]  # the last two replace what was there
    x = torch.cat([torch.eye(4).double()[keys], values], 1)
    states, _ = scan((x, torch.randn(4, 4).double()), Relation.complete([0, 6], [0, 4]))
    torch.testing.assert_close(states, values[[5, 4, 2, 3]], rtol=0, atol=1e-12)


# Edits of the node set ##############################################################


def trained(seed=0):
    """A scan and a manager after a few steps of an optimizer that knows both."""
    scan = make_scan(seed, torch.float, memory_heads=2, gated_heads=1)
    manager = StateManager(scan.state_channels, SLOTS, initial_states=3)
    manager.register_dependent(scan)
    optimizer = torch.optim.Adam([*manager.parameters(), *scan.parameters()], lr=0.1)
    manager.register_optimizer(optimizer)
    for step in range(3):
        given = draw(scan, [5, 4], [3, 3], dtype=torch.float, seed=step)
        states, reads = call(scan, given, s=manager.initial(2), slots=manager.slots)
        loss = states.square().sum() + reads.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return scan, manager, optimizer


def slot_rows(scan, optimizer):
    """Everything that is indexed by slot in the scan, slots first."""
    memory, rows = scan.layers[-1].memory, {}
    for name, parameter in memory.named_parameters():
        if name.startswith(("lin_key", "lin_query")):
            rows[name] = parameter.detach().clone().unflatten(0, (SLOTS, 2))
            for moment in ("exp_avg", "exp_avg_sq"):
                value = optimizer.state[parameter][moment]
                rows[f"{name} {moment}"] = value.clone().unflatten(0, (SLOTS, 2))
    assert len(rows) == 12
    return rows


def test_allocation_draws_fresh_keys_and_queries_and_leaves_all_others_bit_for_bit():
    scan, manager, optimizer = trained()
    before, rest = slot_rows(scan, optimizer), copy.deepcopy(scan.state_dict())
    edit = manager.allocate(1)
    assert edit.fresh_slots.tolist() == [3]
    for name, rows in slot_rows(scan, optimizer).items():
        assert torch.equal(rows[:3], before[name][:3]), name
        if name.endswith("exp_avg"):
            assert (rows[3] == 0).all()
        elif name.endswith("exp_avg_sq"):
            torch.testing.assert_close(rows[3], before[name][:3].mean(0))
        else:
            assert not torch.equal(rows[3], before[name][3]), name
    for name, value in scan.state_dict().items():
        if "memory.lin_key" not in name and "memory.lin_query" not in name:
            assert torch.equal(value, rest[name]), name


def test_pruning_leaves_the_survivors_keys_and_moments_bit_for_bit():
    scan, manager, optimizer = trained()
    before = slot_rows(scan, optimizer)
    manager.importance_ema.copy_(torch.tensor([0.5, 0.1, 0.5, 0.0]))
    assert manager.prune(lowest=1).slots_after.tolist() == [0, 2]
    after = slot_rows(scan, optimizer)
    for name, rows in after.items():
        assert torch.equal(rows[[0, 2]], before[name][[0, 2]]), name
    given = draw(scan, [5, 4], [2, 2], dtype=torch.float)
    actual = call(scan, given, slots=manager.slots)
    assert actual[0].isfinite().all() and actual[1].isfinite().all()


def test_another_number_of_slots_is_refused_by_the_manager():
    scan = make_scan(memory_heads=1)
    with pytest.raises(ValueError, match=r"MemoryHeads is built for 4 slots, but .* max_states=5"):
        StateManager(scan.state_channels, 5).register_dependent(scan)


# What every layer owes ############################################################


def test_repr_says_what_it_is():
    scan = SegmentScan(8, 24, 3, heads=6, memory_heads=2, gated_heads=1)
    text = "SegmentScan(\n  8, 24, transition_heads=3, memory_heads=2, gated_heads=1\n"
    assert str(scan).startswith(text)
    assert "gated_heads=None" in str(SegmentScan(8, 24, 3, gated_heads=None))


@kinds
def test_a_state_dict_makes_the_round_trip(options):
    scan, twin = make_scan(0, **options), make_scan(1, **options)
    given = draw(scan, [5, 3], [SLOTS] * 2)
    assert not torch.equal(call(scan, given)[0], call(twin, given)[0])
    twin.load_state_dict(scan.state_dict())
    for a, b in zip(call(scan, given), call(twin, given), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(call(scan, given), call(copy.deepcopy(scan), given), strict=True):
        assert torch.equal(a, b)


@kinds
def test_reset_parameters_draws_anew_and_repeats_with_the_seed(options):
    torch.manual_seed(3)
    fresh = SegmentScan(TOKEN_CHANNELS, 4 * WIDTH, SLOTS, 4, **options)
    built = copy.deepcopy(fresh.state_dict())
    scan = make_scan(**options).float()
    torch.manual_seed(5)
    scan.reset_parameters()
    drawn = copy.deepcopy(scan.state_dict())
    torch.manual_seed(5)
    scan.reset_parameters()
    assert all(torch.equal(v, drawn[k]) for k, v in scan.state_dict().items())
    assert any(not torch.equal(v, built[k]) for k, v in drawn.items())
    for name, value in built.items():
        # What starts as a constant starts so again: gates, norms, the closed convolution.
        if value.unique().numel() == 1 and value.numel() > 1:
            assert torch.equal(drawn[name], value), name


def test_gates_start_half_open_and_none_is_cut_off():
    scan = SegmentScan(4, 16, 3, 4, memory_heads=1, decay=True, write=True)
    heads, memory = scan.layers[0].transition, scan.layers[0].memory
    for bias, start in (
        (heads.lin_beta.bias, 0.5),
        (memory.lin_beta.bias, 0.5),
        (heads.lin_decay.bias, 2 * torch.tensor(1.0).sigmoid().item() - 0.5),
        (heads.lin_write.bias, 2 * torch.tensor(-1.0).sigmoid().item() - 0.5),
    ):
        torch.testing.assert_close(hard_gate(bias), torch.full_like(bias, start))
        assert 0 < start < 1


@pytest.mark.filterwarnings("ignore")  # what Dynamo warns of is not what is asked here
@kinds
def test_compiles_without_a_graph_break(options):
    scan = make_scan(dtype=torch.float, **options)
    given = draw(scan, [5, 3], [SLOTS] * 2, dtype=torch.float)
    weights = given["weights"] if scan.needs_weights else None

    def read(x, s):
        return scan((x, s), given["relation"], weights=weights, tail=given["tail"])

    expected = read(given["x"], given["s"])
    torch._dynamo.reset()
    counter = CompileCounter()
    actual = torch.compile(read, backend=counter, fullgraph=True)(given["x"], given["s"])
    assert counter.frame_count == 1
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


# Precision ######################################################################


def test_states_in_16_bits_are_warned_of_with_the_measured_loss():
    scan = make_scan(dtype=torch.float, memory_heads=1)
    given = draw(scan, [9], [SLOTS], dtype=torch.float)
    rounded = given["s"].detach().bfloat16()
    exact, _ = call(scan, given, s=rounded.float())
    loss = ((exact.bfloat16().float() - exact).norm() / exact.norm()).item()
    with pytest.warns(
        UserWarning, match=rf"states in torch.bfloat16 lose {loss:.1e} of their norm"
    ):
        states, reads = call(scan, given, s=rounded)
    assert states.dtype == torch.bfloat16
    assert torch.equal(states, exact.bfloat16())
    assert reads.isfinite().all()
    assert 1e-4 < loss < 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(scan, given, s=rounded)  # said once
        call(make_scan(dtype=torch.float), given)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("options", [{}, {"layers": 3}, {"memory_heads": 1}], ids=str)
def test_autocast_does_not_warn_and_reflections_keep_the_norm(options, backend):
    scan = make_scan(dtype=torch.float, backend=backend, reflections=2, **options)
    set_gates(scan, 100.0)  # every token reflects fully
    given = draw(scan, [64], [SLOTS], dtype=torch.float)
    with warnings.catch_warnings(), torch.autocast("cpu", dtype=torch.bfloat16):
        warnings.simplefilter("error")
        states, reads = call(scan, given)
    assert states.dtype == torch.float
    assert reads.isfinite().all()
    channels = scan.transition_channels
    before, after = (
        t[:, :channels].unflatten(1, (-1, WIDTH)).norm(dim=-1) for t in (given["s"], states)
    )
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_autocast_composes_in_single_precision(backend):
    scan = make_scan(dtype=torch.float, backend=backend, memory_heads=1, gated_heads=1)
    given = draw(scan, [20], [SLOTS], dtype=torch.float)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = scan.convolve(given["x"], given["relation"].sources, given["tail"])
        hoisted = scan.hoist(tokens, given["relation"], None, None, True)
        actual, _ = scan.advance(given["s"], hoisted, given["relation"])
    # What is projected in 16 bits is composed in 32: the same maps, outside of autocast.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer, tokens = scan.layers[0], tokens.unsqueeze(0)
        steps = layer.transition.steps(tokens, None, None)
    memory = given["s"].unflatten(1, (4, WIDTH))[:, :2].permute(1, 2, 0).unsqueeze(0)
    expected, _ = delta_scan(memory, steps, backend="reference")
    states = actual.unflatten(1, (4, WIDTH))[:, :2].permute(1, 2, 0).unsqueeze(0)
    assert (states - expected).norm() <= 1e-5 * memory.norm()


# What is refused ################################################################


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_channels": 0}, "token_channels must be a positive integer, but is 0"),
        ({"state_channels": -8}, "state_channels must be a positive integer, but is -8"),
        ({"num_states": 2.0}, r"num_states must be a positive integer, but is 2\.0"),
        ({"heads": True}, "heads must be a positive integer, but is True"),
        ({"reflections": 0}, "reflections must be a positive integer, but is 0"),
        ({"layers": 0}, "layers must be a positive integer, but is 0"),
        ({"gated_heads": 0}, "gated_heads must be a positive integer, but is 0"),
        ({"memory_heads": 1.0}, r"memory_heads must be .*integer.* is 1\.0"),
        ({"memory_heads": True}, "memory_heads must be .*integer.* is True"),
        ({"state_channels": 18}, "heads=4 must divide state_channels=18"),
        ({"memory_heads": -1}, "memory_heads=-1 and gated_heads=1: at least one must be left"),
        ({"memory_heads": 4}, "heads=4 are transition, memory_heads=4 and gated_heads=1: at least"),
        ({"gated_heads": 4}, "memory_heads=0 and gated_heads=4: at least one must be left to scan"),
        ({"layers": 4}, "layers=4 share 3 transition heads, and memory heads belong to the last"),
        ({"memory_heads": 3, "layers": 2}, "layers=2 share 0 transition heads"),
        ({"gated_dropout": 1.0}, r"gated_dropout must lie in \[0, 1\), but is 1\.0"),
        ({"gated_dropout": -0.1}, r"gated_dropout must lie in \[0, 1\), but is -0\.1"),
        ({"read": "sum"}, "read must be one of 'mean', 'routed', but is 'sum'"),
        (
            {"backend": "dense"},
            "backend must be one of 'reference', 'chunked', None, but is 'dense'",
        ),
        (
            {"routed": True, "backend": "chunked"},
            'routed reflections do not compose into chunks; use backend="reference" or None',
        ),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options, message):
    sizes = {"token_channels": 8, "state_channels": 16, "num_states": 3}
    with pytest.raises(ValueError, match=message):
        SegmentScan(**sizes | options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x": torch.zeros(5, 4)},
            r"x\[0\] \(tokens\) must have shape \(nodes, 3\), but got \(5, 4\)",
        ),
        ({"x": torch.zeros(5, 3).long()}, r"x\[0\] \(tokens\) must be floating point"),
        ({"x": torch.zeros(5, 3).double()}, r"x\[0\] \(tokens\) is torch.float64 .*torch.float32"),
        (
            {"x": torch.zeros(6, 3)},
            "relation goes from 5 tokens to 4 states, but x has 6 and 4 rows",
        ),
        ({"s": torch.zeros(4, 7)}, r"x\[1\] \(states\) must have shape \(nodes, 8\)"),
        ({"s": torch.zeros(4, 8).double()}, r"x\[1\] \(states\) is torch.float64"),
        (
            {"s": torch.zeros(3, 8)},
            "relation goes from 5 tokens to 4 states, but x has 5 and 3 rows",
        ),
        (
            {"relation": Relation.from_edge_index(torch.zeros(2, 1).long(), (5, 4))},
            "a scan reads all",
        ),
        ({"relation": torch.zeros(2, 1).long()}, "a scan reads all tokens of an example in order"),
        ({"slots": torch.arange(3)}, r"slots must have one entry for each of the 4 states.*\(3,\)"),
        ({"slots": torch.tensor([0, 1, 2, 9])}, "slots .*9"),
        ({"slots": torch.tensor([0, 1, 2, -1])}, "slots .*-1"),
        ({"slots": torch.tensor([0.0, 1.0, 2.0, 3.0])}, "slots .*dtype"),
        ({"tail": torch.zeros(2, 3)}, r"tail .*\(1, 3\).*\(2, 3\)"),
        ({"tail": torch.zeros(1, 4)}, r"tail .*\(1, 3\).*\(1, 4\)"),
        ({"weights": torch.zeros(7)}, "the relation has 20 edges, but values has 7 rows"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_inputs_that_do_not_fit_are_refused(changes, message):
    scan = make_scan(dtype=torch.float, memory_heads=1, write=True)
    given = draw(scan, [5], [SLOTS], dtype=torch.float)
    with pytest.raises(ValueError, match=message):
        call(scan, given, **changes)


@pytest.mark.parametrize("option", [{"write": True}, {"routed": True}, {"read": "routed"}], ids=str)
def test_missing_routing_weights_are_named(option):
    scan = make_scan(dtype=torch.float, **option)
    x, s = torch.zeros(5, TOKEN_CHANNELS), torch.zeros(SLOTS, scan.state_channels)
    with pytest.raises(ValueError, match=r"need routing weights; pass weights= .*mix='attention'"):
        scan((x, s), Relation.complete([0, 5], [0, SLOTS]))


@pytest.mark.parametrize("states", [[3, 3], [4, 2]])
def test_fewer_states_than_slots_need_their_slots(states):
    scan = make_scan(memory_heads=1)
    given = draw(scan, [2, 2], states)
    message = rf"for each of the 4 slots, but examples have {min(states)} to {max(states)} states"
    with pytest.raises(ValueError, match=message):
        call(scan, given)
    call(make_scan(), given)  # transition heads treat all states alike


def test_partitions_of_one_and_many_are_read_alike():
    scan = make_scan(memory_heads=1, write=True)
    given = draw(scan, [4, 4], [SLOTS] * 2)
    uniform = Relation.between(Partition.uniform(2, 4), Partition.uniform(2, SLOTS))
    for a, b in zip(call(scan, given), call(scan, given, relation=uniform), strict=True):
        assert torch.equal(a, b)


def test_every_kind_is_among_the_kinds():
    covered = {name for options in KINDS.values() for name in options}
    assert covered >= {
        *("memory_heads", "gated_heads", "decay", "write", "routed", "read", "layers"),
        "convolution",
    }
