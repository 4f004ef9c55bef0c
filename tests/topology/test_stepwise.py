"""Rules that change from step to step."""

from dataclasses import replace

import pytest
import torch
from edge_sets import edges_of

import nsm_graph as nsm
from nsm_graph import topology
from nsm_graph.topology import NodeSet


def at(rule, step, counts):
    nodes = replace(NodeSet.from_counts(counts), step=step)
    return list(map(tuple, rule(nodes).edge_index.T.tolist()))


def test_random_draws_others_without_repetition():
    for n, degree in [(5, 4), (9, 3), (40, 8)]:
        edges = edges_of(topology.random(degree), [n])
        assert len(edges) == n * degree
        assert all(i != j for i, j in edges)


def test_random_is_a_function_of_seed_step_and_node_count():
    rule = topology.random(2, seed=1)
    state = torch.get_rng_state()
    assert at(rule, 3, [6]) == at(topology.random(2, seed=1), 3, [6])
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"
    assert len({tuple(at(rule, step, [6])) for step in range(8)}) == 8
    assert at(rule, 3, [6]) != at(topology.random(2, seed=2), 3, [6])
    together = at(rule, 3, [4, 6])
    assert [(i - 4, j - 4) for i, j in together if j >= 4] == at(rule, 3, [6])


def test_random_draws_evenly():
    rule, counts = topology.random(2), torch.zeros(5, 5)
    for step in range(2000):
        src, dst = rule(replace(NodeSet.from_counts([5]), step=step)).edge_index
        counts[dst, src] += 1
    assert (counts.diagonal() == 0).all()
    others = counts[~torch.eye(5, dtype=torch.bool)] / 2000
    assert (others - 0.5).abs().max() < 0.06


def test_random_between_two_sets():
    sources, targets = NodeSet.from_counts([3, 4]), NodeSet.from_counts([5, 2])
    src, dst = topology.random(3)(sources, targets).edge_index
    assert dst.tolist() == [j for j in range(7) for _ in range(3)]
    assert all((i < 3) == (j < 5) for i, j in zip(src.tolist(), dst.tolist(), strict=True))


def test_scheduled():
    rule = topology.scheduled({0: topology.complete(), 3: topology.ring(), 7: topology.star()})
    assert rule.is_dynamic
    for step, expected in [(0, "complete"), (2, "complete"), (3, "ring"), (6, "ring"), (9, "star")]:
        assert repr(rule.at(step)).startswith(expected)
        assert at(rule, step, [5]) == at(rule.at(step), step, [5])
    growing = topology.scheduled(lambda step: topology.ring(step + 1))
    assert repr(growing.at(2)) == "ring(3)"
    assert at(growing | topology.star(), 1, [9]) == at(topology.ring(2) | topology.star(), 0, [9])


def test_what_a_schedule_holds_is_trained():
    rule = topology.scheduled({0: topology.ring(), 1: topology.learned(4, 1)})
    machine = nsm.NeuralStateMachine(2, 8, 4, 1, segment_length=2, heads=2, communication=rule)
    assert "cell.topology.rules.1.logits" in machine.state_dict()
    with torch.no_grad():
        rule.rules[1].logits.fill_(1)
    machine.reset_parameters()
    assert (rule.rules[1].logits == 0).all()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, "needs a rule for step 0, but starts at no step"),
        ({2: topology.ring()}, "needs a rule for step 0, but starts at 2; add 0"),
        ({0: "ring"}, "needs a topology at step 0, but got 'ring'"),
    ],
)
def test_wrong_plans(plan, message):
    with pytest.raises(ValueError, match=message):
        topology.scheduled(plan)


def test_a_plan_that_gives_no_rule():
    with pytest.raises(ValueError, match="needs a topology at step 0, but got None; wrap a"):
        topology.scheduled(lambda step: None)(NodeSet.from_counts([3]))


def test_too_few_nodes_to_draw_from():
    message = r"random\(3, seed=0\) needs more than 3 nodes .* \(examples 1, of 2\)"
    with pytest.raises(ValueError, match=message):
        topology.random(3)(NodeSet.from_counts([4, 3]))
