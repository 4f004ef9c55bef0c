"""Who talks to whom: built-in, composed and home-made topologies of the states, on one task.

Task: is the first of 24 digits larger than the last? The two are read four segments apart.
"""

import torch

import nsm_graph as nsm
from nsm_graph import topology


@topology.rule
def two_camps(nodes):
    """States talk inside the first and inside the second half of their example."""
    src, dst = topology.complete()(nodes).edge_index
    half = nodes.ptr.diff()[nodes.batch] // 2
    camp = nodes.position >= half
    return torch.stack([src, dst])[:, camp[src] == camp[dst]]


TOPOLOGIES = {
    "complete": topology.complete(),
    "ring": topology.ring(1) | topology.self_loops(),
    "ring without hub": topology.ring(2) - topology.star(hubs=1),
    "nearest states": topology.knn(2),
    "two camps (ours)": two_camps,
    "none": None,
}


def sample(num_examples: int, length: int = 24):
    x = torch.randint(0, 10, (num_examples, length))
    batch = torch.arange(num_examples).repeat_interleave(length)
    return x.flatten(), batch, (x[:, 0] > x[:, -1]).long()


def train(communication, num_steps: int) -> float:
    torch.manual_seed(0)
    machine = nsm.NeuralStateMachine(
        1, 16, 6, 2, segment_length=6, num_embeddings=10, heads=2, communication=communication
    )
    optimizer = torch.optim.AdamW(machine.parameters(), lr=5e-3)
    for _ in range(num_steps):
        x, batch, y = sample(64)
        loss = torch.nn.functional.cross_entropy(machine(x, batch), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, batch, y = sample(500)
    with torch.no_grad():
        return (machine.eval()(x, batch).argmax(1) == y).float().mean().item()


def main(num_steps: int = 150) -> None:
    nodes = topology.NodeSet.from_counts([6], x=torch.randn(6, 16))
    print(f"{'topology':18s} edges  accuracy")
    for name, rule in TOPOLOGIES.items():
        edges = 0 if rule is None else rule(nodes).num_edges
        print(f"{name:18s} {edges:5d}  {train(rule, num_steps):.3f}")


if __name__ == "__main__":
    main()
