"""DeltaNet as a rival: the recurrence token by token, ragged batches, carried state."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsm_graph.models.baselines import RecurrentBaseline, count_parameters, match_parameters
from nsm_graph.models.delta_net import DeltaNetBaseline

HEADS = ("example", "token", "next_token")
heads = pytest.mark.parametrize("head", HEADS)


def make(*, channels=8, head="example", dtype=torch.float, seed=0, **options):
    """A model whose every number is drawn from the seed."""
    torch.manual_seed(seed)
    options = {"heads": 2} | options
    model = DeltaNetBaseline(3, channels, 5, head=head, **options).to(dtype).eval()
    with torch.no_grad():  # away from the neutral start, where mistakes could hide
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.normal_(1.0, 0.3)
                module.bias.normal_(0.0, 0.3)
        for layer in model.layers:
            for p in layer.convolution.parameters():
                p.normal_(0.0, 0.4)
    return model


def batch_of(lengths, dtype=torch.float):
    generator = torch.Generator().manual_seed(sum(lengths) + len(lengths))
    x = torch.randn(sum(lengths), 3, generator=generator, dtype=torch.double).to(dtype)
    return x, torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def affine(w, name, x):
    return w[f"{name}.weight"] @ x + w[f"{name}.bias"]


def layer_norm(w, name, x):
    centred = x - x.mean()
    scale = (centred.square().mean() + 1e-5).sqrt()
    return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def unit(v):
    return v / v.square().sum().sqrt()


def oracle_layer(w, name, xs, heads, reflections):
    """One layer over the tokens of one example, with every token's matrix built."""
    width = len(xs[0]) // heads
    memories = [xs[0].new_zeros(width, width) for _ in range(heads)]
    before, outs = torch.zeros_like(xs[0]), []
    for x in xs:
        normed = layer_norm(w, f"{name}.norm", x)
        mixed = normed + affine(w, f"{name}.convolution.lin", torch.cat([before, normed]))
        before, reads = normed, []
        keys = affine(w, f"{name}.lin_key", mixed).view(heads, reflections, width)
        values = affine(w, f"{name}.lin_value", mixed).view(heads, reflections, width)
        betas = 2 * affine(w, f"{name}.lin_beta", mixed).view(heads, reflections).sigmoid()
        queries = affine(w, f"{name}.lin_query", mixed).view(heads, width)
        for h in range(heads):
            for r in range(reflections):
                k, beta = unit(keys[h, r]), betas[h, r]
                keep = torch.eye(width, dtype=k.dtype) - beta * torch.outer(k, k)
                memories[h] = keep @ memories[h] + beta * torch.outer(k, values[h, r])
            read = unit(queries[h]) @ memories[h]
            reads.append(layer_norm(w, f"{name}.head_norm", read))
        x = x + affine(w, f"{name}.lin_out", torch.cat(reads))
        hidden = layer_norm(w, f"{name}.feed_forward.0", x)
        hidden = gelu(affine(w, f"{name}.feed_forward.1", hidden))
        outs.append(x + affine(w, f"{name}.feed_forward.3", hidden))
    return outs, torch.stack(memories)


def oracle(model, x, head, num_layers=1, heads=2, reflections=2):
    """Predictions of one example, and the memories of its layers."""
    w, memories = dict(model.named_parameters()), []
    xs = [affine(w, "embedding.lin", token) for token in x]
    for layer in range(num_layers):
        xs, memory = oracle_layer(w, f"layers.{layer}", xs, heads, reflections)
        memories.append(memory)
    xs = xs[-1:] if head == "example" else xs
    outs = [affine(w, "out", layer_norm(w, "norm", token)) for token in xs]
    return torch.stack(outs), torch.stack(memories)


