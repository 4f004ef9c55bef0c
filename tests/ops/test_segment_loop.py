"""The loop over segments as one operation, against an oracle: one example, one head at a time."""

import math
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from nsm_graph.bench.record import peak_mib
from nsm_graph.ops.segment_loop import LoopSegments, LoopWeights, segment_loop
from nsm_graph.testing import assert_close_to_norm

ROWS = ("states", "routed", "key", "value")
#: Tokens that each example reads in each step, longest example first.
RAGGED = [[4, 3, 4, 1], [4, 4, 2], [1, 5], [4, 4], [3]]
#: States, channels and heads: one of each, and none that is a multiple of a vector.
SIZES = [(1, 1, 1), (5, 4, 4), (5, 6, 2), (1, 14, 2), (33, 32, 2), (33, 20, 1), (5, 40, 2)]
sizes = pytest.mark.parametrize(("num_states", "channels", "heads"), SIZES)
keeps = pytest.mark.parametrize("keep", [True, False])


@dataclass
class Case:
    """A batch, the weights of a cell, and what belongs to a call."""

    rows: dict  # states, routed, key and value by name; value may be the very key
    weights: LoopWeights
    counts: list
    num_states: int
    heads: int

    @property
    def segments(self):
        steps = range(max(map(len, self.counts), default=0))
        groups = [row[t] for t in steps for row in self.counts if t < len(row)]
        return LoopSegments(
            torch.tensor([0, *groups]).cumsum(0),
            torch.tensor([sum(t < len(row) for row in self.counts) for t in steps]).long(),
        )

    @property
    def given(self):
        """Every tensor that may want a gradient, by name, each once."""
        named = dict(self.rows) | self.weights._asdict()
        if self.rows["value"] is self.rows["key"]:
            del named["value"]
        return {name: x for name, x in named.items() if x is not None}

    def but(self, **changes):
        """The same case with other tensors; a shared value follows its key."""
        if self.rows["value"] is self.rows["key"] and "key" in changes:
            changes.setdefault("value", changes["key"])
        rows = {name: changes.get(name, x) for name, x in self.rows.items()}
        weights = {name: changes.get(name, x) for name, x in self.weights._asdict().items()}
        return Case(rows, LoopWeights(**weights), self.counts, self.num_states, self.heads)

    def to(self, dtype):
        return self.but(**{n: x.detach().to(dtype).requires_grad_() for n, x in self.given.items()})

    def detached(self, *wanted):
        """The same numbers; only what is named wants a gradient."""
        return self.but(
            **{n: x.detach().clone().requires_grad_(n in wanted) for n, x in self.given.items()}
        )

    def run(self, **options):
        options = {"backend": "cpu"} | options
        return segment_loop(
            **self.rows, segments=self.segments, weights=self.weights, heads=self.heads, **options
        )


