"""Delta propagation: an update equals a full recomputation, whatever changed."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsm_graph import topology
from nsm_graph.mmsb import Propagation
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
