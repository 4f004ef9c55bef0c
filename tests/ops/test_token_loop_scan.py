"""The loop with an ordered scan before each step, against the plain loops of its parts."""

import pytest
import torch
from hoist_oracle import assert_close, assert_same
from loop_scan_oracle import Case
from segment_loop_oracle import CROWD, keeps, loss_of
from token_loop_oracle import gradients

from nsm_graph.ops.segment_loop import fused, release_memory, token_loop

#: Of heads of two channels; a state has eight.
HEADS = {
    "transition": {"transition": 2, "memory": 0, "reflections": 1, "decays": False,
                   "writes": False, "reads": 1},
    "decay": {"transition": 2, "memory": 0, "reflections": 3, "writes": False, "reads": 2},
    "write": {"transition": 1, "memory": 0, "reflections": 3, "decays": False, "reads": 2},
    "memory": {"transition": 0, "memory": 2, "reflections": 1, "decays": False, "writes": False,
               "reads": 1},
    "both": {},
    "unread": {"transition": 2, "memory": 1, "reads": 0},
    "all": {"transition": 1, "memory": 3, "reflections": 1, "writes": False, "reads": 1},
}  # fmt: skip
heads = pytest.mark.parametrize("scan", HEADS.values(), ids=HEADS)
SOME = ("memory", "both")
some_heads = pytest.mark.parametrize("scan", [HEADS[name] for name in SOME], ids=SOME)


def drop_mass(case, results):
    """The results that have gradients."""
    return [x for x, name in zip(results, case.names, strict=True) if name != "mass"]


def assert_equals_the_oracle(tolerances=(1e-10, 1e-5), asked=None, **options):
    """All results and every gradient: kept or not, the reference, and single precision."""
    exact = Case(**options)
    names, expected = exact.names, exact.oracle()
    asked = [i for i, name in enumerate(names) if name != "mass" and name in (asked or names)]
    wanted = gradients(exact, [expected[i] for i in asked])
    expected = dict(zip(names, (x.detach() for x in expected), strict=True))
    double, single = tolerances
    for dtype, tolerance, backend in (
        (torch.float64, double, "reference"),
        (torch.float64, double, "cpu"),
        (torch.float32, single, "cpu"),
    ):
        case = Case(**options, dtype=dtype)
        found = []
        for keep in (True, False) if backend == "cpu" else (True,):
            results = case.run(keep=keep, backend=backend)
            assert not results[2].requires_grad
            for name, x in zip(names, results, strict=True):
                assert_close({name: x}, {name: expected[name]}, tolerance)
            grads = gradients(case, [results[i] for i in asked])
            assert_close(grads, wanted, tolerance)
            found.append([*results, *grads.values()])
        assert_same(found[0], found[-1])


# The equations #####################################################################


@heads
@pytest.mark.parametrize(("kept", "is_lstm"), [(0, False), (4, True), (6, False)])
def test_equals_the_oracle_with_every_gradient(kept, is_lstm, scan):
    # Scanned channels are fewer than the kept ones, as many, or more, up to all.
    talks = kept < 6  # the norm of two channels is a sign
    assert_equals_the_oracle(scan=scan, kept=kept, is_lstm=is_lstm, talks=talks)


@some_heads
@pytest.mark.parametrize(("convolution", "tail"), [(True, False), (False, True), (False, False)])
def test_without_convolution_or_tail(convolution, tail, scan):
    assert_equals_the_oracle(scan=scan, convolution=convolution, tail=tail, kept=4)


@some_heads
@pytest.mark.parametrize("stretch", [0.0, 2.0])
def test_gates_of_another_stretch(stretch, scan):
    assert_equals_the_oracle(scan=scan, stretch=stretch, kept=4)


@pytest.mark.parametrize("asked", ["after", "final", "reads"])
@some_heads
def test_a_loss_that_reads_one_result(scan, asked):
    assert_equals_the_oracle(scan=scan, asked=[asked], kept=4)