def make_case(
    num_states=5, channels=6, heads=2, *, counts=RAGGED, talks=True, is_shared=True, idle=1,
    dtype=torch.float64, seed=0,
):  # fmt: skip
    """A case drawn from the seed, with parameters of the sizes that layers start with."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def linear(width_in, width_out):
        bound = width_in**-0.5
        for shape in ((width_out, width_in), (width_out,)):
            yield (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * bound

    num_groups, num_tokens = sum(map(len, counts)), sum(map(sum, counts))
    rows = {
        "states": normal((len(counts) + idle) * num_states, channels),
        "routed": normal(num_groups * num_states, channels),
        "key": normal(num_tokens, channels),
    }
    rows["value"] = rows["key"] if is_shared else normal(num_tokens, channels)
    weights = [
        *linear(channels, channels), *linear(channels, channels),
        *linear(2 * channels, 2 * channels), *linear(2 * channels, channels),
    ]  # fmt: skip
    talk = [
        *linear(channels, 3 * channels), *linear(channels, channels),
        1 + 0.3 * normal(channels), 0.3 * normal(channels),
    ]  # fmt: skip
    weights = LoopWeights(*weights, *(talk if talks else [None] * 6))
    return Case(rows, weights, counts, num_states, heads).to(dtype)


# The oracle ########################################################################


def attend(query, key, value, heads):
    """Softmax over keys, head by head."""
    width, outs = query.size(1) // heads, []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        powers = (query[:, part] @ key[:, part].T / math.sqrt(width)).exp()
        outs.append(powers / powers.sum(1, keepdim=True) @ value[:, part])
    return torch.cat(outs, 1)


def read_segment(w, s, routed, key, value, heads):
    """The new states of one example."""
    update = routed + attend(s @ w.query.T + w.query_bias, key, value, heads) @ w.out.T + w.out_bias
    gates = torch.cat([s, update], 1) @ w.gates.T + w.gates_bias
    reset, mix = (1 / (1 + (-gates).exp())).chunk(2, 1)
    candidate = torch.cat([reset * s, update], 1) @ w.candidate.T + w.candidate_bias
    s = (1 - mix) * s + mix * candidate.tanh()
    if w.qkv is None:
        return s
    q, k, v = (s @ w.qkv.T + w.qkv_bias).chunk(3, 1)
    s = s + attend(q, k, v, heads) @ w.mix.T + w.mix_bias
    centred = s - s.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * w.scale + w.shift


def oracle(case):
    """The states after every step, from those of each example alone."""
    ptr, num_states = case.segments.token_ptr.tolist(), case.num_states
    after, group = {}, 0
    for t in range(max(map(len, case.counts), default=0)):
        for b, row in enumerate(case.counts):
            if t >= len(row):
                continue
            mine = slice(group * num_states, (group + 1) * num_states)
            before = case.rows["states"][b * num_states : (b + 1) * num_states]
            tokens = slice(ptr[group], ptr[group + 1])
            after[b, t] = read_segment(
                case.weights, after.get((b, t - 1), before), case.rows["routed"][mine],
                case.rows["key"][tokens], case.rows["value"][tokens], case.heads,
            )  # fmt: skip
            group += 1
    return torch.cat(list(after.values()))


def gradients(out, case, last=None):
    """By name, from a direction without symmetry; of the last rows only, where asked."""
    direction = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
    if last is not None:
        out, direction = out[-last:], direction[-last:]
    found = torch.autograd.grad(
        (out * direction.to(out.dtype)).sum(), list(case.given.values()), allow_unused=True
    )
    return {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(case.given.items(), found, strict=True)
    }


def assert_close(actual, expected, tolerance):
    """By norm. What cancels to nothing, as a score's gradient may, is held to all the others."""
    whole = torch.cat([x.flatten() for x in expected.values()]).norm()
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert actual[name].shape == wanted.shape, name
        error = (actual[name].double() - wanted.double()).norm()
        assert error <= tolerance * max(wanted.norm(), 1e-3 * whole), name


def assert_equals_the_oracle(case, tolerance, last=None, **options):
    out, exact = case.run(**options), case.to(torch.float64)
    wanted = oracle(exact)
    assert_close({"states": out}, {"states": wanted}, tolerance)
    assert_close(gradients(out, case, last), gradients(wanted, exact, last), tolerance)


# Values and first derivatives ######################################################


@keeps
@pytest.mark.parametrize("is_shared", [True, False], ids=["one", "apart"])
@pytest.mark.parametrize("talks", [True, False], ids=["talk", "silent"])
@sizes
def test_equals_the_oracle_with_every_gradient(num_states, channels, heads, talks, is_shared, keep):
    options = {"talks": talks, "is_shared": is_shared}
    case = make_case(num_states, channels, heads, **options)
    assert_equals_the_oracle(case, 1e-10, keep=keep)
    assert_equals_the_oracle(case.to(torch.float32), 1e-5, keep=keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_equals_the_oracle(dtype):
    for talks in (True, False):
        case = make_case(talks=talks, is_shared=talks, dtype=dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-10
        assert_equals_the_oracle(case, tolerance, backend="reference")


@given(
    counts=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4),
    num_states=st.integers(1, 9),
    width=st.integers(1, 9),
    heads=st.integers(1, 3),
    idle=st.integers(0, 2),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 999),
)
def test_any_batch_equals_the_oracle(counts, num_states, width, heads, idle, flags, seed):
    talks, is_shared, keep = flags
    case = make_case(
        num_states, width * heads, heads, counts=sorted(counts, key=len, reverse=True),
        talks=talks, is_shared=is_shared, idle=idle, seed=seed,
    )  # fmt: skip
    assert_equals_the_oracle(case, 1e-10, keep=keep)


def test_more_examples_than_a_thread_takes_at_a_time_and_a_long_segment():
    counts = [[2, 70]] + [[1, 2]] * 15 + [[3]] * 5
    assert_equals_the_oracle(make_case(counts=counts), 1e-10)
    assert_equals_the_oracle(make_case(counts=counts), 1e-10, keep=False)


