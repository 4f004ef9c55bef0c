"""A Transformer as pages over a shadow graph: equal outputs, another topology, cheap updates."""

import time

import torch
from torch import nn

from nsm_graph import mmsb, topology

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
encoder = nn.TransformerEncoder(layer, num_layers=3, enable_nested_tensor=False).eval()
tokens = torch.randn(600, 64)


def seconds(call):
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


with torch.no_grad():
    stack = mmsb.Propagation.from_torch(encoder, is_causal=True)
    mask = nn.Transformer.generate_square_subsequent_mask(600)
    expected = encoder(tokens[None], mask, is_causal=True)[0]
    print("stack = encoder:", torch.allclose(stack(tokens), expected, atol=1e-5))

    # The same weights, other shadow graphs.
    for graph in (topology.window(8), topology.ring(2).with_self(), topology.knn(4)):
        change = (stack(tokens, shadow_graph=graph) - expected).norm() / expected.norm()
        print(f"{graph!r:32} moves the result by {change:.2f} of its norm")

    # A stream: each new page is one row in every pass.
    stack.run(tokens[:500], cache=True)
    new, pieces = seconds(lambda: torch.cat([stack.append(page[None]) for page in tokens[500:]]))
    _, whole = seconds(lambda: stack(tokens))
    print("appended = whole:", torch.allclose(new, expected[500:], atol=1e-5))
    print(f"a page appended {1e3 * pieces / 100:.2f} ms, all computed again {1e3 * whole:.1f} ms")

    # Pages that change in a local graph reach their neighbours only.
    stack.run(tokens, shadow_graph=topology.window(8), cache=True)
    tokens[300:305] = torch.randn(5, 64)
    updated = stack.update(tokens, slice(300, 305))
    again = stack(tokens, shadow_graph=topology.window(8))
    print("updated = computed again:", torch.allclose(updated, again, atol=1e-5))
