"""The rivals read ragged batches as the machine does: no padding enters, no neighbour matters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nsm_graph.models.baselines import (
    RecurrentBaseline,
    TransformerBaseline,
    count_parameters,
    match_parameters,
)

KINDS = ("gru", "lstm", "transformer")
HEADS = ("example", "token", "next_token")


def make(kind, *, channels=8, head="example", **options):
    torch.manual_seed(0)
    if kind == "transformer":
        return TransformerBaseline(3, channels, 5, heads=2, head=head, **options).eval()
    return RecurrentBaseline(3, channels, 5, cell=kind, head=head, **options).eval()


def batch_of(lengths):
    generator = torch.Generator().manual_seed(sum(lengths) + len(lengths))
    x = torch.randn(sum(lengths), 3, generator=generator)
    return x, torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_an_example_does_not_depend_on_its_neighbours(kind, head, lengths):
    model = make(kind, head=head)
    x, batch = batch_of(lengths)
    together = model(x, batch, batch_size=len(lengths))
    alone = [model(x[batch == b], batch_size=1) for b in range(len(lengths))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)
    assert torch.isfinite(together).all()


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_recurrent_baseline_is_the_plain_recurrence(kind):
    model = make(kind)
    x, _ = batch_of([7])
    steps, _ = model.recurrence(model.embedding(x).unsqueeze(0))
    torch.testing.assert_close(model(x), model.out(steps[:, -1]))


@pytest.mark.parametrize("kind", KINDS)
def test_next_token_sees_nothing_of_what_follows(kind):
    model = make(kind, head="next_token")
    x, batch = batch_of([6, 4])
    changed = x.clone()
    changed[3:6] += 1.0
    torch.testing.assert_close(model(x, batch)[:3], model(changed, batch)[:3])


def test_transformer_with_a_token_head_sees_all_tokens():
    model = make("transformer", head="token")
    x, batch = batch_of([6])
    changed = x.clone()
    changed[5] += 1.0
    assert (model(x, batch)[0] - model(changed, batch)[0]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_carried_state_continues_the_sequence(kind):
    model = make(kind, head="next_token")
    x, _ = batch_of([9])
    first = model.run(x[:4])
    second = model.run(x[4:], state=first.state.detach())
    torch.testing.assert_close(torch.cat([first.out, second.out]), model(x))
    assert not any(tensor.requires_grad for tensor in first.state.detach().tensors)


def test_an_example_without_tokens_keeps_its_state():
    model = make("gru")
    x, batch = batch_of([3, 2])
    before = model.run(x, batch).state
    after = model.run(x[:3], batch[:3], before, batch_size=2).state
    assert torch.equal(after.tensors[0][:, 1], before.tensors[0][:, 1])


def test_symbols_are_embedded_and_columns_add_up():
    model = RecurrentBaseline(2, 8, 5, num_embeddings=[4, 6])
    assert model(torch.tensor([[0, 5], [3, 0]])).shape == (1, 5)
    with pytest.raises(ValueError, match=r"x holds the symbol 4, .* from 0 to 3"):
        model(torch.tensor([[4, 0]]))
    with pytest.raises(ValueError, match=r"x must hold symbols"):
        model(torch.zeros(3, 2))


def test_positional_encodings_enter():
    model = make("transformer", pe_channels=4)
    x, _batch = batch_of([3])
    assert (model(x, pe=torch.ones(3, 4)) - model(x, pe=torch.zeros(3, 4))).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"pe: expected pe_channels=4; got nothing"):
        model(x)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_named(kind):
    model = make(kind)
    x, batch = batch_of([2, 2])
    with pytest.raises(ValueError, match=r"x must have shape \(tokens, 3\)"):
        model(x[:, :2], batch)
    with pytest.raises(ValueError, match=r"batch must be sorted, but goes back 1 times"):
        model(x, batch.flip(0))
    with pytest.raises(
        ValueError, match=r"batch must have one entry per row of x, 4, but has shape \(3,\)"
    ):
        model(x, batch[:3])
    with pytest.raises(ValueError, match=r"batch holds the example 1, but there are 1 examples"):
        model(x, batch, batch_size=1)


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match=r"cell must be one of 'gru', 'lstm', but is 'rnn'"):
        RecurrentBaseline(1, 8, 2, cell="rnn")
    with pytest.raises(
        ValueError, match=r"head must be one of 'example', 'token', 'next_token', but is 'graph'"
    ):
        RecurrentBaseline(1, 8, 2, head="graph")
    with pytest.raises(ValueError, match=r"channels: expected a multiple of heads=4; got 6"):
        TransformerBaseline(1, 6, 2)


@settings(max_examples=30, deadline=None)
@given(target=st.integers(1, 200_000), kind=st.sampled_from(KINDS))
def test_match_parameters_finds_the_nearest_width(target, kind):
    step = 2 if kind == "transformer" else 1
    sizes = {}

    def build(channels):
        model = make(kind, channels=channels)
        sizes[channels] = count_parameters(model)
        return model

    with torch.random.fork_rng():
        width = match_parameters(build, target, step=step)
        gap = abs(count_parameters(build(width)) - target)
        for other in (width - step, width + step):
            assert other < 1 or gap <= abs(count_parameters(build(other)) - target)


def test_match_parameters_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    match_parameters(lambda width: nn.Linear(width, 1), 100)
    assert torch.equal(torch.rand(2), expected)