@keeps
def test_a_loss_on_the_last_step_only(keep):
    case = make_case()
    assert_equals_the_oracle(case, 1e-10, last=case.num_states, keep=keep)


@keeps
def test_examples_that_never_read_get_no_gradient_and_others_none_from_them(keep):
    case = make_case(idle=2)
    case.rows["states"].data[-2 * case.num_states :] = math.nan
    found = gradients(case.run(keep=keep), case)
    assert (found["states"][-2 * case.num_states :] == 0).all()
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_example_does_not_reach_its_neighbours(bad):
    case = make_case()
    expected = case.run()
    num_states, broken = case.num_states, 1
    case.rows["states"].data[broken * num_states : (broken + 1) * num_states] = bad
    out = case.run()
    active = case.segments.num_active.tolist()
    ranks = torch.cat([torch.arange(count) for count in active]).repeat_interleave(num_states)
    assert torch.equal(out[ranks != broken], expected[ranks != broken])
    assert out[ranks == broken].isnan().all()


def test_keeping_and_making_again_give_the_same_bits():
    case = make_case(33, 20, 1, dtype=torch.float32)
    kept, again = case.run(keep=True), case.run(keep=False)
    assert torch.equal(kept, again)
    kept, again = gradients(kept, case), gradients(again, case)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_the_kernel_is_for_float32_and_the_reference_for_the_rest(monkeypatch):
    calls = []
    from nsm_graph.ops.segment_loop import fused, reference

    for module in (fused, reference):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "segment_loop", lambda *given, name=name: calls.append(name))
    make_case(dtype=torch.float32).run(backend=None)
    make_case(dtype=torch.float64).run(backend=None)
    make_case(dtype=torch.float64).run()
    assert calls == ["fused", "reference", "fused"]


# Which gradients ###################################################################


@pytest.mark.parametrize("is_shared", [True, False], ids=["one", "apart"])
@keeps
def test_only_some_inputs_want_gradients(keep, is_shared):
    full = make_case(dtype=torch.float32, is_shared=is_shared)
    wanted = gradients(full.run(keep=keep), full)
    for name in full.given:
        case = full.detached(name)
        (found,) = gradients_of(case.run(keep=keep), case.given[name])
        assert torch.equal(found, wanted[name]), name


def gradients_of(out, *tensors, **options):
    direction = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
    return torch.autograd.grad((out * direction.to(out.dtype)).sum(), tensors, **options)


def test_nobody_wants_gradients():
    case = make_case(dtype=torch.float32)
    expected = case.run()
    assert expected.requires_grad
    out = case.detached().run()
    assert not out.requires_grad and torch.equal(out, expected)
    with torch.no_grad():
        out = case.run()
    assert not out.requires_grad and torch.equal(out, expected)


def test_without_gradients_nothing_is_kept():
    case = make_case(32, 64, 2, counts=[[8] * 100] * 4, dtype=torch.float32)
    num_bytes = 4 * case.rows["routed"].numel()

    def run():
        with torch.no_grad():
            case.run()

    run()
    peak = peak_mib(run)
    if peak is None:
        pytest.skip("this system does not tell")
    # The result itself, and what one step makes; a forward that keeps needs 15 times the result.
    assert peak * 2**20 < 4 * num_bytes


def test_a_graph_that_is_thrown_away_frees_what_it_kept():
    case = make_case(32, 64, 2, counts=[[8] * 100] * 4, dtype=torch.float32)
    num_bytes = 4 * case.rows["routed"].numel()
    case.run().sum().backward()

    def run():
        for _ in range(8):
            case.run()

    peak = peak_mib(run)
    if peak is None:
        pytest.skip("this system does not tell")
    assert peak * 2**20 < 3 * 20 * num_bytes


# What autograd may ask for #########################################################


@keeps
def test_a_second_backward_through_the_same_graph(keep):
    case = make_case()
    out = case.run(keep=keep)
    first = gradients_of(out, *case.given.values(), retain_graph=True)
    case.run().sum().backward()  # may take what the first one gave back
    second = gradients_of(out, *case.given.values(), retain_graph=True)
    third = gradients_of(out, *case.given.values())
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients_of(out, *case.given.values())


