"""The compiled cell: no graph breaks, few recompilations, the same numbers."""

import pytest
import torch
from small_machines import make_machine, run
from torch._dynamo.testing import CompileCounterWithBackend

from nsm_graph import topology

# What Dynamo warns of while it falls back is not what is asked here.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def compiled(machine, backend="aot_eager"):
    """Compiles the cell as :meth:`compile_cell` does, and counts."""
    counter, compile_module = CompileCounterWithBackend(backend), machine.cell.compile
    machine.cell.compile = lambda **options: compile_module(backend=counter, **options)
    machine.compile_cell()
    return counter


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mix": "routing"},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"cell": "lstm"},
                {"mix": "bias"},
                {"mix": "attention"},
                {"position": "relative"},
                {"communication": None},
                {"top_k": 2},
                {"communication": topology.ring()},
            )
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_the_cell_has_no_graph_break_and_the_same_numbers(options, backend):
    machine, reference = make_machine(**options), make_machine(**options)
    compiled(machine, backend)
    x, counts = torch.randn(9, 3), [5, 4]
    actual, expected = run(machine, x, counts).out, run(reference, x, counts).out
    torch.testing.assert_close(actual, expected)
    actual.sum().backward()
    expected.sum().backward()
    for (name, p), q in zip(machine.named_parameters(), reference.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0


@pytest.mark.slow
def test_a_dynamic_topology_compiles_with_breaks_allowed():
    machine = make_machine(communication=topology.knn(1))
    reference = make_machine(communication=topology.knn(1))
    compiled(machine)
    x = torch.randn(7, 3)
    torch.testing.assert_close(machine(x), reference(x))


def test_the_loop_compiles_its_cell_once_whatever_the_number_of_segments():
    machine = make_machine(segment_length=2)
    counter = compiled(machine, "eager")
    for num_segments in (4, 1, 9, 30):
        machine(torch.randn(2 * num_segments, 3))
    assert counter.frame_count == 1


def test_recompiles_at_most_twice_over_batches_of_all_sizes():
    machine = make_machine(segment_length=4)
    counter = compiled(machine, "eager")
    for counts in ([8, 8], [8, 7, 6, 5], [16] * 5, [7, 8, 12, 11], [12] * 9, [20, 18, 30, 30]):
        run(machine, torch.randn(sum(counts), 3), counts)
    assert counter.frame_count <= 3


@pytest.mark.slow
def test_sizes_of_one_stay_below_the_recompile_limit():
    # Torch compiles sizes of one apart: one example left, one token left, or both.
    machine = make_machine(segment_length=4)
    counter = compiled(machine, "eager")
    for counts in ([8, 8], [5, 9, 2], [3], [16] * 5, [1, 1, 1], [7, 0, 4, 12], [33], [1]):
        run(machine, torch.randn(sum(counts), 3), counts)
    assert counter.frame_count <= 6 < torch._dynamo.config.recompile_limit


def test_recompiles_at_most_twice_over_edits():
    # Sizes of which no two are equal by chance: Dynamo would take that for a rule.
    machine = make_machine(max_states=8, segment_length=10)
    counter = compiled(machine, "eager")
    for _ in range(5):
        run(machine, torch.randn(60, 3), [20, 20, 20])
        machine.manager.allocate(1)
    assert counter.frame_count <= 3


def test_checkpointing_takes_a_compiled_cell():
    machine = make_machine(checkpoint_segments=1)
    reference = make_machine()
    compiled(machine)
    x = torch.randn(9, 3)
    machine(x).sum().backward()
    reference(x).sum().backward()
    torch.testing.assert_close(machine.manager.bank.grad, reference.manager.bank.grad)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_inductor_gives_the_same_numbers(cell):
    machine, reference = make_machine(cell=cell), make_machine(cell=cell)
    machine.compile_cell()
    x = torch.randn(17, 3)
    for model in (machine, reference):
        run(model, x, [9, 8]).out.square().sum().backward()
    torch.testing.assert_close(run(machine, x, [9, 8]).out, run(reference, x, [9, 8]).out)
    for p, q in zip(machine.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