@pytest.mark.parametrize(
    ("num_states", "width", "head_channels", "channels", "scan"),
    [
        (1, 1, 1, 4, {}),
        (1, 5, 3, 14, {"transition": 2, "memory": 1}),
        (17, 3, 5, 10, {"reads": 1, "writes": False}),
        (17, 17, 16, 33, {"transition": 0, "memory": 2}),
        (33, 6, 7, 14, {"transition": 1, "memory": 1, "reflections": 3}),
        (4, 16, 17, 34, {"decays": False, "writes": False}),
        (3, 7, 33, 66, {"transition": 1, "memory": 1, "reflections": 1}),
    ],
    ids=str,
)
def test_sizes_that_fill_no_vector(num_states, width, head_channels, channels, scan):
    assert_equals_the_oracle(
        num_states=num_states, width=width, channels=channels, heads=1, talks=False,
        scan=scan | {"width": head_channels}, counts=[[3, 1, 2], [3, 2], [1]],
    )  # fmt: skip


@pytest.mark.parametrize("counts", [[[1] * 5], [[40]], [[17, 16], [1, 1], [1]]], ids=str)
def test_segments_of_other_lengths(counts):
    assert_equals_the_oracle((1e-10, 3e-5), counts=counts, kept=4, gaps=(0,))


def test_what_the_oracle_meets():
    # Gates open, closed, and between; tokens of no group; an example that never reads.
    case = Case(stretch=2.0)
    gates = case.scan.x @ case.scan.weight.T[:, -7:] + case.scan.bias[-7:]
    gates = (5 * gates.sigmoid() - 2).clamp(0, 1)
    assert (gates == 0).any() and (gates == 1).any() and ((gates > 0) & (gates < 1)).any()
    assert not case.tokens.is_grouped.all()
    assert len(case.loop.rows["states"]) > 5 * len(case.loop.counts)


# Gates and keys at their ends ######################################################


@keeps
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_gates_leave_the_states_bit_for_bit_and_do_not_learn(dtype, keep):
    scan = {"decays": False, "writes": False, "reads": 0, "transition": 2}
    case = Case(scan=scan, dtype=dtype)
    first = case.scan.layout.gates
    weight, bias = case.scan.weight.detach().clone(), case.scan.bias.detach().clone()
    weight[first:], bias[first:] = 0, -1.2  # below log(1/3), where a stretch of 0.5 cuts off
    case.change(weight=weight, bias=bias)
    after, final, *_ = results = case.run(keep=keep)
    plain = super(Case, case).run(keep=keep)
    assert_same(results, plain)
    grads = gradients(case, (after, final))
    for name in ("weight", "bias", "x", "convolution", "tail"):
        assert not grads[f"scan.{name}"].any(), name
    expected = gradients(case, plain[:2])
    assert torch.equal(grads["states"], expected["states"])


@keeps
def test_gates_that_are_cut_off_have_no_slope_but_what_they_gate_has(keep):
    case = Case(scan={"transition": 2})
    first = case.scan.layout.gates
    weight, bias = case.scan.weight.detach().clone(), case.scan.bias.detach().clone()
    weight[first:], bias[first:] = 0, 1.2
    case.change(weight=weight, bias=bias)
    results = case.run(keep=keep)
    grads = gradients(case, drop_mass(case, results))
    assert not grads["scan.bias"][first:].any() and not grads["scan.weight"][first:].any()
    assert (grads["scan.bias"][:first] != 0).all()
    assert_close(grads, gradients(case, drop_mass(case, case.oracle())), 1e-10)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(size, torch.float32) for size in (0.0, 1e-30, 1e-20, 1e15, 1e25)]
    + [(size, torch.float64) for size in (0.0, 1e-30)],
)
def test_short_and_long_keys(size, dtype):
    # Only the direction of a key acts; that of a key of no length is none.
    scan = {"transition": 2, "memory": 1, "reflections": 2}
    exact, case = Case(scan=scan), Case(scan=scan, dtype=dtype)
    layout = case.scan.layout
    for one in (exact, case):
        weight, bias = (x.detach().clone() for x in one.scan[1:3])
        for keys in (slice(0, 2), slice(layout.memory_key, layout.query + 5)):
            weight[keys] *= size
            bias[keys] *= size
        one.change(weight=weight, bias=bias)
    results, expected = case.run(), exact.oracle()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    for name, x, wanted in zip(case.names, results, expected, strict=True):
        assert_close({name: x}, {name: wanted}, tolerance)
    grads = gradients(case, drop_mass(case, results))
    wanted = gradients(exact, drop_mass(exact, expected))
    assert all(x.isfinite().all() for x in grads.values())
    # Rows whose slopes are one over their size are compared among themselves.
    for part in (grads, wanted):
        for name in ("scan.weight", "scan.bias"):
            whole = part.pop(name).double()
            for keys in (slice(0, 2), slice(layout.memory_key, layout.query + 5)):
                part[f"{name}[{keys.start}]"] = whole[keys] * (size or 1.0)
                whole = whole.clone()
                whole[keys] = 0
            part[name] = whole
    assert_close(grads, wanted, tolerance)


