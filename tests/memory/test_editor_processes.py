"""Several processes make the same edits, and a long run of edits stays sound."""

import resource

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

import nsm_graph as nsm
from nsm_graph.memory import Every, Grow, MemoryEditor, Merge, Prune, Split


def make_machine():
    torch.manual_seed(0)
    return nsm.NeuralStateMachine(
        2, 8, 6, 3, segment_length=4, heads=2, max_states=10, watch={"gradient": 20}
    )


def make_editor(machine, **options):
    rules = [Every(2, Grow(0.0)), Every(3, Prune(lowest=1, signal="gradient")),
             Every(5, Split(0.5)), Every(7, Merge(-1.0))]  # fmt: skip
    return MemoryEditor(machine.manager, *rules, min_states=3, **options)


def run_process(rank, world_size, folder, num_steps):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    torch.set_num_threads(1)
    machine = make_machine()
    model = DistributedDataParallel(machine)
    optimizer = torch.optim.AdamW(machine.parameters(), lr=0.01)
    machine.manager.register_optimizer(optimizer)
    editor = make_editor(machine)
    generator = torch.Generator().manual_seed(rank)  # other data, other random numbers
    torch.manual_seed(100 + rank)
    for _ in range(num_steps):
        x = torch.randn(20, 2, generator=generator)
        optimizer.zero_grad()
        loss = model(x, torch.tensor([0] * 7 + [1] * 13)).square().mean()
        loss.backward()
        optimizer.step()
        editor.step()
    weights = torch.cat([x.detach().flatten() for x in machine.parameters()])
    emas = torch.stack([machine.manager.signal_ema(name) for name in machine.manager.decays])
    events = [event.to_dict() for event in editor.events]
    torch.save((events, machine.manager.active, weights, emas), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_make_the_same_edits(tmp_path):
    multiprocessing.spawn(run_process, (2, str(tmp_path), 40), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert {event["kind"] for event in first[0]} == {"allocate", "prune", "split", "merge"}
    assert first[0] == second[0]
    for a, b in zip(first[1:], second[1:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_2000_steps_with_an_edit_every_10():
    machine = make_machine()
    optimizer = torch.optim.AdamW(machine.parameters(), lr=0.003)
    machine.manager.register_optimizer(optimizer)
    rules = [
        Every(20, Grow(0.0)),
        lambda view: Prune(lowest=1)(view) if view.step % 20 == 10 else [],
    ]
    editor = MemoryEditor(machine.manager, *rules, min_states=4)
    generator = torch.Generator().manual_seed(0)
    batch = torch.tensor([0] * 7 + [1] * 13)
    memory = []
    for step in range(2000):
        x = torch.randn(20, 2, generator=generator)
        optimizer.zero_grad()
        loss = (machine(x, batch) - 1).square().mean()
        assert loss.isfinite()
        loss.backward()
        optimizer.step()
        editor.step(loss)
        if step in (1000, 1999):
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert len(editor.events) == 200
    assert all(p.isfinite().all() for p in machine.parameters())
    assert memory[1] - memory[0] < 16 << 10  # KiB


def test_pruning_a_state_that_nobody_uses_does_not_change_the_loss():
    torch.manual_seed(0)
    machine = nsm.NeuralStateMachine(
        2, 8, 6, 3, segment_length=4, heads=2, communication=None, pool="flatten"
    ).eval()
    with torch.no_grad():  # closed to tokens, and the head does not look
        machine.manager.importance[2] = -20.0
        machine.head.lin_out.weight.unflatten(1, (6, -1))[:, 2] = 0.0
    x, batch = torch.randn(20, 2), torch.tensor([0] * 7 + [1] * 13)
    before = machine(x, batch).square().mean()
    machine.manager.prune(slots=torch.tensor([2]))
    after = machine(x, batch).square().mean()
    assert abs(after / before - 1) < 0.01
