"""The editor: policies carried out within limits, on everything that is indexed by slot."""

import copy
import json

import pytest
import torch

import nsm_graph as nsm
from nsm_graph.memory import Every, Grow, MemoryEditor, Merge, Proposal, Prune, Split, StateManager


def propose(kind, slots, **more):
    """A policy that always wants the same."""
    slots = torch.as_tensor(slots)
    return lambda view: [Proposal(kind, slots, "so it is", **more)]


def manager_with(mass, **options):
    manager = StateManager(4, len(mass), **options)
    manager.importance_ema.copy_(torch.tensor(mass))
    return manager


def machine(**options):
    defaults = {"segment_length": 4, "heads": 2, "max_states": 6, "pool": "flatten"}
    return nsm.NeuralStateMachine(2, 8, 4, 3, **(defaults | options))


def train_step(model, optimizer, generator):
    x = torch.randn(20, 2, generator=generator)
    batch = torch.tensor([0] * 7 + [1] * 13)
    optimizer.zero_grad()
    loss = model(x, batch).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def test_proposals_become_edits_and_events():
    told = []
    manager = manager_with([0.1, 0.4, 0.3, 0.2])
    editor = MemoryEditor(manager, Every(2, Prune(lowest=1)), on_event=told.append)
    assert editor.step() == []
    (event,) = editor.step()
    assert (event.step, event.kind, event.slots, event.num_active) == (2, "prune", [0], 3)
    assert told == editor.events == [event]
    assert json.loads(json.dumps(event.to_dict())) == {
        "step": 2, "scope": "global", "kind": "prune", "slots": [0],
        "reason": "routing is lowest", "scores": [pytest.approx(0.1)], "num_active": 3,
    }  # fmt: skip
    assert event.edit.slots_after.tolist() == manager.slots.tolist() == [1, 2, 3]


def test_each_policy_sees_what_the_ones_before_have_left():
    manager = manager_with([0.1, 0.2, 0.3, 0.4])
    seen = []
    watch = lambda view: seen.append(view.slots.tolist()) or []  # noqa: E731
    MemoryEditor(manager, Prune(lowest=1), watch, Prune(lowest=1), watch).step()
    assert seen == [[1, 2, 3], [2, 3]]


def test_limits_cut_proposals_short():
    manager = manager_with([0.1, 0.2, 0.3, 0.4, 0.0, 0.0], initial_states=4)
    editor = MemoryEditor(manager, propose("prune", [0, 1, 2, 3]), min_states=3)
    (event,) = editor.step()
    assert event.slots == [0]
    assert editor.step() == []
    manager = manager_with([0.1] * 6, initial_states=2)
    (event,) = MemoryEditor(manager, propose("allocate", 9), max_states=5).step()
    assert event.slots == [2, 3, 4]
    manager = manager_with([0.1] * 6, initial_states=3)
    (event,) = MemoryEditor(manager, propose("split", [0, 1, 2]), max_states=5).step()
    assert event.slots == [[0, 3], [1, 4]]
    manager = manager_with([0.1] * 6, initial_states=4)
    (event,) = MemoryEditor(manager, propose("merge", [[0, 1], [2, 3]]), min_states=3).step()
    assert event.slots == [[0, 1]]


def test_slots_that_are_gone_by_now_are_left_out():
    manager = manager_with([0.25] * 4)
    editor = MemoryEditor(
        manager, propose("prune", [1]),
        propose("prune", [1, 2], scores=torch.tensor([5.0, 6.0])),
        propose("merge", [[0, 1]]),
    )  # fmt: skip
    first, second = editor.step()
    assert (first.slots, second.slots, second.scores) == ([1], [2], [6.0])


def test_new_states_are_protected_and_edits_cool_down():
    manager = manager_with([0.5, 0.5, 0.0, 0.0], initial_states=2)
    editor = MemoryEditor(manager, propose("allocate", 1), max_states=3)
    editor.step()
    editor.protect, editor.policies = 3, (propose("prune", [2]),)
    assert [len(editor.step()) for _ in range(4)] == [0, 0, 1, 0]
    manager = manager_with([0.25] * 4)
    editor = MemoryEditor(manager, Prune(lowest=1), cool_down=2)
    assert [len(editor.step()) for _ in range(7)] == [1, 0, 0, 1, 0, 0, 1]