# What results depend on, and what not ###############################################


@keeps
def test_any_number_of_threads_and_whatever_is_kept(keep, num_threads):
    case = Case(5, 7, 14, counts=CROWD, kept=6, is_lstm=True, dtype=torch.float32)
    wanted = case.run()
    grads = gradients(case, drop_mass(case, wanted))
    for count in (1, 2, 3, 100):
        num_threads(count)
        results = case.run(keep=keep)
        assert_same(results, wanted)
        found = gradients(case, drop_mass(case, results))
        for name in ("states", "tokens.x", "scan.x", "scan.tail"):  # what belongs to an example
            assert torch.equal(found[name], grads[name]), name
        assert_close(found, grads, 1e-5)


@keeps
@heads
def test_no_result_depends_on_memory_that_was_never_written(poisoned_memory, scan, keep):
    for gaps in ((0,), (0, 2, 1)):
        case = Case(5, 7, 14, scan=scan, kept=6, gaps=gaps, dtype=torch.float32)
        results = case.run(keep=keep)
        assert all(x.isfinite().all() for x in results)
        for asked in (drop_mass(case, results), [results[1]]):
            found = gradients(case, asked, retain_graph=True)
            assert all(x.isfinite().all() for x in found.values())


def test_a_batch_that_follows_a_longer_one(poisoned_memory):
    def read(counts):
        case = Case(counts=counts, kept=4, is_lstm=True)
        results = case.run()
        return [*results, *gradients(case, drop_mass(case, results)).values()]

    release_memory()
    expected = read([[4, 3], [2]])
    release_memory()
    read(CROWD)
    (held,) = fused._spare.values()
    assert_same(read([[4, 3], [2]]), expected)
    assert fused._spare[torch.float64] is held
    release_memory()


@keeps
@pytest.mark.parametrize("broken", ["scan.x", "scan.tail", "states"])
def test_an_example_of_no_numbers_breaks_no_other(broken, keep):
    case = Case(counts=CROWD, gaps=(0,))
    clean = case.run(keep=keep)
    wanted = gradients(case, drop_mass(case, clean))
    with torch.no_grad():
        case.given[broken][case.tokens.first[0] if broken == "scan.x" else 0] = torch.nan
    found = case.run(keep=keep)
    grads = gradients(case, drop_mass(case, found))
    # Of the first example: group 0 of each of its steps, and its rows of the final states.
    steps = case.loop.segments.num_active
    groups = torch.cat([torch.zeros(1, dtype=torch.long), steps.cumsum(0)[:-1]])
    is_other = torch.ones(int(steps.sum()), dtype=torch.bool)
    is_other[groups] = False
    rows = is_other.repeat_interleave(5)
    assert torch.equal(found[0][rows], clean[0][rows])
    assert torch.equal(found[1][5:], clean[1][5:])
    assert found[1][:5].isnan().any()
    assert torch.equal(grads["states"][5:], wanted["states"][5:])
    assert torch.equal(grads["scan.tail"][1:], wanted["scan.tail"][1:])
    others = torch.ones(len(case.scan.x), dtype=torch.bool)
    for group in groups.tolist():
        first = case.tokens.first[group]
        others[first : first + case.tokens.counts[group]] = False
    assert torch.equal(grads["scan.x"][others], wanted["scan.x"][others])


# Derivatives ########################################################################


