"""What a step of the loop keeps for backward: where it stands, and that it comes back."""

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from segment_loop_oracle import CROWD, RAGGED, SIZES, make_case, talking

from nsm_graph.ops.segment_loop import fused
from nsm_graph.ops.segment_loop.cpu import Made, history

MARK = 123.0


@numba.njit
def keep(kept, place, made, rows, tokens, num_states, heads, talk_heads):
    history.keep(kept, place, made, rows, tokens, num_states, heads, talk_heads)


@numba.njit
def recall(made, kept, place, before, rows, tokens, num_states, heads, talk_heads):
    history.recall(made, kept, place, before, rows, tokens, num_states, heads, talk_heads)


# Where steps stand #################################################################


@pytest.fixture
def runs(monkeypatch):
    """The calls of the kernel, in order."""
    found, forward = [], fused._Run.forward

    def watched(run):
        found.append(run)
        return forward(run)

    monkeypatch.setattr(fused._Run, "forward", watched)
    return found


@pytest.mark.parametrize("counts", [RAGGED, CROWD, [[1] * 7], [[70]]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@talking
@pytest.mark.parametrize(
    ("num_states", "channels", "heads"), [*SIZES, (3, 7, 7), (1, 1, 1), (7, 13, 1), (17, 33, 3)]
)
def test_every_step_begins_at_a_cache_line(
    num_states, channels, heads, talks, dtype, counts, num_threads, runs
):
    case = make_case(num_states, channels, heads, counts=counts, talks=talks, dtype=dtype)
    for count in (1, 3):
        num_threads(count)
        case.run()
        run = runs[-1]
        num_steps = len(case.segments.num_active)
        assert len(run.places) == len(run.chunks)
        found = []
        for chunks, places in zip(run.chunks, run.places, strict=True):
            assert places.shape == (len(chunks), num_steps)
            assert places.flags.c_contiguous
            assert (places % 16 == 0).all()
            for (first, end), row in zip(chunks, places, strict=True):
                for t, place in enumerate(row):
                    read = [c[t] for c in counts[first:end] if t < len(c)]
                    size = history.record_size(
                        len(read) * num_states, sum(read), channels, channels, num_states, heads,
                        heads * talks,
                    )  # fmt: skip
                    assert (size == 0) == (not read) and size % 16 == 0
                    found.append((int(place), size))
        # One after another, without a gap.
        found.sort(key=lambda record: (record[0], record[1] > 0))
        ends = [place + size for place, size in found]
        assert [place for place, _ in found] == [0, *ends[:-1]]
        assert run.kept_size == ends[-1]
        kept = run.kept
        assert kept.shape == (run.kept_size,) and kept.ctypes.data % 64 == 0


# There and back ####################################################################


def make_made(rows, tokens, channels, gated, num_states, heads, talk_heads, dtype, room):
    """What a step of so many rows makes, with room for more; the rest is NaN."""
    random = np.random.default_rng(0)
    talk_rows = rows if talk_heads > 0 else 0
    sizes = Made(
        x=(rows, 2 * channels + 2 * gated + 5), query=(rows, channels), attended=(rows, channels),
        weights=(tokens * heads * num_states,), gates=(rows, 3 * gated),
        qkv=(talk_rows, 3 * gated), talk=(talk_rows * talk_heads * num_states,),
        mixed=(talk_rows, gated), normal=(talk_rows, gated), inverse=(talk_rows,),
    )  # fmt: skip
    parts = []
    for size in sizes:
        more = room if size[0] > 0 else 0
        part = np.full((size[0] + more, *size[1:]), np.nan, dtype)
        part[: size[0]] = random.standard_normal(size)
        parts.append(part)
    made = Made(*parts)
    old, reset, mix, candidate = (
        made.x[:rows, :gated], made.gates[:rows, :gated],
        made.gates[:rows, gated : 2 * gated], made.gates[:rows, 2 * gated :],
    )  # fmt: skip
    # These two follow from the rest, in the order that the forward computes in.
    after = 2 * channels + gated
    made.x[:rows, 2 * channels : after] = reset * old
    made.x[:rows, after : after + gated] = old + mix * (candidate - old)
    made.x[:rows, after + gated :] = np.nan
    return made


@given(
    examples=st.integers(1, 3),
    tokens=st.integers(1, 9),
    num_states=st.integers(1, 9),
    width=st.integers(1, 17),
    heads=st.integers(1, 3),
    kept_channels=st.integers(0, 17),
    talk_heads=st.integers(0, 3),
    dtype=st.sampled_from([np.float32, np.float64]),
    before=st.integers(0, 3),
    room=st.sampled_from([0, 5]),
)
def test_what_is_kept_comes_back_and_nothing_else_is_written(
    examples, tokens, num_states, width, heads, kept_channels, talk_heads, dtype, before, room
):
    channels, rows, tokens = width * heads, examples * num_states, examples * tokens
    gated = max(1, channels - kept_channels)
    sizes = (channels, gated, num_states, heads, talk_heads)
    made = make_made(rows, tokens, *sizes, dtype, room)
    size, place = history.record_size(rows, tokens, *sizes), 16 * before
    kept = torch.full((place + size + 40,), MARK, dtype=getattr(torch, np.dtype(dtype).name))
    kept = kept.numpy()  # begun at a cache line
    keep(kept, place, made, rows, tokens, num_states, heads, talk_heads)
    assert (kept[:place] == MARK).all() and (kept[place + size :] == MARK).all()
    assert not np.isnan(kept).any()

    found = Made(*(np.full_like(part, np.nan) for part in made))
    # From outside, gated channels come last.
    states = np.roll(made.x[:rows, :channels], channels - gated, axis=1)
    recall(found, kept, place, states, rows, tokens, num_states, heads, talk_heads)
    for name, part, wanted in zip(Made._fields, found, made, strict=True):
        if name == "x":  # contraction may round the last column otherwise
            columns = 2 * channels + 2 * gated
            part, wanted = part[:, :columns], wanted[:, :columns]
            tolerance = 32 * np.finfo(dtype).eps
            np.testing.assert_allclose(part, wanted, rtol=tolerance, atol=tolerance)
            part, wanted = part[:, : 2 * channels], wanted[:, : 2 * channels]
        np.testing.assert_array_equal(part, wanted, err_msg=name)