@keeps
def test_forwards_in_flight_share_no_memory(keep):
    cases = [make_case(seed=seed) for seed in range(3)]
    wanted = [gradients(case.run(keep=keep), case) for case in cases]
    outs = [case.run(keep=keep) for case in cases]
    for i in (1, 0, 2):
        found = gradients(outs[i], cases[i])
        assert all(torch.equal(found[name], wanted[i][name]) for name in found)


def test_results_stay_what_they_were():
    case, other = make_case(dtype=torch.float32), make_case(dtype=torch.float32, seed=1)
    out = case.run()
    found = gradients(out, case)
    before = [x.clone() for x in (out, *found.values())]
    gradients(other.run(), other)
    assert all(torch.equal(a, b) for a, b in zip((out, *found.values()), before, strict=True))


@pytest.mark.parametrize("name", [*ROWS, *LoopWeights._fields])
def test_an_input_changed_before_backward_is_noticed(name):
    case = make_case(is_shared=False)
    case = case.but(**{n: x * 1 for n, x in case.given.items()})
    out = case.run()
    case.given[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_states_changed_before_backward_are_noticed():
    out = make_case().run()
    loss = out.square().sum()
    with torch.no_grad():
        out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("is_shared", [True, False], ids=["one", "apart"])
def test_views_in_any_layout(is_shared):
    case = make_case(dtype=torch.float32, is_shared=is_shared)
    expected = case.run()
    wanted = gradients(expected, case)
    bases, views = {}, {}
    for name, x in case.given.items():
        if x.dim() == 2:  # columns of a wider matrix that stands on its side
            base = torch.full((2 * x.size(1), x.size(0)), math.nan)
            base[::2] = x.detach().T
            bases[name] = base.requires_grad_()
            views[name] = base[::2].T
        else:
            bases[name] = torch.stack([x.detach(), x.detach()], 1).requires_grad_()
            views[name] = bases[name][:, 1]
    case = case.but(**views)
    out = case.run()
    assert torch.equal(out, expected)
    found = gradients_of(out, *views.values())
    for name, grad in zip(views, found, strict=True):
        assert torch.equal(grad, wanted[name]), name
    # A direction that is no tensor of its own size in memory.
    turned = torch.ones(out.shape[::-1]).T
    out = case.run()
    pairs = [
        torch.autograd.grad(out, list(views.values()), direction, retain_graph=True)
        for direction in (turned, torch.ones(()).expand(out.shape), torch.ones(out.shape))
    ]
    for a, b, c in zip(*pairs, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("talks", [True, False], ids=["talk", "silent"])
@pytest.mark.parametrize("is_shared", [True, False], ids=["one", "apart"])
def test_first_and_second_derivatives(talks, is_shared):
    case = make_case(2, 4, 2, counts=[[2, 1], [1]], talks=talks, is_shared=is_shared)
    names = list(case.given)

    def function(*tensors):
        return case.but(**dict(zip(names, tensors, strict=True))).run()

    assert gradcheck(function, list(case.given.values()))
    assert gradgradcheck(function, list(case.given.values()))


@pytest.mark.parametrize("is_shared", [True, False], ids=["one", "apart"])
def test_second_derivatives_of_inputs_that_hang_together(is_shared):
    # Keys and routed sums made of states, a loss that is not linear.
    case = make_case(2, 4, 2, counts=[[2, 1], [1]], is_shared=is_shared)

    def entangled(run):
        states = case.rows["states"]
        changes = {
            "key": case.rows["key"] + states.mean(),
            "routed": case.rows["routed"] * states.square().mean(),
        }
        given = list(case.given.values())
        first = torch.autograd.grad(
            run(case.but(**changes)).square().sum(), given, create_graph=True
        )
        return torch.autograd.grad(sum(x.square().sum() for x in first), given)

    reference = entangled(lambda changed: changed.run(backend="reference"))
    for actual, expected, wanted in zip(
        entangled(Case.run), reference, entangled(oracle), strict=True
    ):
        torch.testing.assert_close(expected, wanted, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_gradgradcheck_where_keys_depend_on_states():
    case = make_case(2, 2, 1, counts=[[2, 1], [1]])

    def function(states, key):
        key = key + states.mean()
        return case.but(states=states, key=key, value=key).run()

    given = [case.rows["states"], case.rows["key"]]
    assert gradcheck(function, given)
    assert gradgradcheck(function, given)


@keeps
def test_no_result_depends_on_memory_that_was_never_written(poisoned_memory, keep):
    for talks in (True, False):
        for num_states, channels, heads in SIZES:
            case = make_case(num_states, channels, heads, talks=talks, dtype=torch.float32)
            out = case.run(keep=keep)
            assert out.isfinite().all()
            assert all(x.isfinite().all() for x in gradients(out, case).values())


# Threads ###########################################################################

#: More examples than threads, so that threads take turns, and rows that fill no tile.
CROWD = [[4, 3, 4, 1]] * 3 + [[4, 5, 2]] * 9 + [[2, 5]] * 7 + [[3]] * 4


@pytest.fixture
def num_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@keeps
@pytest.mark.parametrize(("num_states", "channels", "heads"), [(1, 3, 1), (5, 14, 2), (33, 32, 2)])
def test_any_number_of_threads_gives_the_same_states(
    num_states, channels, heads, keep, num_threads
):
    case = make_case(num_states, channels, heads, counts=CROWD, dtype=torch.float32)
    results = []
    for count in (1, 2, 3, 16, 100):
        num_threads(count)
        outs = [case.run(keep=keep) for _ in range(2)]
        grads = [gradients(out, case) for out in outs]
        assert torch.equal(*outs)
        assert all(torch.equal(grads[0][name], grads[1][name]) for name in case.given)
        results.append((outs[0], grads[0]))
    for out, found in results[1:]:
        assert torch.equal(out, results[0][0])
        wanted = results[0][1]
        for name in ("states", "routed", "key"):  # what belongs to an example
            assert torch.equal(found[name], wanted[name]), name
        # Sums over examples depend on which are added up first.
        sums = [[g[name].flatten().double() for name in g] for g in (found, wanted)]
        assert_close_to_norm(*(torch.cat(parts) for parts in sums), 1e-6)
        assert_close(found, wanted, 1e-5)


def test_another_number_of_threads_in_backward(num_threads):
    case = make_case(counts=CROWD)
    wanted = gradients(case.run(), case)
    for forward, backward in ((1, 3), (3, 1)):
        num_threads(forward)
        out = case.run()
        num_threads(backward)
        assert_close(gradients(out, case), wanted, 1e-10)


def test_many_python_threads_may_call_at_once(num_threads):
    cases = [make_case(counts=CROWD, seed=seed, dtype=torch.float32) for seed in range(4)]
    num_threads(2)

    def step(case):
        out = case.run()
        return [out, *gradients(out, case).values()]

    expected = [step(case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        calls = [(i % 4, pool.submit(step, cases[i % 4])) for i in range(64)]
        for i, call in calls:
            assert all(torch.equal(a, b) for a, b in zip(call.result(), expected[i], strict=True))


def test_python_threads_may_go_back_through_one_graph_at_once():
    case = make_case(counts=CROWD, dtype=torch.float32)
    given, noise = list(case.given.values()), make_case(counts=CROWD, dtype=torch.float32, seed=1)
    out = case.run()
    wanted = gradients_of(out, *given, retain_graph=True)
    wrong, start = [], threading.Barrier(4)

    def work(index):
        start.wait()
        for _ in range(10):
            if index == 0:  # takes what a backward gives back
                gradients(noise.run(), noise)
                continue
            found = gradients_of(out, *given, retain_graph=True)
            wrong.extend(a for a, b in zip(found, wanted, strict=True) if not torch.equal(a, b))

    with ThreadPoolExecutor(4) as pool:
        for call in [pool.submit(work, i) for i in range(4)]:
            call.result()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_gets_the_same(num_threads):
    case = make_case(counts=CROWD, dtype=torch.float32)
    num_threads(2)

    def step():
        # Our threads only: those that torch itself would start in a child never answer.
        out = case.run()
        return [out, *torch.autograd.grad(out, list(case.given.values()), torch.ones_like(out))]

    expected = step()  # its threads exist before the fork
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork
        child = os.fork()
    if child == 0:
        try:
            same = all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))
            os._exit(0 if same else 1)
        finally:  # whatever happened, the child must not go on with the tests
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Nothing to read, and arguments that do not fit ####################################


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_to_read(backend):
    case = make_case(counts=[], idle=2)
    out = case.run(backend=backend)
    assert out.shape == (0, 6)
    found = gradients(out, case)
    assert all((x == 0).all() for x in found.values())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_step_that_nobody_reads(backend):
    case = make_case(counts=[[2, 1], [3]])
    segments = case.segments
    longer = LoopSegments(segments.token_ptr, torch.cat([segments.num_active, torch.tensor([0])]))
    out = segment_loop(**case.rows, segments=longer, weights=case.weights, heads=2, backend=backend)
    torch.testing.assert_close(out, case.run(), rtol=1e-10, atol=1e-10)


def test_loops_of_other_sizes_follow_each_other():
    for num_states, channels, heads in (*SIZES, *SIZES[::-1]):
        case = make_case(num_states, channels, heads, dtype=torch.float32)
        assert_equals_the_oracle(case, 1e-5)


def arguments(**changes):
    """A call of two steps, three groups, seven tokens, that fits; all in float32."""
    case = make_case(3, 4, 2, counts=[[2, 3], [2]], idle=0, dtype=torch.float32, is_shared=False)
    given = {**case.rows, "segments": case.segments, "weights": case.weights, "heads": 2}
    weights = {name: changes.pop(name) for name in LoopWeights._fields if name in changes}
    parts = {name: changes.pop(name) for name in LoopSegments._fields if name in changes}
    given["weights"] = given["weights"]._replace(**weights)
    given["segments"] = given["segments"]._replace(**parts)
    return {**given, "backend": "cpu", **changes}


def test_the_arguments_fit():
    assert segment_loop(**arguments()).shape == (9, 4)
    silent = dict.fromkeys(LoopWeights._fields[8:])
    assert segment_loop(**arguments(**silent)).shape == (9, 4)


zeros, whole = torch.zeros, torch.tensor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "fast"}, "backend must be one of .*'cpu', 'reference'.* but is 'fast'"),
        ({"routed": zeros(9, 5)}, r"routed must have shape \(rows, 4\), but has \(9, 5\)"),
        ({"key": zeros(7)}, r"key must have shape \(rows, 4\), but has \(7,\)"),
        ({"value": zeros(7, 2, 2)}, r"value must have shape \(rows, 4\), but has \(7, 2, 2\)"),
        ({"states": zeros(2, 3, 4)}, r"states must have shape .* but has \(2, 3, 4\)"),
        ({"key": zeros(7, 4).double()}, "key is torch.float64 on cpu, but states .*float32 on cpu"),
        ({"value": zeros(7, 4, device="meta")}, "value is torch.float32 on meta, but .* on cpu"),
        ({"heads": 0}, "heads=0 must divide the 4 channels"),
        ({"heads": 3}, "heads=3 must divide the 4 channels"),
        ({"num_active": whole([2, 2])}, "adds up to 4 groups, but token_ptr has 3"),
        ({"num_active": whole([1, 2])}, "num_active must not grow"),
        ({"token_ptr": whole([0, 2, 4, 8])}, "token_ptr ends at 8, but key and value have 7 and 7"),
        ({"value": zeros(6, 4)}, "token_ptr ends at 7, but key and value have 7 and 6 rows"),
        ({"token_ptr": whole([0, 4, 4, 7])}, "every group needs at least one token"),
        ({"token_ptr": whole([0, 5, 4, 7])}, "every group needs at least one token"),
        ({"token_ptr": whole([1, 2, 4, 7])}, "token_ptr"),
        ({"routed": zeros(8, 4)}, "routed has 8 rows for 3 groups and states have 6"),
        ({"states": zeros(5, 4)}, "states have 5 for at least 2 examples"),
        ({"query": None}, r"weights\.query is missing"),
        ({"candidate_bias": None}, r"weights\.candidate_bias is missing"),
        ({"mix": None}, r"weights\.mix is missing"),
        ({"shift": None}, r"weights\.shift is missing"),
        ({"out": zeros(4, 5)}, r"weights\.out must have shape \(4, 4\) .* but has \(4, 5\)"),
        ({"gates": zeros(8, 4)}, r"weights\.gates must have shape \(8, 8\)"),
        ({"candidate": zeros(8, 8)}, r"weights\.candidate must have shape \(4, 8\)"),
        ({"qkv_bias": zeros(4)}, r"weights\.qkv_bias must have shape \(12,\)"),
        ({"qkv": None}, r"weights\.qkv is missing"),
        (
            {"scale": zeros(4).double()},
            r"weights\.scale must have shape \(4,\) in torch.float32.* in torch.float64",
        ),
        ({"out": zeros(4, 4, device="meta")}, r"weights\.out must have .* on cpu, .* on meta"),
    ],
)  # fmt: skip
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        segment_loop(**arguments(**changes))
