"""The node set changes while a model trains: prune what is unused, allocate, carry on."""

import torch

import nsm_graph as nsm


def main(num_steps: int = 60) -> list[int]:
    torch.manual_seed(0)
    machine = nsm.NeuralStateMachine(4, 16, 6, 2, segment_length=8, max_states=8, min_states=2)
    optimizer = torch.optim.AdamW(machine.parameters(), lr=3e-3)
    machine.manager.register_optimizer(optimizer)  # edits carry its moments along

    active = []
    batch = torch.arange(16).repeat_interleave(24)
    for step in range(num_steps):
        x = torch.randn(16 * 24, 4)
        y = (x.view(16, 24, 4)[:, :, 0].sum(1) > 0).long()
        loss = torch.nn.functional.cross_entropy(machine(x, batch), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == num_steps // 3:
            edit = machine.manager.prune(lowest=2)
            print("pruned to slots", edit.slots_after.tolist())
        if step == 2 * num_steps // 3:
            edit = machine.manager.allocate(3)
            print("allocated slots", edit.fresh_slots.tolist())
        active.append(machine.manager.num_active)
    print("active states:", active[0], "->", active[num_steps // 2], "->", active[-1])
    print(f"last loss {loss.item():.3f}")
    return active


if __name__ == "__main__":
    main()
