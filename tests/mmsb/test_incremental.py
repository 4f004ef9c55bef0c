"""Delta propagation: an update equals a full recomputation, whatever changed."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsm_graph import Relation, topology
from nsm_graph.memory import NodeEdit
from nsm_graph.mmsb import Propagation, neighbourhood
from nsm_graph.testing import assert_close_to_norm

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@topology.rule
def every_third(nodes):
    """A general rule: edges from every third page to all of its example."""
    src, dst = topology.complete()(nodes).edge_index
    return torch.stack([src, dst])[:, nodes.position[src] % 3 == 0]


RULES = {
    "complete": topology.complete(),
    "causal": topology.causal(),
    "window": topology.window(2),
    "band": topology.band(1),
    "ring": topology.ring(1),
    "star": topology.star() | topology.self_loops(),
    "alibi": topology.causal().biased(lambda edges: -0.3 * edges.distance),
    "custom": every_third,
    "nearest": topology.knn(2),
    "random": topology.random(2),
    "scheduled": topology.scheduled({0: topology.window(1), 1: topology.complete()}),
}
LEAST = 4  # pages of an example, so that every rule has a meaning


def make(rule, dtype, *, norm_first=False, num_passes=3):
    stack = Propagation(
        8, num_passes, 2, shadow_graph=rule, norm_first=norm_first, final_norm=norm_first,
        feedforward_channels=12,
    )  # fmt: skip
    return stack.to(dtype).eval()


def assert_current(stack, result, pages, batch=None, **given):
    out = stack.run(pages, batch, **given)
    tolerance = TOLERANCE[pages.dtype]
    assert_close_to_norm(result, out.pages, tolerance, "pages")
    assert_close_to_norm(stack.cache.pages, out.pages, tolerance, "cache")
    pairs = zip(stack.cache.snapshots, out.snapshots, strict=True)
    for step, (kept, made) in enumerate(pairs):
        assert_close_to_norm(kept, made, tolerance, f"P_{step}")


@settings(max_examples=60)
@given(data=st.data(), rule=st.sampled_from(sorted(RULES)), dtype=st.sampled_from([*TOLERANCE]))
def test_chains_of_updates_equal_recomputation(data, rule, dtype):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    stack = make(RULES[rule], dtype, norm_first=data.draw(st.booleans()))
    counts = data.draw(st.lists(st.integers(LEAST, 9), min_size=1, max_size=3))
    examples = [torch.randn(count, 8, dtype=dtype) for count in counts]
    stack.run(*joined(examples), cache=True)
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["change", "edit", "append"]))
        pages, batch = joined(examples)
        if kind == "change":
            rows = data.draw(st.sets(st.integers(0, len(pages) - 1), max_size=4))
            pages[list(rows)] = torch.randn(len(rows), 8, dtype=dtype)
            examples = list(pages.split([len(x) for x in examples]))
            changed = data.draw(st.sampled_from([list(rows), mask_of(rows, len(pages)), None]))
            result = stack.update(pages, changed)
        elif kind == "append" and len(examples) == 1:
            fresh = torch.randn(data.draw(st.integers(1, 3)), 8, dtype=dtype)
            examples = [torch.cat([examples[0], fresh])]
            pages, batch = joined(examples)
            if data.draw(st.booleans()):
                result = stack.update(pages, [])
            else:
                last = stack.append(fresh)
                assert torch.equal(last, stack.cache.pages[-len(fresh) :])
                result = stack.cache.pages
        else:
            examples, new_to_old = edited(data, examples)
            pages, batch = joined(examples)
            result = stack.update(pages, [], edit=new_to_old, batch=batch)
        assert_current(stack, result, *joined(examples))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_after_each_kind_of_change(rule, dtype):
    stack, pages = make(RULES[rule], dtype), torch.randn(30, 8, dtype=dtype)
    stack.run(pages, cache=True)
    for rows in ([21], [3, 4], [11, 25], [29]):
        pages[rows] = torch.randn(len(rows), 8, dtype=dtype)
        assert_current(stack, stack.update(pages, rows), pages)
    rows = torch.tensor([*range(12), -1, *range(14, 30), -1])
    pages = torch.where((rows < 0).unsqueeze(1), torch.randn(1, 8, dtype=dtype), pages[rows])
    assert_current(stack, stack.update(pages, [], edit=rows), pages)
    pages = torch.cat([pages, torch.randn(2, 8, dtype=dtype)])
    stack.append(pages[-2:])
    assert_current(stack, stack.cache.pages, pages)


def joined(examples):
    counts = torch.tensor([len(x) for x in examples])
    return torch.cat(examples), torch.arange(len(examples)).repeat_interleave(counts)


def mask_of(rows, count):
    mask = torch.zeros(count, dtype=torch.bool)
    mask[list(rows)] = True
    return mask


def edited(data, examples):
    """Pages deleted, inserted and moved in every example."""
    new_to_old, changed, first = [], [], 0
    for x in examples:
        rows = data.draw(st.lists(st.integers(0, len(x) - 1), unique=True, max_size=len(x)))
        rows = rows if data.draw(st.booleans()) else sorted(rows)
        for _ in range(max(LEAST - len(rows), data.draw(st.integers(0, 2)))):
            rows.insert(data.draw(st.integers(0, len(rows))), -1)
        fresh = torch.randn(len(rows), 8, dtype=x.dtype)
        old = torch.tensor(rows)
        changed.append(torch.where((old < 0).unsqueeze(1), fresh, x[old]))
        new_to_old += [row + first if row >= 0 else -1 for row in rows]
        first += len(x)
    return changed, torch.tensor(new_to_old)


# What each topology costs ##########################################################


class Counter:
    """Rows that each pass computes: those that its page update sees."""

    def __init__(self, stack):
        self.rows = []
        for refine in stack.passes:
            refine.lin_in.register_forward_hook(lambda *given: self.rows.append(len(given[2])))

    def take(self):
        rows, self.rows = self.rows, []
        return rows


def test_only_what_is_reached_is_computed():
    pages = torch.randn(200, 8)
    for rule, rows in {
        topology.window(3): [4, 7, 10],
        topology.band(2): [5, 9, 13],
        topology.ring(1): [3, 5, 7],
        topology.causal(): [80, 80, 80],
        topology.complete(): [200, 200, 200],
        topology.self_loops(): [1, 1, 1],
    }.items():
        stack = make(rule, torch.float32)
        stack.run(pages, cache=True)
        counter = Counter(stack)
        stack.update(pages, [120])
        assert counter.take() == rows, rule
        stack.update(pages, [])
        assert counter.take() == []


def test_one_page_more_costs_one_row_a_pass_where_nobody_hears_it():
    for rule in (topology.causal(), topology.window(3)):
        stack, pages = make(rule, torch.float32), torch.randn(90, 8)
        stack.run(pages[:80], cache=True)
        counter = Counter(stack)
        for row in range(80, 84):
            stack.append(pages[row : row + 1])
            assert counter.take() == [1, 1, 1]
        stack.append(pages[84:])
        assert counter.take() == [6, 6, 6]
        assert_current(stack, stack.cache.pages, pages)


def test_a_deleted_page_costs_those_that_heard_it():
    stack, pages = make(topology.window(2), torch.float64), torch.randn(50, 8).double()
    stack.run(pages, cache=True)
    counter, rows = Counter(stack), torch.cat([torch.arange(20), torch.arange(21, 50)])
    result = stack.update(pages[rows], [], edit=rows)
    # The next two now hear one that lies farther back, and are heard by two more in each pass.
    assert counter.take() == [2, 4, 6]
    assert_current(stack, result, pages[rows])


def test_appending_asks_no_rule_for_the_edges_of_all_pages(monkeypatch):
    stack, pages = make(topology.causal(), torch.float32), torch.randn(40, 8)
    stack.run(pages[:30], cache=True)
    expected = stack(pages)

    def refuse(*_):
        raise AssertionError("edges of all pages were made")

    monkeypatch.setattr(type(stack.shadow_graph), "forward", refuse)
    monkeypatch.setattr(type(stack.shadow_graph), "rows", refuse)
    for row in range(30, 40):
        last = stack.append(pages[row : row + 1])
    assert_close_to_norm(last, expected[-1:], 1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_many_rows_with_a_mask_are_attended_in_parts(dtype, monkeypatch):
    monkeypatch.setattr(neighbourhood, "MAX_MASKED_PAIRS", 100)
    for rule in (topology.causal(), topology.window(30), topology.band(25)):
        stack, pages = make(rule, dtype), torch.randn(40, 8, dtype=dtype)
        stack.run(pages, cache=True)
        pages[15] = 0.0
        assert_current(stack, stack.update(pages, [15]), pages)
        pages = torch.cat([pages, pages[:9]])
        stack.append(pages[40:])
        assert_current(stack, stack.cache.pages, pages)


def test_room_doubles_and_old_rows_stay_bit_for_bit():
    stack, pages = make(topology.causal(), torch.float32), torch.randn(600, 8)
    stack.run(pages[:1], cache=True)
    sizes = set()
    for row in range(1, 600):
        before = stack.cache.pages.clone()
        stack.append(pages[row : row + 1])
        assert torch.equal(stack.cache.pages[:row], before)
        sizes.add(stack.cache.num_bytes)
    assert len(sizes) == 10
    assert max(sizes) == 1024 * (3 * 3 + 1) * 8 * 4
    assert_current(stack, stack.cache.pages, pages)


# Forms of what changed #############################################################


def test_forms_of_changed_give_the_same():
    stack, pages = make(topology.ring(1), torch.float64), torch.randn(30, 8).double()
    new = pages.clone()
    new[[3, 4, 5]] = torch.randn(3, 8).double()
    results = []
    for changed in (
        [5, 3, 4, 3],
        slice(3, 6),
        torch.tensor([3, 4, 5]),
        mask_of({3, 4, 5}, 30),
        None,
    ):
        stack.run(pages, cache=True)
        results.append(stack.update(new, changed))
        assert_current(stack, results[-1], new)
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_node_edit_is_an_edit():
    stack, pages = make(topology.ring(1), torch.float64), torch.randn(6, 8).double()
    slots = torch.arange(6)
    for edit in (
        NodeEdit(torch.tensor([0, 1, 3, 4, 5, -1]), slots, slots),
        NodeEdit(torch.tensor([[0, -1], [1, 2], [3, -1], [4, -1], [5, -1]]), slots, slots[:5]),
    ):
        stack.run(pages, cache=True)
        new = edit.apply(pages, fresh=1.0)
        assert_current(stack, stack.update(new, [], edit=edit), new)


def test_examples_may_be_joined_and_the_shadow_graph_exchanged():
    stack, pages = make(topology.window(2), torch.float64), torch.randn(12, 8).double()
    halves, one = torch.arange(2).repeat_interleave(6), torch.zeros(12, dtype=torch.long)
    stack.run(pages, halves, cache=True)
    assert_current(stack, stack.update(pages, [], batch=one), pages)
    edges = topology.ring(2)(topology.NodeSet.from_counts([12])).edge_index
    for graph in (
        topology.causal(),
        edges,
        edges[:, 5:],
        Relation.complete([0, 5, 12], [0, 5, 12]),
    ):
        result = stack.update(pages, [3], shadow_graph=graph)
        assert_current(stack, result, pages, shadow_graph=graph)


def test_an_edge_more_or_less_recomputes_its_target():
    stack, pages = make(None, torch.float64), torch.randn(40, 8).double()
    edges = torch.stack([torch.arange(40), torch.arange(40)])
    stack.run(pages, shadow_graph=edges, cache=True)
    counter = Counter(stack)
    more = torch.cat([edges, torch.tensor([[7], [9]])], 1)
    result = stack.update(pages, [], shadow_graph=more)
    assert counter.take() == [1, 1, 1]
    assert_current(stack, result, pages, shadow_graph=more)
    bias = torch.zeros(41, dtype=torch.double)
    bias[40] = 1.0  # of the edge from 7 to 9, which hears itself as well
    biased = Relation.from_edge_index(more, (40, 40)).with_bias(bias)
    plain = Relation.from_edge_index(more, (40, 40)).with_bias(0 * bias)
    stack.update(pages, [], shadow_graph=plain)
    counter.take()
    result = stack.update(pages, [], shadow_graph=biased)
    assert counter.take() == [1, 1, 1]
    assert_current(stack, result, pages, shadow_graph=biased)


def test_attributes_follow_edits():
    stack, pages = make(topology.blocks(by="kind"), torch.float64), torch.randn(9, 8).double()
    kind = torch.arange(9) % 2
    stack.run(pages, attributes={"kind": kind}, cache=True)
    rows = torch.tensor([0, 1, 3, 4, 5, 8])
    given = {"kind": kind[rows]}
    result = stack.update(pages[rows], [], edit=rows, attributes=given)
    assert_current(stack, result, pages[rows], attributes=given)
    given = {"kind": 1 - given["kind"].roll(1)}
    assert_current(
        stack, stack.update(pages[rows], [], attributes=given), pages[rows], attributes=given
    )


def test_a_cache_may_be_kept_aside():
    stack = make(topology.causal(), torch.float64)
    one, other = torch.randn(6, 8).double(), torch.randn(4, 8).double()
    kept = stack.run(one[:5], cache=True).cache
    stack.run(other[:3], cache=True)
    first, second = stack.append(one[5:], cache=kept), stack.append(other[3:])
    assert_close_to_norm(first, stack(one)[5:], 1e-12)
    assert_close_to_norm(second, stack(other)[3:], 1e-12)
    assert repr(kept).startswith("PropagationCache(6 pages, 3 passes")


def test_a_stream_may_branch():
    stack, pages = make(topology.causal(), torch.float64), torch.randn(7, 8).double()
    kept = stack.run(pages[:5], cache=True).cache
    branch = kept.clone()
    one, other = stack.append(pages[5:6]), stack.append(pages[6:7], cache=branch)
    assert_close_to_norm(one, stack(pages[:6])[5:], 1e-12)
    assert_close_to_norm(other, stack(pages[[0, 1, 2, 3, 4, 6]])[5:], 1e-12)
    assert kept.num_pages == branch.num_pages == 6


def test_results_are_the_callers_own():
    stack, pages = make(topology.causal(), torch.float32), torch.randn(9, 8)
    stack.run(pages[:7], cache=True)
    results = [stack.update(pages[:7], [6]), stack.append(pages[7:8]), stack.append(pages[8:])]
    for result in results:
        result.zero_()
    assert_current(stack, stack.update(pages, []), pages)


def test_updates_inside_and_outside_of_inference_mode():
    stack, pages = make(topology.causal(), torch.float32), torch.randn(9, 8)
    with torch.inference_mode():
        stack.run(pages[:6], cache=True)
        stack.append(pages[6:7])
    stack.append(pages[7:8])
    with torch.inference_mode():
        stack.update(pages, [8])
    assert_current(stack, stack.cache.pages, pages)


def test_a_run_with_a_cache_keeps_its_gradients():
    stack, pages = make(topology.causal(), torch.float64), torch.randn(5, 8).double()
    pages.requires_grad_()
    out = stack.run(pages, cache=True)
    (kept,) = torch.autograd.grad(out.pages.square().sum(), pages)
    (plain,) = torch.autograd.grad(stack(pages).square().sum(), pages)
    assert torch.equal(kept, plain)
    assert not out.cache.pages.requires_grad


# What is refused ###################################################################


def change_in_place(stack):
    with torch.no_grad():
        stack.passes[1].lin_in.weight.mul_(2.0)


def train_a_step(stack):
    optimizer = torch.optim.SGD(stack.parameters(), lr=0.1)
    stack(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()


def exchange(stack):
    stack.passes[2] = copy.deepcopy(stack.passes[2])


def exchange_graph(stack):
    stack.shadow_graph = topology.complete()


def replace_weight(stack):
    stack.passes[0].lin_out.weight = torch.nn.Parameter(torch.randn(8, 12))


@pytest.mark.parametrize(
    "change",
    [change_in_place, train_a_step, exchange, exchange_graph, replace_weight],
)
def test_other_weights_are_noticed(change):
    stack, pages = make(topology.causal(), torch.float32), torch.randn(6, 8)
    stack.run(pages[:5], cache=True)
    change(stack)
    for call in (lambda: stack.update(pages[:5], [0]), lambda: stack.append(pages[5:])):
        with pytest.raises(
            ValueError, match="weights or shadow graph are not those that the cache"
        ):
            call()
    stack.run(pages[:5], cache=True)
    assert_current(stack, stack.update(pages, []), pages)


def test_a_learned_shadow_graph_that_was_handed_over_counts_as_weights():
    stack, pages = make(topology.causal(), torch.float32), torch.randn(6, 8)
    graph = topology.complete().biased(topology.DistanceBias(2))
    stack.run(pages, shadow_graph=graph, cache=True)
    torch.nn.init.ones_(graph.bias.weight)
    with pytest.raises(ValueError, match="weights or shadow graph are not those"):
        stack.update(pages, [0])


X = torch.randn(6, 8)
ONE, TWO = torch.zeros(6, dtype=torch.long), torch.tensor([0, 0, 0, 1, 1, 1])
BAD = [
    (lambda s: s.update(X, [0, 6, 7]), r"changed names pages outside 0..5: row 1: 6, row 2: 7"),
    (lambda s: s.update(X, [-1]), r"changed names pages outside 0..5: row 0: -1"),
    (lambda s: s.update(X, torch.ones(5, dtype=torch.bool)), "one entry for each of the 6 pages"),
    (lambda s: s.update(X, [0.5]), "changed must hold row indices or a mask"),
    (lambda s: s.update(X, slice(0, 4, 2)), "changed must be a slice without a step"),
    (lambda s: s.update(X[:4], []), "pages has 4 rows, but the cache has 6 pages"),
    (lambda s: s.update(X[:, :4], []), r"pages must have shape \(nodes, 8\)"),
    (lambda s: s.update(X.double(), []), "pages is torch.float64"),
    (lambda s: s.update(X, [], edit=[0, 1]), "edit has 2 rows, but pages has 6"),
    (lambda s: s.update(X[:2], [], edit=[0, 9]), "rows outside the 6 pages of the cache: row 1: 9"),
    (lambda s: s.update(X[:2], [], edit=[0, -2]), "row 1: -2"),
    (lambda s: s.update(X[:2], [], edit=[[0], [1]]), "edit must name one old row for each page"),
    (
        lambda s: s.update(X[:2], [], edit=NodeEdit(*[torch.arange(2)] * 3)),
        "the edit starts from 2 rows, but the cache has 6 pages",
    ),
    (lambda s: s.update(X, [], batch=TWO[:4]), "batch has 4 entries"),
    (lambda s: s.update(X, [], shadow_graph=7), "shadow_graph must be a topology"),
    (
        lambda s: s.update(X, [], shadow_graph=torch.tensor([[0], [9]])),
        "edge_index names target 9, but there are 6.*edge 0: 0 -> 9",
    ),
    (lambda s: s.update(X, [], shadow_graph=torch.zeros(2, 0).long()), "has no edge among the 6"),
    (
        lambda s: s.update(X, [], shadow_graph=topology.from_adjacency(torch.eye(4))),
        r"from_adjacency\(4 edges, 4 nodes\) is for examples of 4 nodes, but one has 6",
    ),
    (lambda s: s.update(X.clone().requires_grad_(), []), "updates carry no gradients"),
    (lambda s: s.append(X[:, :4]), r"pages must have shape \(nodes, 8\)"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused_and_the_cache_stays_as_it_was(call, message):
    stack = make(topology.causal(), torch.float32)
    stack.run(X, cache=True)
    with pytest.raises(ValueError, match=message):
        call(stack)
    assert_current(stack, stack.update(X, []), X)


def test_without_a_run_there_is_nothing_to_update():
    for call in (lambda s: s.update(X, [0]), lambda s: s.append(X)):
        with pytest.raises(
            ValueError, match=r"nothing was kept yet; call run\(pages, cache=True\)"
        ):
            call(make(topology.causal(), torch.float32))


def test_dropout_and_updates_exclude_each_other():
    stack = Propagation(8, 2, 2, dropout=0.1)
    with pytest.raises(ValueError, match=r"dropout is active; call eval\(\) first"):
        stack.run(X, cache=True)
    stack.eval().run(X, cache=True)
    with pytest.raises(ValueError, match="dropout is active"):
        stack.train().update(X, [0])
    calm = Propagation(8, 2, 2)
    calm.run(X, cache=True)
    assert_current(calm, calm.update(X, [0]), X)


def test_several_examples_need_a_batch_to_grow():
    stack = make(topology.causal(), torch.float32)
    stack.run(X, TWO, cache=True)
    with pytest.raises(ValueError, match="append is about one example, but the cache holds 2"):
        stack.append(X[:1])
    with pytest.raises(ValueError, match="in 2 examples; say with edit="):
        stack.update(torch.cat([X, X]), [])
    with pytest.raises(ValueError, match="there are 2 examples; say with batch="):
        stack.update(X[:5], [], edit=torch.arange(5))


def test_an_update_that_is_cut_short_cannot_be_built_on():
    stack = make(topology.knn(4), torch.float32)
    stack.run(X, cache=True)
    with pytest.raises(ValueError, match=r"knn\(4\) needs more than 4 nodes"):
        stack.update(X[:3], [], edit=torch.arange(3))
    with pytest.raises(ValueError, match="the last update was cut short"):
        stack.update(X, [0])
    stack.run(X, cache=True)
    assert_current(stack, stack.update(X, [0]), X)


def test_a_graph_of_given_edges_needs_another_one_to_grow():
    stack, edges = make(None, torch.float32), torch.stack([torch.arange(6), torch.arange(6)])
    stack.run(X, shadow_graph=Relation.from_edge_index(edges, (6, 6)), cache=True)
    more = torch.cat([X, X[:1]])
    with pytest.raises(ValueError, match="6 to 6 nodes, but there are 7 pages"):
        stack.append(X[:1])
    grown = Relation.from_edge_index(torch.stack([torch.arange(7), torch.arange(7)]), (7, 7))
    assert_current(stack, stack.update(more, [], shadow_graph=grown), more, shadow_graph=grown)


def test_a_cache_of_another_stack_is_refused():
    one, other = (make(topology.causal(), torch.float32) for _ in range(2))
    kept = one.run(X, cache=True).cache
    with pytest.raises(ValueError, match="the cache was made by another stack"):
        other.update(X, [0], cache=kept)


def test_a_rule_is_asked_once_a_pass_also_where_a_cache_is_made():
    asked = []

    @topology.rule(is_dynamic=True)
    def watched(nodes):
        asked.append(nodes.step)
        return topology.knn(2)(nodes)

    stack = make(watched, torch.float32)
    stack.run(X, cache=True)
    stack.update(X, [])
    assert asked == [0, 1, 2, 0, 1, 2]


def test_copies_of_a_cache_do_not_share():
    stack = make(topology.causal(), torch.float32)
    stack.run(X, cache=True)
    assert pickle.loads(pickle.dumps(stack)).cache is None


@pytest.mark.parametrize("rule", [topology.causal(), topology.band(700)], ids=repr)
def test_long_ranges_in_several_examples_go_one_by_one(rule):
    stack = Propagation(4, 2, 2, shadow_graph=rule).eval()
    counts = torch.tensor([1500, 3, 1300])
    batch = torch.arange(3).repeat_interleave(counts)
    pages = torch.randn(int(counts.sum()), 4)
    stack.run(pages, batch, cache=True)
    changed = [700, 1501, 2400]
    pages[changed] = torch.randn(3, 4)
    assert_close_to_norm(stack.update(pages, changed), stack(pages, batch), 1e-6)
