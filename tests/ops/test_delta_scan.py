"""The delta scan: both forms against an oracle that builds every token's matrix."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from nsm_graph.ops.delta_scan import BACKENDS, DeltaSteps, delta_scan, prepare
from nsm_graph.testing import assert_close_to_norm

OPTIONS = list(itertools.product(*[[False, True]] * 3, [None, "query", "weight"]))
# Tokens, corrections a token, heads, rows and columns of the memory: fewer rows than a chunk has
# corrections (the chunk is one matrix) and more (it stays two factors).
SHAPES = [
    (0, 2, 1, 3, 2),
    (1, 4, 2, 3, 2),
    (15, 1, 1, 20, 3),
    (15, 2, 3, 4, 1),
    (16, 3, 1, 2, 3),
    (17, 2, 2, 5, 2),
    (33, 1, 1, 40, 2),
    (33, 4, 2, 3, 3),
    (64, 1, 1, 4, 5),
]


def draw(shape, value, decay, write, read, *, gate=False, seed=0, dtype=torch.double):
    """A memory, steps and what is read, as leaves."""
    tokens, corrections, heads, rows, columns = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(2, *size, generator=generator, dtype=torch.double)

    def uniform(*size):
        return torch.rand(2, *size, generator=generator, dtype=torch.double)

    key = torch.nn.functional.normalize(normal(tokens, heads, corrections, rows), dim=-1)
    beta = 2 * uniform(tokens, heads, corrections)
    beta[:, 3::7] = 0.0
    beta[:, 4::7] = 2.0
    alpha = uniform(tokens, heads)
    alpha[:, 1::5] = 1.0
    alpha[:, 9::13] = 0.0
    given = {
        "memory": normal(heads, rows, columns),
        "key_BSHRP": key,
        "beta_BSHR": beta,
        "value_BSHRQ": normal(tokens, heads, corrections, columns) if value else None,
        "decay_BSH": alpha if decay else None,
        "row_BSHP": normal(tokens, heads, rows) / rows**0.5 if write else None,
        "column_BSQ": normal(tokens, columns) if write else None,
        "gate_BSQ": uniform(tokens, columns) if gate else None,
        "query": normal(tokens, heads, rows) / rows**0.5 if read == "query" else None,
        "weight": normal(tokens, columns) / columns**0.5 if read == "weight" else None,
    }
    return {n: t.to(dtype).requires_grad_() for n, t in given.items() if t is not None}


def scan(given, backend):
    given = dict(given)
    memory, query, weight = (given.pop(n, None) for n in ("memory", "query", "weight"))
    return delta_scan(memory, DeltaSteps(**given), query=query, weight=weight, backend=backend)


def oracle(given):
    """Z <- (I - beta k k^T) Z + beta k v^T, where gated only a share of it in each column."""
    memory, get = given["memory"], given.get
    key, beta = given["key_BSHRP"], given["beta_BSHR"]
    eye = torch.eye(memory.size(2), dtype=memory.dtype)
    reads = []
    for i in range(key.size(1)):
        for r in range(key.size(3)):
            k = key[:, i, :, r].unsqueeze(-1)
            step = beta[:, i, :, r, None, None]
            change = (eye - step * k @ k.mT) @ memory - memory
            if get("value_BSHRQ") is not None:
                change = change + step * k @ get("value_BSHRQ")[:, i, :, r].unsqueeze(-2)
            if get("gate_BSQ") is not None:
                change = change @ torch.diag_embed(get("gate_BSQ")[:, i]).unsqueeze(1)
            memory = memory + change
        if get("decay_BSH") is not None:
            memory = get("decay_BSH")[:, i, :, None, None] * memory
        if get("row_BSHP") is not None:
            column = get("column_BSQ")[:, i, None, None, :]
            memory = memory + get("row_BSHP")[:, i].unsqueeze(-1) @ column
        if get("query") is not None:
            reads.append((get("query")[:, i].unsqueeze(-2) @ memory).squeeze(-2))
        if get("weight") is not None:
            reads.append((memory @ get("weight")[:, i, None, :, None]).squeeze(-1))
    return memory, torch.stack(reads, 1) if reads else None


def incoming(out):
    """A gradient in which no entry is like another."""
    return torch.cos(torch.arange(out.numel(), dtype=torch.double) + 0.3).view(out.shape).to(out)


def gradients(outs, given, **options):
    outs = [out for out in outs if out is not None]
    total = sum((out * incoming(out)).sum() for out in outs)
    grads = torch.autograd.grad(total, list(given.values()), allow_unused=True, **options)
    return dict(zip(given, grads, strict=True))


def assert_same(given, actual, expected, wanted, tolerance):
    """Results relative to the norm of the incoming memory, gradients to their own.

    A gradient that decays to almost nothing on its way back has the precision of what came in, as
    the memory has on its way forward.
    """
    bound = tolerance * given["memory"].norm()
    scale = 0.0
    for out, exact in zip(actual, expected, strict=True):
        assert (out is None) == (exact is None)
        if out is not None:
            assert out.dtype == given["memory"].dtype
            assert out.shape == exact.shape
            error = (out - exact).flatten(2) if out is actual[1] else (out - exact).flatten()
            # Reads: each token by itself.
            error = error.norm() if out is actual[0] else error.norm(dim=(0, 2)).max()
            assert error <= bound
            scale += incoming(out).norm()
    for name, grad in gradients(actual, given).items():
        if wanted[name] is None:
            assert grad is None or (grad == 0).all()
        else:
            error = (grad - wanted[name]).norm()
            assert error <= tolerance * max(wanted[name].norm(), scale), name


def check(given, backend, tolerance):
    """A form against the oracle, which computes in double precision."""
    exact = {n: t.detach().double().requires_grad_() for n, t in given.items()}
    expected = oracle(exact)
    wanted = gradients(expected, exact)
    assert_same(given, scan(given, backend), expected, wanted, tolerance)


# Both forms are the definition #################################################


@pytest.mark.parametrize(("value", "decay", "write", "read"), OPTIONS)
def test_both_equal_the_oracle_and_each_other_with_every_gradient(value, decay, write, read):
    for shape in SHAPES[1:]:
        given = draw(shape, value, decay, write, read)
        expected = oracle(given)
        wanted = gradients(expected, given)
        reference = scan(given, "reference")
        assert_same(given, reference, expected, wanted, 1e-10)
        assert_same(given, scan(given, "chunked"), expected, wanted, 1e-10)


@pytest.mark.parametrize(("value", "decay", "write", "read"), OPTIONS)
def test_chunked_equals_reference_in_single_precision(value, decay, write, read):
    for shape in SHAPES[1:]:
        given = draw(shape, value, decay, write, read, dtype=torch.float, seed=1)
        reference = scan(given, "reference")
        wanted = gradients(reference, given)
        assert_same(given, scan(given, "chunked"), reference, wanted, 1e-5)


@settings(max_examples=30)
@given(
    shape=st.tuples(
        st.integers(1, 40),
        st.integers(1, 4),
        st.integers(1, 3),
        st.integers(1, 12),
        st.integers(1, 4),
    ),
    options=st.sampled_from(OPTIONS),
    seed=st.integers(0, 999),
)
def test_any_shape(shape, options, seed):
    given_ = draw(shape, *options, seed=seed)
    for backend in BACKENDS:
        check(given_, backend, 1e-10)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1], (True, False, False, "query")])
@pytest.mark.parametrize("tokens", [64, 150, 256])
def test_long_segments_keep_their_digits_in_single_precision(tokens, options):
    check(draw((tokens, 4, 1, 8, 3), *options, dtype=torch.float, seed=2), "chunked", 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_reflections_keep_the_norm(backend):
    given = draw((250, 4, 2, 8, 3), False, False, False, None, dtype=torch.float)
    given["beta_BSHR"] = torch.full_like(given["beta_BSHR"], 2.0)
    before, (after, _) = given["memory"], scan(given, backend)
    torch.testing.assert_close(after.norm(dim=2), before.norm(dim=2), rtol=1e-5, atol=0)
    assert (after - before).norm() > 0.1 * before.norm()


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize("read", ["query", "weight", None])
def test_no_tokens_change_nothing(read, backend):
    given = draw(SHAPES[0], True, True, True, read)
    memory, reads = scan(given, backend)
    assert torch.equal(memory, given["memory"])
    if read is None:
        assert reads is None
    else:
        assert reads.shape == (2, 0, 1, 2 if read == "query" else 3)


@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_no_examples(backend):
    given = {n: t[:0] for n, t in draw((5, 2, 1, 3, 2), True, True, True, "query").items()}
    memory, reads = scan(given, backend)
    assert memory.shape == (0, 1, 3, 2)
    assert reads.shape == (0, 5, 1, 2)


def test_none_takes_the_chunked_form_unless_steps_are_gated():
    given = draw((20, 2, 1, 3, 2), True, True, True, "query", dtype=torch.float)
    for a, b in zip(scan(given, None), scan(given, "chunked"), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(scan(given, None)[0], scan(given, "reference")[0])
    given = draw((20, 2, 1, 3, 2), True, True, True, "query", gate=True, dtype=torch.float)
    for a, b in zip(scan(given, None), scan(given, "reference"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_read_sees_its_own_token_and_none_that_follow(backend):
    for read in ("query", "weight"):
        given = draw((40, 2, 1, 4, 3), True, True, True, read)
        _, reads = scan(given, backend)
        for i in (0, 15, 16, 39):
            (grad,) = torch.autograd.grad(
                reads[:, i].square().sum(), given["value_BSHRQ"], retain_graph=True
            )
            reached = grad.abs().sum((0, 2, 3, 4)) > 0
            assert not reached[i + 1 :].any()
            assert reached[i] == (given["beta_BSHR"][0, i, 0, 0] > 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_reflection_by_hand(backend):
    key = torch.tensor([0.6, 0.8]).view(1, 1, 1, 1, 2)
    steps = DeltaSteps(key, torch.full((1, 1, 1, 1), 2.0))
    memory, _ = delta_scan(torch.tensor([[[[0.6, -0.8], [0.8, 0.6]]]]), steps, backend=backend)
    torch.testing.assert_close(memory, torch.tensor([[[[-0.6, -0.8], [-0.8, 0.6]]]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_that_was_written_is_read_back(backend):
    key = torch.eye(4).view(1, 4, 1, 1, 4)
    value = torch.randn(1, 4, 1, 1, 3)
    steps = DeltaSteps(key, torch.ones(1, 4, 1, 1), value)
    memory, reads = delta_scan(
        torch.randn(1, 1, 4, 3), steps, query=key[:, :, :, 0], backend=backend
    )
    torch.testing.assert_close(memory[0, 0], value[0, :, 0, 0])
    torch.testing.assert_close(reads[:, :, 0], value[:, :, 0, 0])


# Steps without effect ###########################################################


def mask_of(tokens):
    real = torch.rand(2, tokens, generator=torch.Generator().manual_seed(3)) < 0.6
    real[1, -5:] = False
    return real


def junk(given, real):
    """Other numbers where nothing is real."""
    out = {}
    for name, tensor in given.items():
        tensor = tensor.detach().clone()
        if name != "memory":
            noise = torch.rand_like(tensor)
            tensor[~real] = noise[~real]
        out[name] = tensor
    return out


def masked(given, real, backend):
    given = dict(given)
    memory, query, weight = (given.pop(n, None) for n in ("memory", "query", "weight"))
    steps = DeltaSteps(**given).only(real)
    return delta_scan(memory, steps, query=query, weight=weight, backend=backend)


@pytest.mark.parametrize(("value", "decay", "write", "read"), OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stands_in_steps_that_are_not_real_makes_no_bit_of_difference(
    backend, value, decay, write, read
):
    given = draw((40, 2, 2, 3, 2), value, decay, write, read, dtype=torch.float)
    real = mask_of(40)
    memory, reads = masked(given, real, backend)
    other, other_reads = masked(junk(given, real), real, backend)
    assert torch.equal(memory, other)
    assert read is None or torch.equal(reads[real], other_reads[real])


@pytest.mark.parametrize(("value", "decay", "write", "read"), OPTIONS)
def test_steps_that_are_not_real_are_as_if_left_out(value, decay, write, read):
    given = draw((40, 2, 2, 3, 2), value, decay, write, read, dtype=torch.float)
    real = mask_of(40)
    memory, reads = masked(given, real, "reference")
    chunked, _ = masked(given, real, "chunked")
    for b in range(2):
        short = {
            n: t[b : b + 1] if n == "memory" else t[b : b + 1, real[b]] for n, t in given.items()
        }
        alone, alone_reads = scan(short, "reference")
        assert torch.equal(memory[b : b + 1], alone)
        assert read is None or torch.equal(reads[b, real[b]], alone_reads[0])
        assert (chunked[b : b + 1] - alone).norm() <= 1e-5 * given["memory"][b].norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("value", "decay", "write", "read"), OPTIONS[::3])
def test_padding_changes_no_bit_of_the_memory(value, decay, write, read, backend):
    given = draw((32, 2, 2, 3, 2), value, decay, write, read, dtype=torch.float)
    memory = given.pop("memory")
    steps = DeltaSteps(**given)
    padded = steps.pad(50)
    assert padded.num_tokens == 50
    assert steps.pad(32) is steps
    for name, tensor in padded._asdict().items():
        if tensor is not None:
            assert torch.equal(tensor[:, :32], getattr(steps, name))
            assert (tensor[:, 32:] == (1.0 if name == "decay_BSH" else 0.0)).all()
    after, _ = delta_scan(memory, steps, backend=backend)
    assert torch.equal(delta_scan(memory, padded, backend=backend)[0], after)


def test_only_without_a_mask_changes_nothing():
    steps = DeltaSteps(torch.ones(1, 2, 1, 1, 1), torch.ones(1, 2, 1, 1))
    assert steps.only(None) is steps


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_steps_leave_the_memory_bit_for_bit(backend):
    given = draw((40, 2, 2, 3, 2), True, False, False, None, dtype=torch.float)
    given["beta_BSHR"] = torch.zeros_like(given["beta_BSHR"])
    assert torch.equal(scan(given, backend)[0], given["memory"])


def test_one_closed_step_among_others_leaves_the_memory_bit_for_bit():
    given = draw((9, 2, 2, 3, 2), True, True, True, None, dtype=torch.float)
    steps = {n: t.detach().clone() for n, t in given.items() if n != "memory"}
    steps["beta_BSHR"][:, 4] = 0.0
    steps["decay_BSH"][:, 4] = 1.0
    steps["row_BSHP"][:, 4] = 0.0
    memory = given["memory"].detach()
    before = {n: t[:, :4] for n, t in steps.items()}
    upto = {n: t[:, :5] for n, t in steps.items()}
    after = scan({"memory": memory} | upto, "reference")[0]
    assert torch.equal(after, scan({"memory": memory} | before, "reference")[0])
    assert not torch.equal(after, memory)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_of_norm_zero_is_the_identity_with_finite_gradients(backend):
    given = draw((20, 2, 1, 3, 2), True, False, False, "query")
    with torch.no_grad():
        given["key_BSHRP"].zero_()
    memory, reads = scan(given, backend)
    assert torch.equal(memory, given["memory"])
    expected = torch.einsum("bshp,bhpq->bshq", given["query"], given["memory"])
    torch.testing.assert_close(reads, expected)
    for grad in gradients((memory, reads), given).values():
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decay_of_zero_forgets_everything_before(backend):
    given = draw((20, 1, 1, 3, 2), True, True, True, None)
    with torch.no_grad():
        given["decay_BSH"][:, 10] = 0.0
    memory, _ = scan(given, backend)
    grads = gradients((memory, None), given)
    assert (grads["memory"] == 0).all()
    assert (grads["value_BSHRQ"][:, :11] == 0).all()
    assert (grads["row_BSHP"][:, :10] == 0).all()
    assert (grads["row_BSHP"][:, 10] != 0).any()
    assert grads["decay_BSH"][:, 10].abs().sum() > 0


# Gated steps ####################################################################


@pytest.mark.parametrize(("value", "decay", "write", "read"), OPTIONS)
def test_gated_steps_equal_the_oracle(value, decay, write, read):
    for shape in ((1, 1, 2, 3, 2), (9, 2, 2, 4, 3)):
        check(draw(shape, value, decay, write, read, gate=True), "reference", 1e-10)
        check(draw(shape, value, decay, write, read, gate=True, dtype=torch.float), None, 1e-5)


def test_the_chunked_form_refuses_gated_steps():
    given = draw((9, 2, 2, 4, 3), True, False, False, None, gate=True)
    with pytest.raises(ValueError, match=r"gated steps .* do not compose .*backend=\"reference\""):
        scan(given, "chunked")


# Derivatives ####################################################################


@pytest.mark.parametrize("order", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("read", ["query", "weight"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_to_second_order(backend, read, order):
    given = draw((3, 2, 1, 2, 2), True, True, True, read)
    names = list(given)
    # Three tokens in chunks of sixteen are one chunk; the composition of chunks is linear algebra
    # that autograd knows.
    assert order(
        lambda *leaves: scan(dict(zip(names, leaves, strict=True)), backend), [*given.values()]
    )


def test_second_derivatives_through_several_chunks():
    given = draw((18, 2, 1, 2, 1), False, True, False, None)

    def rate(backend):
        grad = gradients(scan(given, backend), given, create_graph=True)["memory"]
        return torch.autograd.grad(grad.square().sum(), [given["beta_BSHR"], given["key_BSHRP"]])

    for a, b in zip(rate("chunked"), rate("reference"), strict=True):
        assert_close_to_norm(a, b, 1e-10)


# What is refused ################################################################


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("memory", (2, 3, 2), r"expected memory \(B, H, P, Q\) and keys .* got \(2, 3, 2\)"),
        (
            "key_BSHRP",
            (2, 5, 2, 3),
            r"expected memory .* and keys \(B, S, H, R, P\).*\(2, 5, 2, 3\)",
        ),
        ("key_BSHRP", (2, 5, 2, 0, 3), r"needs at least one correction"),
        (
            "key_BSHRP",
            (2, 5, 2, 1, 4),
            r"key must have shape \(2, 5, 2, 1, 3\) .*\(2, 5, 2, 1, 4\)",
        ),
        ("beta_BSHR", (2, 5, 1, 1), r"beta must have shape \(2, 5, 2, 1\) .*\(2, 5, 1, 1\)"),
        ("value_BSHRQ", (2, 5, 2, 1, 3), r"value must have shape \(2, 5, 2, 1, 2\)"),
        ("decay_BSH", (2, 5), r"decay must have shape \(2, 5, 2\)"),
        ("row_BSHP", (2, 4, 2, 3), r"row must have shape \(2, 5, 2, 3\)"),
        ("column_BSQ", (2, 5, 3), r"column must have shape \(2, 5, 2\)"),
        ("gate_BSQ", (1, 5, 2), r"gate must have shape \(2, 5, 2\)"),
        ("query", (2, 5, 2, 2), r"query must have shape \(2, 5, 2, 3\)"),
        ("weight", (2, 5, 3), r"weight must have shape \(2, 5, 2\)"),
    ],
)
def test_a_wrong_shape_is_named(name, shape, message):
    given = draw((5, 1, 2, 3, 2), True, True, True, "weight" if name == "weight" else "query")
    with pytest.raises(ValueError, match=message):
        scan(given | {name: torch.zeros(shape, dtype=torch.double)}, None)


@pytest.mark.parametrize(
    "name", ["key_BSHRP", "beta_BSHR", "value_BSHRQ", "decay_BSH", "column_BSQ", "query"]
)
def test_a_wrong_dtype_is_named(name):
    given = draw((5, 1, 2, 3, 2), True, True, True, "query")
    message = (
        rf"{name.partition('_')[0]} is torch.float32 on cpu, but memory is torch.float64 on cpu"
    )
    with pytest.raises(ValueError, match=message):
        scan(given | {name: given[name].float()}, None)


def test_a_wrong_device_is_named():
    given = draw((5, 1, 2, 3, 2), True, False, False, None)
    with pytest.raises(ValueError, match=r"beta is .* on meta, but memory is .* on cpu; move one"):
        scan(given | {"beta_BSHR": given["beta_BSHR"].to("meta")}, None)


@pytest.mark.parametrize("missing", ["row_BSHP", "column_BSQ"])
def test_half_a_write_is_refused(missing):
    given = draw((5, 1, 2, 3, 2), True, True, True, None)
    del given[missing]
    with pytest.raises(ValueError, match="a write is row times column; pass both or none"):
        scan(given, None)


def test_two_reads_are_refused():
    given = draw((5, 1, 2, 3, 2), False, False, False, "query")
    given["weight"] = torch.zeros(2, 5, 2, dtype=torch.double)
    with pytest.raises(ValueError, match="query reads rows and weight reads columns; pass one"):
        scan(given, None)


@pytest.mark.parametrize("tokens", [0, 5])
def test_an_unknown_backend_is_refused(tokens):
    given = draw((tokens, 1, 2, 3, 2), False, False, False, None)
    message = r"backend of delta_scan must be one of \('reference', 'chunked'\) or None.*'triton'"
    with pytest.raises(ValueError, match=message):
        scan(given, "triton")
    memory = given.pop("memory")
    assert memory is not None
    with pytest.raises(ValueError, match=message):
        prepare(DeltaSteps(**given), backend="triton")
