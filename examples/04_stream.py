"""Streaming: a sequence of any length in pieces, at constant memory, with the same result."""

import torch

import nsm_graph as nsm

torch.manual_seed(0)
machine = nsm.NeuralStateMachine(
    8, 32, 8, 4, segment_length=16, position="sinusoidal", routing_reduce="mean"
).eval()
stream = torch.randn(1600, 8)

with torch.no_grad():
    whole = machine(stream)
    state = None
    for piece in stream.split(160):  # pieces of whole segments; the state carries everything else
        out, _, state, _ = machine.run(piece, state=state)

print("tokens read:", state.num_tokens.tolist(), "state rows carried:", len(state.states))
print("pieces = whole:", bool((out - whole).norm() < 1e-5 * whole.norm()))
