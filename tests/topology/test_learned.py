"""Learned edges: what is chosen, what gets gradient, and that it learns."""

import copy

import pytest
import torch
from edge_sets import edges_of, in_each_example

import nsm_graph as nsm
from nsm_graph import ops, topology
from nsm_graph.memory import NodeEdit
from nsm_graph.topology import NodeSet


def with_logits(logits, k, **options):
    rule = topology.learned(len(logits), k, **options)
    with torch.no_grad():
        rule.logits.copy_(torch.as_tensor(logits, dtype=torch.float))
    return rule.eval()


def test_the_largest_logits_are_chosen():
    logits = torch.randn(6, 6)
    rule = with_logits(logits, 2)

    def one(n):
        edges = []
        for j in range(n):
            others = sorted((i for i in range(n) if i != j), key=lambda i: -logits[j, i])
            edges += [(i, j) for i in others[:2]]
        return edges

    for counts in ([6], [4, 0, 6], [3, 3], []):
        assert set(edges_of(rule, counts)) == in_each_example(counts, one)


def test_slots_say_which_logits():
    logits = torch.randn(6, 6)
    slots = torch.tensor([5, 0, 3])
    nodes = NodeSet(nsm.Partition.uniform(1, 3), slots=slots)
    expected = with_logits(logits[slots][:, slots], 1)(NodeSet.from_counts([3]))
    assert torch.equal(with_logits(logits, 1)(nodes).edge_index, expected.edge_index)


def test_ties_go_to_the_lowest():
    assert edges_of(topology.learned(4, 1).eval(), [4]) == [(1, 0), (0, 1), (0, 2), (0, 3)]


def test_noise_tries_others_out_in_training_only():
    rule = topology.learned(8, 2)
    drawn = {tuple(edges_of(rule, [8])) for _ in range(10)}
    assert len(drawn) > 5
    assert len({tuple(edges_of(rule.eval(), [8])) for _ in range(3)}) == 1
    # A Gumbel maximum is a draw from the softmax.
    logits = torch.tensor([[0.0, 1.0, 0.0], [0.0] * 3, [0.0] * 3])
    rule = with_logits(logits, 1).train()
    counts = torch.zeros(3)
    for _ in range(1000):
        counts[rule(NodeSet.from_counts([3])).edge_index[0, 0]] += 1
    assert counts[0] == 0
    assert abs(counts[1] / 1000 - 1 / (1 + torch.tensor(-1.0).exp())) < 0.05


def test_chosen_edges_weigh_the_same_and_pass_the_gradient_of_the_soft_rule():
    logits = torch.randn(5, 5, dtype=torch.double)
    rule = with_logits(logits, 2, temperature=0.7).double()
    with torch.no_grad():
        rule.logits.copy_(logits)
    relation = rule(NodeSet.from_counts([5]))
    assert (relation.bias == 0).all()
    weight = torch.randn(relation.num_edges, dtype=torch.double)
    (relation.bias.flatten() * weight).sum().backward()

    soft = logits.clone().requires_grad_()
    masked = soft.masked_fill(torch.eye(5, dtype=torch.bool), -torch.inf)
    src, dst = relation.edge_index
    ((masked / 0.7).log_softmax(1)[dst, src] * weight).sum().backward()
    torch.testing.assert_close(rule.logits.grad, soft.grad.nan_to_num(), rtol=1e-10, atol=1e-12)


def test_it_learns_whom_to_listen_to():
    """Each of six nodes wants the value of another; values change, so only the topology helps."""
    wanted = torch.tensor([3, 0, 4, 1, 5, 2])
    rule = topology.learned(6, 1)
    optimizer = torch.optim.Adam(rule.parameters(), lr=0.2)
    nodes = NodeSet.from_counts([6] * 16)
    for _ in range(150):
        values = torch.randn(16, 6)
        rows = values.view(96, 1, 1)
        # Two sources, so that a bias on the scores makes a difference.
        heard = (rule | topology.self_loops())(nodes)
        flat = torch.zeros_like(rows)
        out = ops.edge_attention(flat, flat, rows, heard).view(16, 6)
        loss = (out - (values + values[:, wanted]) / 2).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    src, dst = rule.eval()(NodeSet.from_counts([6])).edge_index
    assert src[dst.argsort()].tolist() == wanted.tolist()


