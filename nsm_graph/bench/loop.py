"""A training step of the documented machine beside hand-written ones and recurrent layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from nsm_graph.bench.documented import CHANNELS, HEADS, STATES, gradient, is_close, make_batch
from nsm_graph.bench.packages import make_packages
from nsm_graph.bench.plain import dense_loop, message_passing
from nsm_graph.bench.record import BenchRecord, interleaved_medians
from nsm_graph.models import NeuralStateMachine

EXAMPLES, LENGTH = 32, 1024
#: Tokens of a segment, and how many times faster than each peer the step should be.
TARGETS = {
    16: {"message passing": 6.0, "dense loop": 1.9, "LSTM": 1.7, "GRU": 2.3},
    64: {"LSTM": 4.5, "GRU": 6.0, "Transformer": 8.0},
}
#: Of the time that the step's products alone would take at the rate of a large one.
FRACTION = 0.8
#: With two threads, of the time with one.
TWO_THREADS = 1.7
#: Rows and columns of the product that measures the rate.
PRODUCT = 2048

Step = Callable[[], object]


def bench_loop(*, repetitions: int = 5, scale: float = 1.0) -> list[BenchRecord]:
    """Forward and backward on one thread, then ours on all threads, up to two, beside one.

    Layers get as many parameters as the machine, the same inputs and a loss of the same form.

    Args:
        repetitions: Timed turns of each.
        scale: Share of the length; less than 1 for a quick look.
    """
    records = []
    for segment, targets in TARGETS.items():
        length = max(round(LENGTH * scale / segment), 1) * segment
        records += _compare(length, segment, targets, repetitions)
    return records


def _compare(
    length: int, segment: int, targets: dict[str, float], repetitions: int
) -> list[BenchRecord]:
    machine = _make_machine(segment)
    x, batch = make_batch([length] * EXAMPLES)
    ours = partial(_step, machine, lambda: machine(x, batch))
    is_right = _is_right(machine, x, batch, None)
    peers = {name: PEERS[name](machine, x, batch) for name in targets}
    packages = make_packages(x.view(EXAMPLES, -1, CHANNELS), STATES, HEADS, segment)
    left, right = torch.randn(2, PRODUCT, PRODUCT)
    runs: dict[str, Step] = {"ours": ours, "product": lambda: left @ right}
    runs |= {name: step for name, (step, _) in peers.items()}
    runs |= {name: partial(_step, *package) for name, package in packages.items()}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    time = interleaved_medians(runs, repetitions)
    case = f"step B{EXAMPLES} L{length} N{STATES} C{CHANNELS} H{HEADS} S{segment}"
    records = [
        BenchRecord(case, name, time["ours"], time[name], is_right and is_same, targets[name])
        for name, (_, is_same) in peers.items()
    ]
    # Other models: nobody's target, and nothing to be equal to.
    records += [
        BenchRecord(
            case, name, time["ours"], time[name], is_right, 1.0,
            note=f"another model, {_count(package)} parameters beside our {_count(machine)}",
        )
        for name, (package, _) in packages.items()
    ]  # fmt: skip
    rate = 2 * PRODUCT**3 / time["product"]
    ideal = _flops(length, segment) / rate
    note = f"at the {rate / 1e6:.0f} GFLOP/s of a product of {PRODUCT} rows and columns"
    records.append(
        BenchRecord(case, "its products", time["ours"], ideal, is_right, FRACTION, note=note)
    )
    torch.set_num_threads(num_threads)  # records say how many there were
    if num_threads > 1:
        records.append(_two_threads(case, ours, is_right, repetitions))
    return records


def _two_threads(case: str, ours: Step, is_right: bool, repetitions: int) -> BenchRecord:
    before = torch.get_num_threads()

    def run(num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        ours()

    time = interleaved_medians({"two": partial(run, 2), "one": partial(run, 1)}, repetitions)
    torch.set_num_threads(2)
    record = BenchRecord(
        f"{case}, two threads", "one thread", time["two"], time["one"], is_right, TWO_THREADS
    )
    torch.set_num_threads(before)
    return record


# Machines and steps ################################################################


def _make_machine(segment: int) -> NeuralStateMachine:
    torch.manual_seed(0)
    return NeuralStateMachine(CHANNELS, CHANNELS, STATES, 10, segment_length=segment, heads=HEADS)


def _step(module: nn.Module, forward: Callable[[], Tensor]) -> Tensor:
    module.zero_grad()
    out = forward()
    out.square().mean().backward()
    return out.detach()


def _flops(length: int, segment: int) -> float:
    """Of the step's matrix products, backward twice forward; the embedding needs no input gradient.

    A row (a state in a step) meets 12 matrices of C x C in the cell and one for its routed sum; a
    token meets those of embedding, key and logits.
    """
    tokens = EXAMPLES * length
    rows = tokens // segment * STATES
    per_row = 13 * CHANNELS**2 + 2 * segment * CHANNELS + 2 * STATES * CHANNELS
    per_token = CHANNELS**2 + CHANNELS * HEADS * STATES + STATES * CHANNELS
    return 2.0 * (3 * (rows * per_row + tokens * per_token) + 2 * tokens * CHANNELS**2)


# Peers #############################################################################


def _is_right(
    machine: NeuralStateMachine, x: Tensor, batch: Tensor, peer: Callable[[Tensor], Tensor] | None
) -> bool:
    """Whether predictions and gradients are those of ``peer``, or of the loop step by step."""
    machine.cell.fuse = peer is not None
    out = _step(machine, lambda: machine(x, batch) if peer is None else peer(x))
    expected = out, gradient(machine).clone()
    machine.cell.fuse = True
    actual = _step(machine, lambda: machine(x, batch)), gradient(machine)
    return all(is_close(a, b, 1e-5) for a, b in zip(actual, expected, strict=True))


def _by_hand(
    form: Callable[[NeuralStateMachine, Tensor, int], Tensor],
    machine: NeuralStateMachine,
    x: Tensor,
    batch: Tensor,
) -> tuple[Step, bool]:
    """The same machine, with the same parameters."""
    run = partial(_step, machine, lambda: form(machine, x, EXAMPLES))
    return run, _is_right(machine, x, batch, lambda x: form(machine, x, EXAMPLES))


def _recurrent(
    kind: type[nn.LSTM] | type[nn.GRU], machine: NeuralStateMachine, x: Tensor, batch: Tensor
) -> tuple[Step, bool]:
    layer = _equal_parameters(lambda size: kind(CHANNELS, size, batch_first=True), machine)
    x_BTC = x.view(EXAMPLES, -1, CHANNELS)
    return partial(_step, layer, lambda: layer(x_BTC)[0]), True


def _transformer(machine: NeuralStateMachine, x: Tensor, batch: Tensor) -> tuple[Step, bool]:
    def make(size: int) -> nn.Module:
        layer = nn.TransformerEncoderLayer(CHANNELS, HEADS, size, batch_first=True, dropout=0.0)
        return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    layer = _equal_parameters(make, machine)
    x_BTC = x.view(EXAMPLES, -1, CHANNELS)
    return partial(_step, layer, lambda: layer(x_BTC)), True


def _equal_parameters(make: Callable[[int], nn.Module], machine: NeuralStateMachine) -> nn.Module:
    """A layer of the size that comes nearest."""
    wanted = _count(machine)
    return make(min(range(16, 512, 2), key=lambda size: abs(_count(make(size)) - wanted)))


def _count(module: nn.Module) -> int:
    """Its parameters."""
    return sum(p.numel() for p in module.parameters())


PEERS: dict[str, Callable[[NeuralStateMachine, Tensor, Tensor], tuple[Step, bool]]] = {
    "message passing": partial(_by_hand, message_passing),
    "dense loop": partial(_by_hand, dense_loop),
    "LSTM": partial(_recurrent, nn.LSTM),
    "GRU": partial(_recurrent, nn.GRU),
    "Transformer": _transformer,
}
