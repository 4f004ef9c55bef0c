"""Passes and stacks: dense formulas on any shadow graph, snapshots, gradients, bad input."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pages_oracle import FUNCTIONS, allowed_pairs, one_pass, propagate, scramble

from nsm_graph import Partition, Relation, topology
from nsm_graph.mmsb import Propagation, PropagationPass
from nsm_graph.testing import assert_batch_invariant, assert_close_to_norm

RULES = [
    topology.complete(),
    topology.causal(),
    topology.window(1),
    topology.ring(1),
    topology.ring(1) | topology.star() | topology.self_loops(),
    topology.tree(2),
]


def nodes_of(counts, x=None, step=0):
    nodes = topology.NodeSet.from_counts(counts, x)
    return topology.NodeSet(nodes.nodes, x=x, step=step)


def batch_of(counts):
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


def make(num_passes=2, **options):
    options = {"feedforward_channels": 10, **options}
    return scramble(Propagation(6, num_passes, 2, **options).double())


@given(
    counts=st.lists(st.integers(3, 6), min_size=1, max_size=3),
    rule=st.sampled_from(RULES),
    norm_first=st.booleans(),
    final_norm=st.booleans(),
    bias=st.booleans(),
    activation=st.sampled_from(sorted(FUNCTIONS)),
    seed=st.integers(0, 99),
)
def test_equals_the_dense_formula(counts, rule, norm_first, final_norm, bias, activation, seed):
    torch.manual_seed(seed)
    stack = make(
        shadow_graph=rule, norm_first=norm_first, final_norm=final_norm, bias=bias,
        activation=activation,
    )  # fmt: skip
    pages = torch.randn(sum(counts), 6, dtype=torch.double, requires_grad=True)
    out = stack.run(pages, batch_of(counts))
    expected, snapshots = propagate(stack, pages, rule(nodes_of(counts)).edge_index)
    torch.testing.assert_close(out.pages, expected, rtol=0, atol=1e-10)
    assert out.cache is None and len(out.snapshots) == 3
    for ours, theirs in zip(out.snapshots, snapshots, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    probe = torch.randn_like(expected)
    leaves = [pages, *stack.parameters()]
    pair = (torch.autograd.grad((x * probe).sum(), leaves) for x in (out.pages, expected))
    for ours, theirs in zip(*pair, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_pass_takes_any_shadow_graph(norm_first):
    refine = scramble(PropagationPass(6, 3, norm_first=norm_first).double())
    pages = torch.randn(7, 6, dtype=torch.double)
    relation = topology.ring(2)(nodes_of([7]))
    expected = one_pass(pages, refine, allowed_pairs(relation.edge_index, 7))
    for graph in (topology.ring(2), relation, relation.edge_index):
        torch.testing.assert_close(refine(pages, graph), expected, rtol=0, atol=1e-10)


def test_gradcheck():
    stack = make(feedforward_channels=4, activation="gelu", final_norm=True)
    pages = torch.randn(4, 6, dtype=torch.double, requires_grad=True)
    leaves = [pages, *stack.parameters()]
    graph = topology.ring(1).biased(topology.DistanceBias(2)).double()
    leaves += list(graph.parameters())
    assert torch.autograd.gradcheck(lambda *_: stack(pages, shadow_graph=graph), leaves)


def test_duplicate_edges_count_twice_and_lonely_pages_hear_nothing():
    stack, pages = make(), torch.randn(4, 6, dtype=torch.double)
    edges = torch.tensor([[0, 0, 1, 2], [1, 1, 1, 0]])
    expected, _ = propagate(stack, pages, edges)
    torch.testing.assert_close(stack(pages, shadow_graph=edges), expected, rtol=0, atol=1e-10)


def test_a_dynamic_rule_is_asked_in_every_pass_with_the_current_pages():
    asked = []

    @topology.rule
    def watched(nodes):
        asked.append((nodes.step, nodes.x.detach().clone()))
        return topology.knn(2)(nodes)

    watched.is_dynamic = True
    stack, pages = make(3, shadow_graph=watched), torch.randn(9, 6, dtype=torch.double)
    out = stack.run(pages, batch_of([5, 4]))
    edges = [topology.knn(2)(nodes_of([5, 4], x)).edge_index for x in out.snapshots[:-1]]
    expected, _ = propagate(stack, pages, edges)
    torch.testing.assert_close(out.pages, expected, rtol=0, atol=1e-10)
    assert [step for step, _ in asked] == [0, 1, 2]
    for (_, seen), snapshot in zip(asked, out.snapshots, strict=False):
        assert torch.equal(seen, snapshot)


def test_a_static_rule_is_asked_once():
    asked = []

    @topology.rule
    def watched(nodes):
        asked.append(nodes.step)
        return topology.ring(1)(nodes)

    make(3, shadow_graph=watched)(torch.randn(5, 6, dtype=torch.double))
    assert asked == [0]


def test_a_schedule_names_the_rule_of_each_pass():
    plan = topology.scheduled({0: topology.window(1), 1: topology.complete()})
    stack, pages = make(3, shadow_graph=plan), torch.randn(5, 6, dtype=torch.double)
    edges = [rule(nodes_of([5])).edge_index for rule in (plan.at(0), plan.at(1), plan.at(2))]
    expected, _ = propagate(stack, pages, edges)
    torch.testing.assert_close(stack(pages), expected, rtol=0, atol=1e-10)


def test_another_topology_is_one_argument_away():
    stack, pages = make(shadow_graph=topology.causal()), torch.randn(6, 6, dtype=torch.double)
    for rule in (topology.complete(), topology.ring(1)):
        expected, _ = propagate(stack, pages, rule(nodes_of([6])).edge_index)
        out = stack(pages, shadow_graph=rule)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
        assert not torch.allclose(out, stack(pages))


def test_rules_may_compare_attributes_of_pages():
    stack, pages = make(), torch.randn(6, 6, dtype=torch.double)
    sentence = torch.tensor([0, 1, 0, 1, 0, 1])
    out = stack(
        pages, shadow_graph=topology.blocks(by="sentence"), attributes={"sentence": sentence}
    )
    pair = torch.cartesian_prod(torch.arange(6), torch.arange(6)).T
    expected, _ = propagate(stack, pages, pair[:, sentence[pair[0]] == sentence[pair[1]]])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


def test_message_passing_gives_the_same():
    stack, pages = make(shadow_graph=topology.window(2)).float(), torch.randn(9, 6)
    fast, seen = stack(pages), []
    for refine in stack.passes:
        refine.router.register_message_forward_hook(lambda *given: seen.append(given[2].size(0)))
    assert_close_to_norm(stack(pages), fast, 1e-6)
    assert seen == [24, 24]


@pytest.mark.parametrize("rule", [topology.complete(), topology.causal(), topology.knn(2)])
def test_examples_do_not_see_each_other(rule):
    stack = make(shadow_graph=rule).float()

    def first_pages(x, batch):
        out = stack(x, batch)
        return out[torch.cat([torch.ones(1, dtype=torch.bool), batch[1:] != batch[:-1]])]

    assert_batch_invariant(first_pages, [torch.randn(n, 6) for n in (4, 9, 3)])


@given(seed=st.integers(0, 99))
def test_permuting_pages_and_edges_permutes_the_result(seed):
    torch.manual_seed(seed)
    stack, pages = make(), torch.randn(6, 6, dtype=torch.double)
    edges, order = torch.randint(6, (2, 12)), torch.randperm(6)
    place = order.argsort()
    out = stack(pages, shadow_graph=edges)
    moved = stack(pages[order], shadow_graph=place[edges])
    torch.testing.assert_close(moved, out[order], rtol=0, atol=1e-10)


def test_batch_may_be_a_partition():
    stack, pages = make(), torch.randn(7, 6, dtype=torch.double)
    examples = Partition.from_ptr(torch.tensor([0, 3, 3, 7]))
    assert torch.equal(stack(pages, examples), stack(pages, batch_of([3, 4])))


def test_training_drops_and_evaluation_does_not():
    stack, pages = make(dropout=0.3), torch.randn(5, 6, dtype=torch.double)
    assert not torch.equal(stack(pages), stack(pages))
    stack.eval()
    expected, _ = propagate(stack, pages, topology.complete()(nodes_of([5])).edge_index)
    torch.testing.assert_close(stack(pages), expected, rtol=0, atol=1e-10)
    parts = [make(**{name: 0.3}) for name in ("attention_dropout", "feedforward_dropout")]
    for other in (*parts, make(dropout=0.3, attention_dropout=0.0, feedforward_dropout=0.0)):
        assert not torch.equal(other(pages), other(pages))
    calm = make(dropout=0.0)
    assert torch.equal(calm(pages), calm(pages))


@pytest.mark.parametrize("copied", ["state_dict", "deepcopy", "pickle"])
def test_copies_give_the_same(copied):
    stack, pages = make(final_norm=True), torch.randn(5, 6, dtype=torch.double)
    stack.run(pages, cache=True)
    if copied == "state_dict":
        twin = make(final_norm=True)
        twin.load_state_dict(stack.state_dict())
    else:
        twin = copy.deepcopy(stack) if copied == "deepcopy" else pickle.loads(pickle.dumps(stack))
    assert torch.equal(twin(pages), stack(pages))
    assert twin.cache is None and stack.cache is not None


def test_a_learned_shadow_graph_is_trained_and_saved_with_the_stack():
    graph = topology.complete().biased(topology.DistanceBias(2))
    stack = make(shadow_graph=graph)
    assert any(parameter is graph.bias.weight for parameter in stack.parameters())
    stack(torch.randn(5, 6, dtype=torch.double)).square().sum().backward()
    assert graph.bias.weight.grad.abs().sum() > 0


def test_reset_parameters_draws_anew():
    stack = make(final_norm=True, activation=torch.nn.SiLU())
    torch.manual_seed(1)
    stack.reset_parameters()
    first = copy.deepcopy(stack.state_dict())
    torch.manual_seed(1)
    stack.reset_parameters()
    assert all(torch.equal(value, first[name]) for name, value in stack.state_dict().items())


def test_repr_says_what_it_is():
    stack = Propagation(8, 2, 4, shadow_graph=topology.window(2))
    assert "8, num_passes=2, heads=4, shadow_graph=window(2)" in repr(stack)
    assert "PropagationPass(8, heads=4, feedforward_channels=32, activation='relu'" in repr(stack)


# Bad input #########################################################################

X = torch.randn(5, 6)
EDGES = torch.tensor([[0, 1], [1, 9]])


@topology.rule
def too_small(nodes):
    return Relation.complete([0, 2], [0, 2])


BAD = [
    ({"shadow_graph": EDGES}, r"edge_index names target 9, but there are 5.*edge 1: 1 -> 9"),
    ({"shadow_graph": -EDGES}, r"holds the negative index -9"),
    ({"shadow_graph": EDGES.float()}, "edge_index must hold integers"),
    ({"shadow_graph": topology.from_edge_index(EDGES % 4)}, r"from_edge_index\(2 edges, 2 nodes\)"),
    ({"shadow_graph": Relation.complete([0, 4], [0, 4])}, "4 to 4 nodes, but there are 5 pages"),
    ({"shadow_graph": too_small}, "too_small made a relation 2 -> 2 for 5 nodes"),
    ({"shadow_graph": EDGES[:, :0]}, "has no edge among the 5 pages"),
    ({"shadow_graph": topology.knn(9)}, r"knn\(9\) needs more than 9 nodes"),
    ({"shadow_graph": "causal"}, "shadow_graph must be a topology"),
    ({"batch": torch.zeros(4, dtype=torch.long)}, "batch has 4 entries, but pages has 5 rows"),
    ({"batch": torch.tensor([0, 1, 0, 1, 1])}, "batch must be sorted"),
    ({"shadow_graph": topology.blocks(by="kind")}, "compares the attribute 'kind'"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=[message for _, message in BAD])
def test_refuses_bad_input(given, message):
    with pytest.raises(ValueError, match=message):
        Propagation(6, 1, 2)(X, **given)


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        (X[:, :4], r"pages must have shape \(nodes, 6\)"),
        (X.double(), "pages is torch.float64"),
        (X.long(), "pages must be floating point"),
        (X[:0], "pages has no rows: an empty graph"),
    ],
)
def test_refuses_bad_pages(pages, message):
    for module in (Propagation(6, 1, 2), PropagationPass(6, 2)):
        given = {} if isinstance(module, Propagation) else {"shadow_graph": topology.complete()}
        with pytest.raises(ValueError, match=message):
            module(pages, **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_passes": 0}, "num_passes must be an integer of at least 1"),
        ({"heads": 4}, "heads must divide"),
        ({"activation": "swish"}, "activation must be one of"),
        ({"dropout": 1.0}, "dropout must be a share"),
        ({"attention_dropout": -0.1}, "attention_dropout must be a share"),
        ({"feedforward_channels": 0}, "feedforward_channels must be positive"),
        ({"shadow_graph": 3}, "shadow_graph must be a topology"),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Propagation(**{"channels": 6, "num_passes": 1, "heads": 2, **options})
