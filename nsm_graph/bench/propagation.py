"""Delta propagation beside computing all pages again, and beside torch's encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from nsm_graph import topology
from nsm_graph.bench.documented import is_close
from nsm_graph.bench.record import BenchRecord, interleaved_medians
from nsm_graph.mmsb import Propagation

CHANNELS, HEADS, PASSES = 256, 8, 4
#: Pages, how far back each listens, and how many neighbours change.
CHANGED = (10_000, 32, 100)
#: Tokens of a stream before the one that is timed.
STREAM = 2048
TARGET_CHANGED, TARGET_APPENDED = 10.0, 50.0


@torch.no_grad()
def bench_propagation(*, repetitions: int = 5, scale: float = 1.0) -> list[BenchRecord]:
    """A few changed pages of a window graph, and one page more behind a causal stream.

    Args:
        repetitions: Timed turns of each.
        scale: Share of the pages; less than 1 for a quick look.
    """
    return [_changed(repetitions, scale), *_appended(repetitions, scale)]


def _changed(repetitions: int, scale: float) -> BenchRecord:
    num_pages, width, num_changed = CHANGED
    num_pages, num_changed = int(num_pages * scale), max(int(num_changed * scale), 1)
    stack = _stack(shadow_graph=topology.window(width))
    pages, rows = _pages(num_pages), slice(num_pages // 2, num_pages // 2 + num_changed)
    # Two states of the pages take turns, so that every call finds its rows changed.
    versions = [pages, pages.clone()]
    versions[1][rows] = _pages(num_changed, seed=1)
    stack.run(versions[0], cache=True)
    turn = count(1)

    def update() -> Tensor:
        return stack.update(versions[next(turn) % 2], rows)

    is_right = all(
        is_close(stack.update(version, rows), stack(version), 1e-6) for version in versions
    )
    time = interleaved_medians({"ours": update, "all": partial(stack, versions[1])}, repetitions)
    return BenchRecord(
        f"update: {num_changed} neighbours of {num_pages} pages changed, window({width})",
        "recomputation", time["ours"], time["all"], is_right, TARGET_CHANGED, note=_sizes(),
    )  # fmt: skip


def _appended(repetitions: int, scale: float) -> list[BenchRecord]:
    """A stream that grows by two pages at every turn; its peers read the first of them as well.

    The second is timed: in a stream the page before has just passed, while here a peer may have
    pushed keys, values and weights out of the processor's caches.
    """
    length = int(STREAM * scale)
    encoder = _encoder()
    stack = Propagation.from_torch(encoder, is_causal=True).eval()
    pages = _pages(length + 2 * (repetitions + 1) + 1)
    streams = {name: _Stream(stack, pages, length) for name in ("append", "update")}
    whole = pages[: length + 1]
    # The first turn of each finds no room behind the last page and doubles the buffers.
    first = [streams["append"].append(), streams["update"].update()[-1:]]
    expected = stack(whole)
    is_right = all(is_close(page, expected[-1:], 1e-6) for page in first)
    runs: dict[str, Callable[[], object]] = {
        "append": streams["append"].append,
        "update": streams["update"].update,
        "all": partial(stack, whole),
        "encoder, 0": partial(_causal, encoder, whole, has_fast_path=False),
        "encoder, 1": partial(_causal, encoder, whole, has_fast_path=True),
    }
    is_equal = all(
        is_close(_causal(encoder, whole, has_fast_path=fast), expected, 1e-5)
        for fast in (False, True)
    )
    time = interleaved_medians(runs, repetitions, untimed=1)
    time["encoder"] = min(time["encoder, 0"], time["encoder, 1"])
    texts = {"append": "the page alone", "update": "all pages handed over"}
    return [
        BenchRecord(
            f"one page behind {length}, causal(): {texts[way]}", peer, time[way], time[name],
            is_right and (name == "all" or is_equal), TARGET_APPENDED, note=_sizes(),
        )
        for way, name, peer in (
            ("append", "all", "recomputation"),
            ("append", "encoder", "TransformerEncoder"),
            ("update", "all", "recomputation"),
        )
    ]  # fmt: skip


class _Stream:
    """A cache of its own that grows by a page at every call."""

    def __init__(self, stack: Propagation, pages: Tensor, length: int) -> None:
        self.stack, self.pages, self.length = stack, pages, length
        self.cache = stack.run(pages[:length], cache=True).cache

    def append(self) -> Tensor:
        self.length += 1
        return self.stack.append(self.pages[self.length - 1 : self.length], cache=self.cache)

    def update(self) -> Tensor:
        self.length += 1
        return self.stack.update(self.pages[: self.length], [], cache=self.cache)


def _stack(**options: Any) -> Propagation:
    torch.manual_seed(0)
    return Propagation(CHANNELS, PASSES, HEADS, **options).eval()


def _encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(CHANNELS, HEADS, 4 * CHANNELS, batch_first=True)
    return nn.TransformerEncoder(layer, PASSES, enable_nested_tensor=False).eval()


def _causal(encoder: nn.TransformerEncoder, pages: Tensor, *, has_fast_path: bool) -> Tensor:
    """Whichever of torch's two ways through an encoder is faster counts as the peer."""
    mask = nn.Transformer.generate_square_subsequent_mask(pages.size(0))
    with _fast_path(has_fast_path):
        return encoder(pages.unsqueeze(0), mask, is_causal=True).squeeze(0)


@contextmanager
def _fast_path(is_enabled: bool) -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(is_enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _pages(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, CHANNELS, generator=torch.Generator().manual_seed(seed))


def _sizes() -> str:
    return f"{PASSES} passes, {CHANNELS} channels, {HEADS} heads"
