"""What benchmarks of length, lengths, streams and imports check, and how they count."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nsm_graph import NeuralStateMachine
from nsm_graph.bench import (
    bench_imports,
    bench_ragged,
    bench_scaling,
    bench_streaming,
    checkpointing,
    documented,
    growth,
    imports,
    ragged,
    record,
    scaling,
)
from nsm_graph.bench.growth import Size, cost_by_table, cost_of_products

needs_peak = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of memory"
)

#: Each measures whole machines, some in new processes.
pytestmark = pytest.mark.slow


def assert_timed(records):
    for found in records:
        assert found.correct and found.ours_ms > 0 and found.peer_ms > 0
        json.dumps(found.to_dict())


# Length, size, checkpoints #########################################################


@needs_peak
def test_length_is_checked_and_measured(monkeypatch):
    monkeypatch.setattr(scaling, "AS_MANY_EXAMPLES", {1024: 2, 4096: 2})
    monkeypatch.setattr(scaling, "AS_MANY_TOKENS", {1024: 4, 4096: 1})
    monkeypatch.setattr(checkpointing, "EXAMPLES", 2)
    monkeypatch.setattr(growth, "EXAMPLES", 2)
    records = bench_scaling(repetitions=1, scale=1 / 16)
    assert_timed(records)
    lengths = records[:4]
    assert [found.peer for found in lengths] == ["B2 L64", "B2 L64", "B4 L64", "B4 L64"]
    assert [found.measure for found in lengths] == ["ms", "mib"] * 2
    assert all(found.target == 1 / 1.1 and found.ours_mib is not None for found in lengths)
    grown, checkpoints = records[4:12], records[12:]
    assert [found.peer for found in grown] == ["source's table", "every product"] * 4
    assert grown[0].case == "step, tokens 64 -> 128"
    assert [found.measure for found in checkpoints] == ["ms", "mib", "mib"] * 2
    assert checkpoints[0].case == "4 segments, checkpoints, one kernel: time"
    assert [found.target for found in checkpoints] == [1 / 1.4, 1.0, 4.0] * 2


def test_a_growth_is_predicted_from_the_step_before():
    time = {"once": 10.0, "channels": 20.0}
    once = Size(tokens=64)
    found = growth._record(
        "channels", "source's table", once, replace(once, channels=128), time, True
    )
    exponent = math.log2(found.peer_ms / 10.0)
    assert f"measured 1.00, predicted {exponent:.2f}; the table leaves out" in found.note
    assert 1 < exponent < 2 and found.ratio == found.peer_ms / 20.0


def exponent(cost, name):
    once = Size(tokens=1024)
    return math.log2(cost(replace(once, **{name: 2 * getattr(once, name)})) / cost(once))


def test_what_the_predictions_say():
    assert exponent(cost_by_table, "tokens") == exponent(cost_of_products, "tokens") == 1
    assert exponent(cost_by_table, "heads") == 0  # heads share the channels
    assert exponent(cost_of_products, "heads") > 0  # but every router head has logits of its own
    assert 1 < exponent(cost_by_table, "states") < 2
    assert exponent(cost_of_products, "channels") > exponent(cost_by_table, "channels")


@pytest.mark.parametrize(
    "size", [Size(32), Size(64, states=8), Size(32, heads=2), Size(32, channels=32)]
)
def test_every_product_is_counted(size):
    machine = documented.make_machine(size.channels, size.states, size.heads)
    machine.cell.fuse = False
    x, batch = documented.make_batch([size.tokens], size.channels)
    # The counter knows the parts of attention, not the fused operation of a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        machine(x, batch)
    head = size.channels * documented.CLASSES
    assert counter.get_total_flops() == 2 * (cost_of_products(size) + head)


def test_a_kernel_with_other_results_is_noticed(monkeypatch):
    assert documented.agrees(documented.make_machine())
    forward = NeuralStateMachine.forward

    def another(self, *args):
        return forward(self, *args) * (1.001 if self.cell.fuse else 1.0)

    monkeypatch.setattr(NeuralStateMachine, "forward", another)
    assert not documented.agrees(documented.make_machine())


def test_checkpoints_with_other_gradients_are_noticed(monkeypatch):
    forward = NeuralStateMachine.forward

    def another(self, *args):
        return forward(self, *args) * (1.001 if self.checkpoint_segments else 1.0)

    monkeypatch.setattr(NeuralStateMachine, "forward", another)
    monkeypatch.setattr(checkpointing, "EXAMPLES", 2)
    records = checkpointing.bench_checkpointing(repetitions=1, scale=1 / 16)
    assert not any(found.correct for found in records)


# Ragged batches ####################################################################


def test_ragged_batches_are_checked_and_timed(monkeypatch):
    monkeypatch.setattr(ragged, "EXAMPLES", 5)
    records = bench_ragged(repetitions=1, scale=1 / 16)
    assert_timed(records)
    assert [found.case.split(",")[0] for found in records] == ["B5 L4-64", "B5 L4-64"]
    # 4, 8, 16, 32, 64 tokens; and 4, 19, 34, 49, 64.
    assert [found.note.split(" tokens")[0] for found in records] == ["124", "170"]
    assert all("instead of 320" in found.note and found.target == 2 for found in records)


def test_padding_stands_behind_each_example():
    x, batch = ragged._pad(torch.ones(3, documented.CHANNELS), [1, 2])
    assert batch.tolist() == [0, 0, 1, 1]
    assert x[:, 0].tolist() == [1, 0, 1, 1]


def test_examples_that_disturb_each_other_are_noticed(monkeypatch):
    forward = NeuralStateMachine.forward

    def another(self, *args):
        out = forward(self, *args)
        return out + 0.001 * out.sum(0)

    monkeypatch.setattr(NeuralStateMachine, "forward", another)
    monkeypatch.setattr(ragged, "EXAMPLES", 3)
    assert not any(found.correct for found in bench_ragged(repetitions=1, scale=1 / 16))


# Streams ###########################################################################


def test_streams_are_checked_and_timed():
    records = bench_streaming(repetitions=1, scale=0.03)
    assert_timed(records)
    assert [found.measure for found in records] == ["ms", "mib"]
    assert all(found.case.startswith("stream of 30000 tokens") for found in records)
    assert [found.target for found in records] == [1 / 1.05, 0.99]


def test_a_stream_that_forgets_is_noticed(monkeypatch):
    run = NeuralStateMachine.run

    def forgets(self, x, state=None):
        if state is not None:
            state = replace(state, states=self.manager.initial(1))
        return run(self, x, state=state)

    monkeypatch.setattr(NeuralStateMachine, "run", forgets)
    assert not any(found.correct for found in bench_streaming(repetitions=1, scale=0.02))


# Imports and first calls ###########################################################


@pytest.mark.parametrize("is_right", [True, False])
def test_a_first_call_in_a_new_process(is_right):
    call = imports.CALLS["a layer"]
    if not is_right:
        call = call.replace(".square()", ".square().mul(1 + (dtype.itemsize > 4))")
    found = imports.first_call(call)
    assert found.is_right == is_right and found.ms > 0


def test_a_process_that_fails_says_why():
    with pytest.raises(ValueError, match=r"'import nowhere' to run .* \(ModuleNotFoundError: .*\)"):
        imports._run("import nowhere")


@pytest.fixture
def processes(monkeypatch):
    """Processes that are not run: what each prints and logs can be set."""
    log = {"warm": "", "cold": "compiling a kernel, once\nanother warning\n"}
    seen = []

    def run(program, cache=None):
        seen.append(program)
        if "print(nsm_graph.__file__)" in program:
            return imports.nsm_graph.__file__ + "\n", ""
        ms = 9000.0 if cache else 500.0
        return json.dumps({"ms": ms, "error": 1e-7}), log["cold" if cache else "warm"]

    monkeypatch.setattr(imports, "_run", run)
    return log, seen


def test_imports_and_first_calls_are_recorded(processes):
    whole, *calls = bench_imports(repetitions=2)
    assert_timed([whole, *calls])
    assert (whole.peer, whole.target) == ("torch_geometric", 1 / 1.15)
    assert processes[1].count("import nsm_graph") == 3  # the first warms up
    assert processes[1].count("import torch_geometric") == 3
    for warm, cold in (calls[:2], calls[2:]):
        assert warm.ratio == 2000 / 500 and warm.target == 1
        assert cold.ours_ms == 9000 and cold.peer_ms == 500 and cold.target == 0
        assert cold.note == "the log said: compiling a kernel, once"


def test_a_quick_look_does_not_compile(processes):
    records = bench_imports(repetitions=1, scale=0.5)
    assert [found.case for found in records] == [
        "import, whole process",
        "first call of a layer, kernels on disk",
        "first call of the machine, kernels on disk",
    ]


def test_a_long_compilation_that_says_nothing_is_noticed(processes):
    processes[0]["cold"] = "another warning"
    silent = [found for found in bench_imports(repetitions=1) if not found.correct]
    assert [found.case for found in silent] == [
        "first call of a layer, compiling",
        "first call of the machine, compiling",
    ]


# What records tell #################################################################


def test_the_environment_is_known():
    env = record.environment()
    assert {"date", "cpu", "commit", "numpy", "numba", "torch_geometric", "threads"} <= set(env)
    json.dumps(env)


def test_outside_a_repository_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "__file__", str(tmp_path / "record.py"))
    assert record._commit() is None