def test_a_split_leaves_the_others_what_they_got_and_a_merge_takes_it_back():
    torch.manual_seed(0)
    model = machine()
    manager, router = model.manager, model.cell.router
    with torch.no_grad():
        manager.importance.normal_()
    x = torch.randn(5, 8)
    relation = nsm.Relation.complete([0, 5], [0, 4])
    before = router.route(x, router.logits(x, manager.importance, manager.slots), relation).weights
    before = relation.to_dense(before)[0]  # [N, tokens]
    edit = manager.split(torch.tensor([1]))
    assert edit.slots_after.tolist() == [0, 1, 2, 3, 4]
    relation = nsm.Relation.complete([0, 5], [0, 5])
    after = router.route(x, router.logits(x, manager.importance, manager.slots), relation).weights
    after = relation.to_dense(after)[0]
    torch.testing.assert_close(after[[0, 2, 3]], before[[0, 2, 3]], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(after[1] + after[4], before[1], rtol=1e-4, atol=1e-6)
    assert not torch.equal(manager.bank[1], manager.bank[4])
    share, mass = manager.importance[1].sigmoid(), manager.importance_ema[1].clone()
    manager.merge(torch.tensor([[1, 4]]))
    assert manager.slots.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(manager.importance[1].sigmoid(), 2 * share)
    torch.testing.assert_close(manager.importance_ema[1], 2 * mass)


def test_a_merge_mixes_rows_by_their_mass():
    manager = manager_with([0.3, 0.1, 0.6])
    rows = manager.bank.detach().clone()
    edit = manager.merge(torch.tensor([[0, 1]]))
    torch.testing.assert_close(manager.bank[0], 0.75 * rows[0] + 0.25 * rows[1])
    assert torch.equal(manager.bank[2], rows[2])
    assert manager.importance_ema[0].item() == pytest.approx(0.4)
    carried = torch.tensor([[1.0], [3.0], [5.0]])
    assert edit.apply(carried).tolist() == [[1.5], [5.0]]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.01),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        lambda p: torch.optim.Adafactor(p, lr=0.01),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    ],
    ids=["adamw", "sgd", "adafactor", "rmsprop"],
)
def test_survivors_keep_values_and_optimizer_state_bit_for_bit(make):
    torch.manual_seed(0)
    model, generator = machine(), torch.Generator().manual_seed(0)
    optimizer = make(model.parameters())
    model.manager.register_optimizer(optimizer)
    for _ in range(3):
        train_step(model, optimizer, generator)

    def rows():
        found = {"bank": model.manager.bank.detach().clone()}
        for name, x in optimizer.state[model.manager.bank].items():
            if isinstance(x, torch.Tensor) and x.dim() == 2 and x.size(0) == 6:
                found[name] = x.clone()
        return found

    before = rows()
    assert len(before) > 1
    model.manager.prune(slots=torch.tensor([2]))
    model.manager.allocate(2)
    after = rows()
    survivors = [0, 1, 3]
    for name, x in before.items():
        assert torch.equal(after[name][survivors], x[survivors]), name
        assert not torch.equal(after[name][2], x[2]), name  # fresh
    for _ in range(3):
        assert train_step(model, optimizer, generator).isfinite()