@pytest.mark.parametrize("scan", [HEADS["both"], HEADS["all"]], ids=["both", "all"])
def test_second_derivatives(scan):
    case = Case(2, 3, 8, counts=[[2, 1], [1]], scan=scan, kept=4)
    given = list(case.given.values())

    def second(results):
        loss = sum(x.square().sum() for x in drop_mass(case, results))
        first = torch.autograd.grad(loss, given, create_graph=True, allow_unused=True)
        loss = sum(x.square().sum() for x in first if x is not None)
        return torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True)

    for a, b in zip(second(case.run()), second(case.oracle()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@keeps
def test_a_second_backward_through_the_same_graph(keep):
    case = Case(is_lstm=True, kept=4)
    results = drop_mass(case, case.run(keep=keep))
    first = gradients(case, results, retain_graph=True)
    gradients(case, drop_mass(case, case.run()))
    assert_same(gradients(case, results), first)


@keeps
def test_nothing_wants_a_gradient_but_one(keep):
    whole = Case(kept=4)
    wanted = gradients(whole, drop_mass(whole, whole.run()))
    for name in whole.given:
        case = Case(kept=4)
        for other, x in case.given.items():
            x.requires_grad_(other == name)
        (found,) = torch.autograd.grad(
            loss_of(drop_mass(case, case.run(keep=keep))), [case.given[name]]
        )
        assert_close({name: found}, {name: wanted[name]}, 1e-12)
    with torch.no_grad():
        assert not any(x.requires_grad for x in whole.run(keep=keep))


# Arguments ##########################################################################


def test_a_scan_that_does_not_fit():
    case = Case()
    scan, layout, zeros = case.scan, case.scan.layout, torch.zeros
    examples = len(case.loop.rows["states"]) // 5
    columns, tokens = layout.num_columns, len(scan.x)
    more, fewer = Case(scan={"transition": 4}), Case(6)

    def refuse(message, **changes):
        case.scan = scan._replace(**changes)
        for backend in ("cpu", "reference"):
            with pytest.raises(ValueError, match=message):
                case.run(backend=backend)

    refuse(rf"scan\.x must have shape \({tokens}, 6\) in .*float64 on cpu, but has \({tokens}, 7\)",
           x=zeros(tokens, 7).double())  # fmt: skip
    refuse(rf"scan\.x must have shape .* but has \({tokens - 1}, 6\)", x=scan.x[1:])
    refuse(r"scan\.x .*float64 on cpu, but .* in torch\.float32 on cpu", x=scan.x.float())
    refuse(r"scan\.x .* on cpu, but .* on meta", x=scan.x.to("meta"))
    refuse(rf"scan\.weight must have shape \({columns}, 6\)", weight=scan.weight[1:])
    refuse(rf"scan\.bias must have shape \({columns},\)", bias=scan.bias[1:])
    refuse(r"scan\.convolution must have shape \(6, 12\)", convolution=scan.convolution[:, 6:])
    refuse(r"scan\.convolution_bias must have shape \(6,\)", convolution_bias=zeros(7).double())
    refuse(rf"scan\.tail must have shape \({examples}, 6\)", tail=scan.tail[1:])
    refuse("convolution and its bias belong together; pass both or none", convolution_bias=None)
    refuse("convolution and its bias belong together; pass both or none", convolution=None)
    refuse("scan.layout is for 6 states, but examples have 5; make it for as many",
           layout=fewer.scan.layout, weight=fewer.scan.weight, bias=fewer.scan.bias)  # fmt: skip
    refuse(r"scan\.layout has 4 \+ 1 heads of 2 channels, but states have 8 channels",
           layout=more.scan.layout, weight=more.scan.weight, bias=more.scan.bias)  # fmt: skip
    none = Case(scan={"transition": 0, "memory": 0})
    refuse(r"scan\.layout has 0 \+ 0 heads", layout=none.scan.layout, weight=none.scan.weight,
           bias=none.scan.bias)  # fmt: skip


def test_nothing_to_read():
    case = Case(scan={"reads": 1})
    nothing = torch.zeros(0, dtype=torch.long)
    segments = case.loop.segments._replace(token_ptr=torch.zeros(1).long(), num_active=nothing)
    for backend in ("cpu", "reference"):
        found = token_loop(
            case.loop.rows["states"], case.tokens.x, nothing, case.tokens.weights, segments,
            case.loop.weights, case.loop.heads, scan=case.scan, backend=backend,
        )  # fmt: skip
        assert torch.equal(found.final, case.loop.rows["states"])
        assert found.after.shape == (0, 8) and found.reads.shape == (0, 4)
