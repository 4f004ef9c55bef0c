"""Who talks to whom: built-in, composed, learned and home-made topologies of states, on one task.

Task: is the first of 24 digits larger than the last? The two are read four segments apart.
Prints a table and, where matplotlib is installed, draws all topologies into topologies.png.
"""

from importlib.util import find_spec

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


def topologies(num_states: int) -> dict:
    """New ones at every call: a learned one belongs to its machine."""
    return {
        "complete": topology.complete(),
        "ring": topology.ring(1).with_self(),
        "expander": topology.expander(3).with_self(),
        "nearest states": topology.knn(2),
        "learned": topology.learned(num_states, k=2).with_self(),
        "near counts more": topology.complete().biased(topology.DistanceBias(heads=2)),
        "two camps (ours)": two_camps,
        "camps, one bridge": two_camps | topology.path(),
        "none": None,
    }


def sample(num_examples: int, length: int = 24):
    x = torch.randint(0, 10, (num_examples, length))
    batch = torch.arange(num_examples).repeat_interleave(length)
    return x.flatten(), batch, (x[:, 0] > x[:, -1]).long()


def train(communication, num_states: int, num_steps: int) -> float:
    torch.manual_seed(0)
    machine = nsm.NeuralStateMachine(
        1, 16, num_states, 2, segment_length=6, num_embeddings=10, heads=2,
        communication=communication,
    )  # fmt: skip
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


def main(num_states: int = 6, num_steps: int = 100) -> None:
    nodes = topology.NodeSet.from_counts([num_states], x=torch.randn(num_states, 16))
    rules = topologies(num_states)
    print(f"{'topology':18s} edges  diameter  gap    accuracy")
    for name, rule in rules.items():
        accuracy = train(rule, num_states, num_steps)
        seen = "    0         -    -" if rule is None else ""
        if rule is not None:
            summary = rule.eval().describe(nodes)
            seen = f"{summary.num_edges:5d}  {summary.diameter:8g}  {summary.spectral_gap:.3f}"
        print(f"{name:18s} {seen:22s}  {accuracy:.3f}")
    if find_spec("matplotlib") is not None:
        draw({name: rule for name, rule in rules.items() if rule is not None}, nodes)


def draw(rules: dict, nodes: topology.NodeSet) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(10, 5), layout="constrained")
    for (name, rule), ax in zip(rules.items(), axes.flat, strict=True):
        rule.plot(nodes, ax=ax)
        ax.set_title(name)
    figure.savefig("topologies.png")


if __name__ == "__main__":
    main()