def test_what_is_not_per_row_is_left_alone_and_said(caplog):
    from nsm_graph.memory import edit

    edit._said.clear()
    model, generator = machine(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    model.manager.register_optimizer(optimizer)
    train_step(model, optimizer, generator)
    before = optimizer.state[model.manager.bank]["col_var"].clone()
    with caplog.at_level("INFO", logger="nsm_graph"):
        model.manager.prune(lowest=1)
    assert torch.equal(optimizer.state[model.manager.bank]["col_var"], before)
    assert "Adafactor keeps col_var of shape" in caplog.text


def test_observations_of_one_step_count_as_one():
    whole, parts = manager_with([0.5, 0.5]), manager_with([0.5, 0.5])
    for manager in (whole, parts):
        MemoryEditor(manager)
    whole.update_importance(torch.tensor([0.8, 0.2, 0.6, 0.4]))
    parts.update_importance(torch.tensor([0.8, 0.2]))
    parts.update_importance(torch.tensor([0.6, 0.4]))
    torch.testing.assert_close(parts.importance_ema, whole.importance_ema)
    expected = 0.99 * 0.5 + 0.01 * 0.7
    assert parts.importance_ema[0].item() == pytest.approx(expected)


def test_a_machine_feeds_the_signals_that_are_watched():
    torch.manual_seed(0)
    model = machine(watch={"gradient": 1, "update": 1}, dropout=0.0)
    x, batch = torch.randn(20, 2), torch.tensor([0] * 7 + [1] * 13)
    result = model.run(x, batch)
    states = result.state.states
    states.retain_grad()
    result.out.square().sum().backward()
    gradient = (states * states.grad).sum(1).abs().view(2, 4).mean(0)
    torch.testing.assert_close(model.manager.signal_ema("gradient")[:4], gradient)
    moved = (states - model.manager.initial(2)).norm(dim=1).view(2, 4).mean(0)
    torch.testing.assert_close(model.manager.signal_ema("update")[:4], moved.detach())
    model.eval()
    before = model.manager.signal_ema("update").clone()
    model(x, batch)
    assert torch.equal(model.manager.signal_ema("update"), before)


@pytest.mark.parametrize("position", ["learned", "rotary", "relative", None])
def test_sharpness_is_that_of_the_last_segment(position):
    torch.manual_seed(0)
    model = machine(watch={"sharpness": 1}, position=position, max_states=4)
    counts = [7, 5, 9, 0]  # last segments of 3 tokens, of 1, which says nothing, and of 1
    x, batch = torch.randn(21, 2), torch.arange(4).repeat_interleave(torch.tensor(counts))
    states = model.run(x, batch, batch_size=4).state.states.view(4, 4, 8)[0]
    tokens = model.embedding(x[4:7])
    if position == "learned":
        tokens = tokens + model.position.table[:3]
    attention = model.cell.attention
    key = attention.lin_token(tokens).view(3, 2, 4)
    if position == "rotary":
        key = model.cell.rotary(key, torch.arange(3))
    scores = torch.einsum("nhd,ihd->nhi", attention.lin_query(states).view(4, 2, 4), key) / 2
    if position == "relative":
        scores = scores + model.cell.relative.table[:3].T
    weights = scores.softmax(-1)
    entropy = -(weights * weights.log()).sum(-1) / torch.tensor(3.0).log()
    torch.testing.assert_close(model.manager.signal_ema("sharpness"), (1 - entropy).mean(1))


def test_sharpness_of_graphs_and_of_examples_that_say_nothing():
    torch.manual_seed(0)
    model = machine(watch={"sharpness": 1}, segment_length=None, num_steps=2)
    model(torch.randn(9, 2), torch.tensor([0] * 4 + [1] * 5))
    assert (model.manager.signal_ema("sharpness")[:4] > 0).all()
    model = machine(watch={"sharpness": 1}, segment_length=1)
    model(torch.randn(9, 2))
    assert not model.manager.signal_ema("sharpness").any()
    with pytest.raises(ValueError, match='mix="routing" has none'):
        machine(watch={"sharpness": 1}, mix="routing")


def test_edits_go_on_while_training_goes_on():
    torch.manual_seed(0)
    model, generator = machine(max_states=8), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.manager.register_optimizer(optimizer)
    rules = [Every(4, Grow(0.0)), Every(6, Prune(lowest=1)), Every(10, Split(0.5)),
             Every(14, Merge(-1.0))]  # fmt: skip
    editor = MemoryEditor(model.manager, *rules, min_states=2)
    for _ in range(60):
        loss = train_step(model, optimizer, generator)
        assert loss.isfinite()
        editor.step(loss)
    assert {event.kind for event in editor.events} == {"allocate", "prune", "split", "merge"}
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: m.prune(slots=torch.tensor([9])), r"cannot prune slots \[9\]"),
        (lambda m: m.prune(slots=torch.tensor([0, 0])), "each of which can be named once"),
        (lambda m: m.prune(slots=torch.arange(4)), "leaves 0 states, but min_states=1"),
        (lambda m: m.split(torch.tensor([5])), r"cannot split slots \[5\]"),
        (lambda m: m.split(torch.tensor([0, 1, 2])), "so 2 can be added"),
        (lambda m: m.merge(torch.tensor([[0, 0]])), r"cannot merge slots \[0, 0\]"),
        (lambda m: m.merge(torch.tensor([[0, 1], [1, 2]])), "each of which can be named once"),
        (lambda m: m.signal_ema("surprise"), "watches routing, but not 'surprise'"),
        (lambda m: MemoryEditor(m, min_states=0), "the manager's limits, but got 0 and 6"),
        (lambda m: MemoryEditor(m, max_states=7), "the manager's limits, but got 1 and 7"),
        (lambda m: MemoryEditor(m, max_states=3), "max_states=3, but 4 states are active"),
        (lambda m: MemoryEditor(m, [Prune(lowest=1)]), "pass each policy as an argument"),
        (lambda m: MemoryEditor(m, Prune), "pass each policy as an argument"),
        (lambda m: MemoryEditor(m, lambda view: None).step(), "a list of proposals, but gave None"),
        (lambda m: m.merge(torch.tensor([0, 1])), r"pairs must have shape \(K, 2\)"),
        (lambda m: m.prune(slots=[0]), r"a tensor of int64 numbers, \(K,\), but are \[0\]"),
        (lambda m: m.split(torch.tensor([0.0])), "a tensor of int64 numbers"),
        (lambda m: MemoryEditor(m, propose("eat", [1])).step(), "a proposal is one of allocate"),
        (lambda m: StateManager(4, 6, watch={"routing": 10}), "other than routing"),
        (lambda m: StateManager(4, 6, watch={"gradient": 0.5}), "horizons of at least 1"),
    ],
)
def test_wrong_edits(act, message):
    manager = manager_with([0.1] * 6, initial_states=4)
    before = {name: x.clone() for name, x in manager.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        act(manager)
    assert all(torch.equal(x, before[name]) for name, x in manager.state_dict().items())


def test_no_edit_during_backward():
    model = machine()
    result = model.run(torch.randn(6, 2))
    result.state.states.register_hook(lambda grad: model.manager.prune(lowest=1) and None)
    with pytest.raises(ValueError, match="during backward; edit between steps"):
        result.out.sum().backward()
    assert model.manager.num_active == 4


def test_states_that_come_in_one_step_are_not_alike():
    manager = StateManager(4, 8, initial_states=2)
    MemoryEditor(manager, Grow(0.0), Grow(0.0), propose("allocate", 1)).step()
    rows = manager.bank.detach()[2:5]
    assert torch.cdist(rows, rows).fill_diagonal_(1.0).min() > 0.01


def test_what_was_carried_out_is_told_even_if_a_later_policy_raises():
    manager, told = StateManager(4, 8, initial_states=2), []
    editor = MemoryEditor(manager, Grow(0.0), Split(signal="surprise"), on_event=told.append)
    with pytest.raises(ValueError, match=r"does not watch 'surprise', but routing; .* watch="):
        editor.step()
    assert [event.kind for event in told] == [event.kind for event in editor.events] == ["allocate"]


def test_an_edit_between_observations_is_not_undone():
    manager = manager_with([0.3, 0.1, 0.6])
    MemoryEditor(manager)
    manager.update_importance(torch.tensor([0.3, 0.1, 0.6]))
    manager.merge(torch.tensor([[0, 1]]))
    manager.update_importance(torch.tensor([0.4, 0.6]))
    assert manager.importance_ema[0].item() == pytest.approx(0.4)


def test_examples_without_tokens_say_nothing():
    torch.manual_seed(0)
    found = []
    for batch_size in (1, 4):
        torch.manual_seed(1)
        model = machine(watch={"gradient": 1, "update": 1})
        x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
        out = model.run(x, torch.zeros(9).long(), batch_size=batch_size).out
        out[0].square().sum().backward()
        found.append([model.manager.signal_ema(n)[:4] for n in ("update", "gradient")])
    for one, four in zip(*found, strict=True):
        torch.testing.assert_close(one, four)
        assert (one > 0).all()


def test_ages_count_from_the_beginning():
    manager = manager_with([0.25] * 4, initial_states=3)
    editor = MemoryEditor(manager, propose("allocate", 1), protect=50)
    editor.step()
    editor.step()
    assert editor.view().age.tolist() == [2, 2, 2, 1]


def test_a_frozen_bank_registers_an_optimizer_of_the_rest():
    model, generator = machine(), torch.Generator().manual_seed(0)
    model.manager.bank.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.manager.register_optimizer(optimizer)
    train_step(model, optimizer, generator)
    model.manager.prune(lowest=1)
    assert train_step(model, optimizer, generator).isfinite()


@pytest.mark.parametrize("start", [torch.inference_mode, torch.no_grad])
def test_an_evaluation_first_leaves_training_as_it_is(start):
    model = machine()
    for change in (lambda: None, lambda: model.manager.prune(lowest=1)):
        change()
        with start():
            model.eval()(torch.randn(6, 2))
        model.train()(torch.randn(6, 2)).sum().backward()
    with torch.inference_mode():
        assert machine()(torch.randn(6, 2)).shape == (1, 3)


def test_function_transforms_leave_nothing_behind():
    model, x = machine(), torch.randn(6, 2)
    before = model.manager.importance_ema.clone()

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    grads = torch.func.grad(loss)(dict(model.named_parameters()))
    assert torch.equal(model.manager.importance_ema, before)
    copy.deepcopy(model)(x).square().sum().backward()
    model(x).square().sum().backward()
    torch.testing.assert_close(grads["manager.bank"], model.manager.bank.grad, rtol=1e-4, atol=1e-5)