@heads
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2}, {"reflections": 1}, {"heads": 4, "reflections": 3}, {"heads": 1}],
    ids=str,
)
def test_it_is_the_recurrence_with_every_gradient(options, head):
    model = make(head=head, dtype=torch.double, **options)
    x, batch = batch_of([7, 1, 4], torch.double)
    x.requires_grad_()
    result = model.run(x, batch)
    outs, memories = zip(
        *(oracle(model, part, head, **options) for part in x.split([7, 1, 4])), strict=True
    )
    expected = torch.cat(outs)
    torch.testing.assert_close(result.out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        result.state.tensors[0], torch.stack(memories, 1), rtol=1e-10, atol=1e-10
    )
    direction = torch.cos(torch.arange(expected.numel()) + 0.3).view_as(expected)
    leaves = [x, *model.parameters()]
    pairs = zip(
        torch.autograd.grad((result.out * direction).sum(), leaves),
        torch.autograd.grad((expected * direction).sum(), leaves),
        strict=True,
    )
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("length", [15, 16, 17, 33])
def test_sequences_longer_than_a_chunk(length):
    model = make(head="token", dtype=torch.double)
    x, _ = batch_of([length], torch.double)
    torch.testing.assert_close(model(x), oracle(model, x, "token")[0], rtol=1e-10, atol=1e-10)


@heads
@settings(max_examples=15)
@given(lengths=st.lists(st.integers(0, 20), min_size=1, max_size=5))
def test_an_example_does_not_depend_on_its_neighbours(head, lengths):
    model = make(head=head)
    x, batch = batch_of(lengths)
    together = model(x, batch, batch_size=len(lengths))
    alone = [model(x[batch == b], batch_size=1) for b in range(len(lengths))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=2e-6)
    assert torch.isfinite(together).all()


def test_a_token_sees_itself_and_nothing_of_what_follows():
    for head in ("token", "next_token"):
        model = make(head=head, dtype=torch.double)
        x, batch = batch_of([6, 4], torch.double)
        x.requires_grad_()
        out = model(x, batch)
        for i in range(10):
            (grad,) = torch.autograd.grad(out[i].sum(), x, retain_graph=True)
            seen = (grad.abs().sum(1) > 0).nonzero().flatten().tolist()
            assert seen == list(range(0 if i < 6 else 6, i + 1))


@settings(max_examples=20)
@given(
    pieces=st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2), min_size=1, max_size=4),
    num_layers=st.sampled_from([1, 2]),
)
def test_pieces_with_carried_state_equal_the_whole(pieces, num_layers):
    lengths = [sum(counts[b] for counts in pieces) for b in range(2)]
    for head in ("next_token", "example"):
        model = make(head=head, num_layers=num_layers, dtype=torch.double)
        x, batch = batch_of(lengths, torch.double)
        xs, state, read, outs = x.split(lengths), None, [0, 0], [[], []]
        whole = model.run(x, batch, batch_size=2)
        for counts in pieces:
            part = torch.cat([xs[b][read[b] : read[b] + counts[b]] for b in range(2)])
            _, part_batch = batch_of(counts)
            result = model.run(part, part_batch, state, batch_size=2)
            state = result.state
            read = [read[b] + counts[b] for b in range(2)]
            if head != "example":
                for b, out in enumerate(result.out.split(counts)):
                    outs[b].append(out)
        out = result.out if head == "example" else torch.cat(outs[0] + outs[1])
        torch.testing.assert_close(out, whole.out, rtol=1e-10, atol=1e-10)
        for a, b in zip(state.tensors, whole.state.tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_carried_state_can_be_detached():
    model = make(head="next_token")
    x, _ = batch_of([9])
    first = model.run(x[:4])
    assert all(tensor.requires_grad for tensor in first.state.tensors)
    second = model.run(x[4:], state=first.state.detach())
    torch.testing.assert_close(torch.cat([first.out, second.out]), model(x))
    assert not any(tensor.requires_grad for tensor in first.state.detach().tensors)


@heads
def test_an_example_without_tokens_keeps_its_state(head):
    model = make(head=head)
    x, batch = batch_of([3, 2])
    before = model.run(x, batch)
    after = model.run(x[:3].flip(0), batch[:3], before.state, batch_size=2)
    for a, b in zip(after.state.tensors, before.state.tensors, strict=True):
        assert torch.equal(a[:, 1], b[:, 1])
        assert not torch.equal(a[:, 0], b[:, 0])
    if head == "example":
        torch.testing.assert_close(after.out[1], before.out[1])
    # And where no example has any.
    idle = model.run(x[:0], batch[:0], before.state, batch_size=2)
    for a, b in zip(idle.state.tensors, before.state.tensors, strict=True):
        assert torch.equal(a, b)
    assert idle.out.shape == ((2, 5) if head == "example" else (0, 5))
    assert model(x[:0], batch_size=1).shape == ((1, 5) if head == "example" else (0, 5))


def test_the_memory_does_not_grow_along_the_stream():
    model, state = make(head="next_token", seed=1), None
    norms = []
    with torch.no_grad():
        for _ in range(10):
            result = model.run(torch.randn(500, 3), state=state)
            state = result.state
            assert result.out.isfinite().all()
            norms.append(state.tensors[0].norm().item())
    assert max(norms) < 5 * norms[0]


def test_symbols_are_embedded_and_columns_add_up():
    model = DeltaNetBaseline(2, 8, 5, num_embeddings=[4, 6])
    assert model(torch.tensor([[0, 5], [3, 0]])).shape == (1, 5)
    with pytest.raises(ValueError, match=r"x holds the symbol 4, .* from 0 to 3"):
        model(torch.tensor([[4, 0]]))
    with pytest.raises(ValueError, match=r"x must hold symbols"):
        model(torch.zeros(3, 2))


def test_input_and_output_may_share_one_table():
    model = DeltaNetBaseline(1, 8, 6, num_embeddings=6, head="next_token", tie_embeddings=True)
    assert model.out.weight is model.embedding.tables[0].weight
    x = torch.tensor([0, 5, 3])
    model(x).square().sum().backward()
    assert model.embedding.tables[0].weight.grad.abs().sum(1)[1] > 0  # as output only
    with pytest.raises(ValueError, match=r"num_embeddings=7 symbols .* input has"):
        DeltaNetBaseline(1, 8, 7, num_embeddings=6, head="next_token", tie_embeddings=True)


def test_positional_encodings_enter():
    model = make(pe_channels=4)
    x, _ = batch_of([3])
    assert (model(x, pe=torch.ones(3, 4)) - model(x, pe=torch.zeros(3, 4))).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"pe: expected pe_channels=4; got nothing"):
        model(x)


