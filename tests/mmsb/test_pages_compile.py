"""Routers, passes and stacks compile without a graph break, and not anew for every size."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from nsm_graph import Relation, topology
from nsm_graph.mmsb import DeltaRouter, Propagation, PropagationPass


def complete(n):
    return Relation.complete([0, n, 2 * n], [0, n, 2 * n])


def general(n):
    return Relation.from_edge_index(complete(n).edge_index[:, ::2], (2 * n, 2 * n))


def plain(n):
    return general(n).edge_index


@pytest.mark.parametrize("edges", [complete, general, plain])
@pytest.mark.parametrize("make", [DeltaRouter, PropagationPass])
def test_layers_compile(make, edges):
    torch._dynamo.reset()
    layer, counter = make(8, 2), CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for n in (5, 6, 9, 16, 2):
        pages = torch.randn(2 * n, 8)
        torch.testing.assert_close(compiled(pages, edges(n)), layer(pages, edges(n)))
    assert counter.frame_count <= 3


def test_stacks_compile():
    torch._dynamo.reset()
    stack, counter = Propagation(8, 2, 2, shadow_graph=topology.complete()), CompileCounter()
    compiled = torch.compile(stack, backend=counter, fullgraph=True)
    for n in (5, 6, 9, 16, 2):
        pages = torch.randn(n, 8)
        torch.testing.assert_close(compiled(pages), stack(pages))
    assert counter.frame_count <= 3