# In a machine #####################################################################


def machine_with(rule, num_states=4, **options):
    return nsm.NeuralStateMachine(
        2, 8, num_states, 1, segment_length=2, heads=2, communication=rule, **options
    )


def test_a_machine_trains_saves_and_copies_it():
    machine = machine_with(topology.learned(4, 2) | topology.ring(1))
    assert "cell.topology.left.logits" in machine.state_dict()
    x = torch.randn(6, 2)
    machine(x).sum().backward()
    grad = machine.cell.topology.left.logits.grad
    assert grad.isfinite().all() and (grad != 0).any()
    other = machine_with(topology.learned(4, 2) | topology.ring(1))
    other.load_state_dict(machine.state_dict())
    torch.testing.assert_close(other.eval()(x), machine.eval()(x))
    torch.testing.assert_close(copy.deepcopy(machine)(x), machine(x))
    with torch.no_grad():
        machine.cell.topology.left.logits.fill_(3)
    machine.reset_parameters()
    assert (machine.cell.topology.left.logits == 0).all()


@pytest.mark.parametrize("options", [{"checkpoint_segments": 2}, {"bptt_segments": 2}])
def test_it_trains_however_history_is_kept(options):
    rules = [topology.learned(4, 2), topology.learned(4, 2).biased(topology.DistanceBias(2))]
    for rule in rules:
        machine = machine_with(rule, **options)
        batch = torch.tensor([0] * 7 + [1] * 4)
        machine(torch.randn(11, 2), batch).sum().backward()
        for parameter in machine.cell.topology.parameters():
            assert (parameter.grad != 0).any()


def test_edits_reach_both_sides():
    machine = machine_with(topology.learned(4, 1), max_states=4)
    logits = machine.cell.topology.logits
    with torch.no_grad():
        logits.copy_(torch.arange(16.0).view(4, 4))
    before = logits.detach().clone()
    optimizer = torch.optim.Adam(machine.parameters())
    machine(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    machine.manager.register_optimizer(optimizer)
    moment = optimizer.state[logits]["exp_avg"]
    moment.copy_(before)
    with torch.no_grad():
        logits.copy_(before)
    # Slots 1 and 2 change places.
    order = torch.tensor([0, 2, 1, 3])
    machine.manager.edit(NodeEdit(order, torch.arange(4), torch.arange(4)))
    assert torch.equal(logits, before[order][:, order])
    assert torch.equal(moment, before[order][:, order])
    machine.manager.prune(lowest=1)
    slot = int((~machine.manager.active).nonzero())
    machine.manager.allocate(1)
    assert (logits[slot] == 0).all() and (logits[:, slot] == 0).all()


# Errors ###########################################################################


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: topology.learned(4, 4), "chooses k of the other nodes, but k is 4 and num_states"),
        (lambda: topology.learned(4, 0), "needs k >= 1, but k is 0"),
        (lambda: topology.learned(1, 1), "needs num_states >= 2"),
        (lambda: topology.learned(4, 1, temperature=0.0), "must be positive, but is 0.0"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([4, 2], r"learned\(5, 2\) needs more than 2 nodes .* one has 2; .* \(examples 1, of 2\)"),
        ([6], r"learned\(5, 2\) has logits for 5 slots, but the nodes hold slot 5; build it with"),
    ],
)
def test_wrong_node_sets(counts, message):
    with pytest.raises(ValueError, match=message):
        topology.learned(5, 2)(NodeSet.from_counts(counts))
