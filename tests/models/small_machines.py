"""Small machines and ragged batches for the tests of the models."""

import torch
from hypothesis import strategies as st

from nsm_graph import NeuralStateMachine, topology

SIZES = {"in_channels": 3, "state_channels": 4, "num_states": 3, "out_channels": 2}


def make_machine(seed=0, dtype=torch.float, **options):
    """A machine in evaluation mode whose every number is drawn from the seed."""
    torch.manual_seed(seed)
    machine = NeuralStateMachine(**(SIZES | {"segment_length": 3, "heads": 2} | options))
    machine = machine.to(dtype).eval()
    with torch.no_grad():  # away from the neutral start, where mistakes could hide
        machine.manager.importance.normal_()
        for module in machine.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.normal_(1.0, 0.3)
                module.bias.normal_(0.0, 0.3)
    return machine


def batch_of(counts):
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def run(machine, x, counts, **options):
    return machine.run(x, batch_of(counts), batch_size=len(counts), **options)


#: Token counts of a batch, empty examples included.
COUNTS = st.lists(st.integers(0, 7), min_size=1, max_size=3).filter(lambda counts: sum(counts) > 0)


@st.composite
def machine_options(draw, heads=("example", "token", "next_token")):
    """How a machine for sequences is built."""
    mix = draw(st.sampled_from(["sum", "bias", "attention", "routing"]))
    head = draw(st.sampled_from(heads))
    positions = ["learned", "sinusoidal", None]
    if mix != "routing":
        positions += ["rotary", "relative"]
    return {
        "cell": draw(st.sampled_from(["gru", "lstm"])),
        "mix": mix,
        "position": draw(st.sampled_from(positions)),
        "top_k": None if mix == "attention" else draw(st.sampled_from([None, 1, 2])),
        "routing_reduce": draw(st.sampled_from(["sum", "mean"])),
        "communication": draw(st.sampled_from([topology.complete(), None])),
        "head": head,
        "pool": draw(st.sampled_from(["mean", "flatten", "attention"]))
        if head == "example"
        else "mean",
        "segment_length": draw(st.sampled_from([1, 2, 3, 5])),
    }