def test_bad_input_is_named():
    model = make()
    x, batch = batch_of([2, 2])
    with pytest.raises(ValueError, match=r"x must have shape \(tokens, 3\)"):
        model(x[:, :2], batch)
    with pytest.raises(ValueError, match=r"batch must be sorted, but goes back 1 times"):
        model(x, batch.flip(0))
    with pytest.raises(ValueError, match=r"batch must have one entry per row of x, 4"):
        model(x, batch[:3])
    with pytest.raises(ValueError, match=r"batch holds the example 1, but there are 1 examples"):
        model(x, batch, batch_size=1)


def test_a_state_of_another_model_is_refused():
    x, batch = batch_of([2, 2])
    model = make()
    message = r"state: expected memories of shape \(1, 2, 2, 4, 4\); got"
    for other in (make(heads=4), make(num_layers=2), make(channels=16), make()):
        state = other.run(x[:2], batch_size=1).state
        with pytest.raises(ValueError, match=message):
            model.run(x, batch, state, batch_size=2)
    other = RecurrentBaseline(3, 8, 5, cell="gru").run(x, batch).state
    with pytest.raises(ValueError, match=message):
        model.run(x, batch, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, r"channels: expected a multiple of heads=3; got 8"),
        ({"head": "graph"}, r"head must be one of .*, but is 'graph'"),
        ({"heads": 0}, "heads"),
        ({"num_layers": 0}, "num_layers"),
        ({"reflections": 0}, "reflections"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DeltaNetBaseline(3, 8, 5, **options)


@pytest.mark.parametrize("target", [1_000, 20_000])
def test_match_parameters_finds_the_nearest_width(target):
    def build(channels):
        return DeltaNetBaseline(3, channels, 5, heads=2)

    width = match_parameters(build, target, step=2)
    gap = abs(count_parameters(build(width)) - target)
    for other in (width - 2, width + 2):
        assert other < 2 or gap <= abs(count_parameters(build(other)) - target)


def test_a_state_dict_makes_the_round_trip():
    model, twin = make(seed=0), make(seed=1)
    x, batch = batch_of([4, 3])
    assert not torch.equal(model(x, batch), twin(x, batch))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model(x, batch), twin(x, batch))
