"""Encoders of torch, with the same outputs: padding is a ragged batch, a mask is a shadow graph."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pages_oracle import scramble
from torch import nn

from nsm_graph import topology
from nsm_graph.mmsb import Propagation, PropagationPass, from_mask

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
ACTIVATIONS = ["relu", "gelu", torch.tanh, nn.functional.gelu, nn.GELU("tanh"), nn.SiLU()]


def make_layer(heads=2, **options):
    options = {"dim_feedforward": 12, "batch_first": True, "dropout": 0.1, **options}
    return nn.TransformerEncoderLayer(8, heads, **options)


def make_encoder(num_layers=2, heads=2, norm=False, dtype=torch.double, **options):
    final = nn.LayerNorm(8) if norm else None
    layer = make_layer(heads, **options)
    encoder = nn.TransformerEncoder(layer, num_layers, final, enable_nested_tensor=False)
    return scramble(encoder).to(dtype).eval()


def padded(examples):
    """``[B, L, C]`` and the mask of padding, which holds numbers that must not matter."""
    x = torch.randn(len(examples), max(map(len, examples)), 8, dtype=examples[0].dtype) * 9
    is_padding = torch.ones(x.shape[:2], dtype=torch.bool)
    for row, example in enumerate(examples):
        x[row, : len(example)] = example
        is_padding[row, : len(example)] = False
    return x, is_padding


def batch_of(examples):
    return torch.arange(len(examples)).repeat_interleave(torch.tensor([len(x) for x in examples]))


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    heads=st.sampled_from([1, 2, 4]),
    num_layers=st.integers(1, 3),
    norm_first=st.booleans(),
    norm=st.booleans(),
    bias=st.booleans(),
    batch_first=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    is_causal=st.booleans(),
    dtype=st.sampled_from([*TOLERANCE]),
    seed=st.integers(0, 99),
)
def test_outputs_are_equal(
    counts, heads, num_layers, norm_first, norm, bias, batch_first, activation, is_causal, dtype,
    seed,
):  # fmt: skip
    torch.manual_seed(seed)
    encoder = make_encoder(
        num_layers, heads, norm, dtype, norm_first=norm_first, bias=bias, activation=activation,
        batch_first=batch_first,
    )  # fmt: skip
    stack = Propagation.from_torch(encoder, is_causal=is_causal).eval()
    examples = [torch.randn(count, 8, dtype=dtype) for count in counts]
    x, is_padding = padded(examples)
    mask = None
    if is_causal:
        mask = torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(1)
    given_x = x if batch_first else x.transpose(0, 1)
    out = encoder(given_x, mask, src_key_padding_mask=is_padding, is_causal=is_causal)
    out = (out if batch_first else out.transpose(0, 1))[~is_padding]
    ours = stack(torch.cat(examples), batch_of(examples))
    torch.testing.assert_close(ours, out, rtol=0, atol=TOLERANCE[dtype])


@settings(max_examples=40)
@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    kind=st.sampled_from(["bool", "float", "bool per head", "float per head"]),
    dtype=st.sampled_from([*TOLERANCE]),
    seed=st.integers(0, 99),
)
def test_any_attention_mask_is_a_shadow_graph(counts, kind, dtype, seed):
    torch.manual_seed(seed)
    encoder, length = make_encoder(dtype=dtype), max(counts)
    shape = (2, length, length) if "head" in kind else (length, length)
    is_absent = torch.rand(shape) < 0.4
    # torch gives NaN for a page that hears nobody; itself it hears always.
    is_absent &= ~torch.eye(length, dtype=torch.bool)
    mask = is_absent
    if kind.startswith("float"):
        mask = torch.randn(shape, dtype=dtype).masked_fill(is_absent, -torch.inf)
    examples = [torch.randn(count, 8, dtype=dtype) for count in counts]
    x, is_padding = padded(examples)
    theirs = mask.repeat(len(counts), 1, 1) if "head" in kind else mask
    padding = is_padding
    if kind.startswith("float"):
        padding = torch.zeros(is_padding.shape, dtype=dtype).masked_fill(is_padding, -torch.inf)
    out = encoder(x, theirs, src_key_padding_mask=padding)[~is_padding]
    stack = Propagation.from_torch(encoder, mask=mask).eval()
    ours = stack(torch.cat(examples), batch_of(examples))
    torch.testing.assert_close(ours, out, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_layer_is_a_pass_and_gradients_are_equal(norm_first):
    layer = scramble(make_layer(norm_first=norm_first)).double().eval()
    refine = PropagationPass.from_torch(layer).eval()
    one, other = (torch.randn(5, 8, dtype=torch.double) for _ in range(2))
    leaf = one.requires_grad_()
    ours, theirs = refine(leaf, topology.complete()), layer(leaf[None])[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    pairs = [
        (refine.router.lin_qkv.weight, layer.self_attn.in_proj_weight),
        (refine.router.lin_out.bias, layer.self_attn.out_proj.bias),
        (refine.lin_in.weight, layer.linear1.weight),
        (refine.norm_route.weight, layer.norm1.weight),
    ]
    mine = torch.autograd.grad((ours * other).sum(), [leaf, *(ours for ours, _ in pairs)])
    yours = torch.autograd.grad((theirs * other).sum(), [leaf, *(theirs for _, theirs in pairs)])
    for a, b in zip(mine, yours, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    single = Propagation.from_torch(layer).eval()
    torch.testing.assert_close(single(one), theirs, rtol=0, atol=1e-10)


def test_weights_are_copied():
    encoder = make_encoder(norm=True)
    stack, x = Propagation.from_torch(encoder).eval(), torch.randn(5, 8, dtype=torch.double)
    before, twin = stack(x), copy.deepcopy(encoder)
    scramble(encoder)
    assert torch.equal(stack(x), before)
    scramble(stack)
    torch.testing.assert_close(twin(x[None])[0], before, rtol=0, atol=1e-10)


def test_a_stack_that_exists_keeps_its_shadow_graph():
    encoder, x = make_encoder(norm=True), torch.randn(6, 8, dtype=torch.double)
    stack = Propagation(
        8, 2, 2, feedforward_channels=12, final_norm=True, shadow_graph=topology.window(2)
    )
    filled = stack.double().eval().from_torch(encoder)
    assert filled is stack and repr(stack.shadow_graph) == "window(2)"
    made = Propagation.from_torch(encoder, shadow_graph=topology.window(2)).eval()
    assert torch.equal(made(x), stack(x))
    refine = PropagationPass(8, 2, feedforward_channels=12).double().eval()
    assert refine.from_torch(encoder.layers[0]) is refine
    assert torch.equal(refine(x, topology.ring(1)), made.passes[0](x, topology.ring(1)))


def test_a_final_norm_of_another_kind_is_refused():
    encoder = make_encoder(norm=True, dtype=torch.float)
    encoder.norm.eps = 0.5
    stack = Propagation(8, 2, 2, feedforward_channels=12, final_norm=True)
    with pytest.raises(ValueError, match="the stack's final norm is LayerNorm"):
        stack.from_torch(encoder)
    x = torch.randn(3, 8)
    out = Propagation.from_torch(encoder).eval()(x)
    torch.testing.assert_close(out, encoder(x[None])[0], rtol=0, atol=1e-5)


def test_dropout_comes_along_where_a_stack_is_made():
    layer = make_layer(dropout=0.25)
    layer.self_attn.dropout, layer.dropout.p = 0.5, 0.125
    refine = PropagationPass.from_torch(layer)
    assert (refine.dropout, refine.router.dropout, refine.feedforward_dropout) == (0.25, 0.5, 0.125)


def test_an_activation_with_parameters_is_each_layers_own():
    encoder, x = make_encoder(activation=nn.PReLU()), torch.randn(5, 8, dtype=torch.double)
    for number, layer in enumerate(encoder.layers):
        nn.init.constant_(layer.activation.weight, 0.1 + number)
    stack = Propagation.from_torch(encoder).eval()
    torch.testing.assert_close(stack(x), encoder(x[None])[0], rtol=0, atol=1e-10)


# What is refused ###################################################################


class Unusual(nn.TransformerEncoderLayer):
    pass


def changed(change, make=make_layer):
    module = make()
    change(module)
    return module


def with_attention(**options):
    return lambda module: setattr(module, "self_attn", nn.MultiheadAttention(8, 2, **options))


def with_value(path, value):
    def change(module):
        *owners, name = path.split(".")
        setattr(module.get_submodule(".".join(owners)), name, value)

    return change


BAD = [
    (lambda: nn.Linear(2, 2), {}, "reads torch.nn.TransformerEncoder and .*, but got Linear"),
    (make_encoder, {"mask": torch.eye(3), "is_causal": True}, "give one of mask"),
    (lambda: Unusual(8, 2), {}, "layer 0 must be a torch.nn.Transf.*, but is Unusual"),
    (lambda: changed(with_attention(add_zero_attn=True)), {}, "layer 0 has add_zero_attn"),
    (lambda: changed(with_attention(kdim=4)), {}, "layer 0 has kdim or vdim"),
    (lambda: changed(with_attention(add_bias_kv=True)), {}, "layer 0 has bias_k"),
    (lambda: changed(with_value("norm2.eps", 0.1)), {}, "layer 0 has norms with unlike eps"),
    (lambda: changed(with_value("norm2", nn.RMSNorm(8))), {}, r"layer 0 has RMSNorm"),
    (lambda: changed(with_value("linear2", nn.Linear(12, 8, bias=False))), {}, "bias in some of"),
    (lambda: changed(with_value("dropout2.p", 0.4)), {}, "layer 0 has dropouts with unlike p"),
    (
        lambda: changed(with_value("layers.1.norm_first", True), make_encoder), {},
        "norm_first is False in layer 0 and True in layer 1",
    ),
    (
        lambda: changed(with_value("norm", nn.BatchNorm1d(8)), make_encoder), {},
        "final norm, but got BatchNorm1d",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "given", "message"), BAD, ids=[m for _, _, m in BAD])
def test_refuses_what_it_cannot_read(make, given, message):
    with pytest.raises(ValueError, match=message):
        Propagation.from_torch(make(), **given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_passes": 3}, "the stack has 3 passes, but the encoder has 2 layers"),
        ({"channels": 4}, "channels is 4 in the pass, but 8"),
        ({"heads": 4}, "heads is 4 in the pass, but 2"),
        ({"feedforward_channels": 9}, "feedforward_channels is 9 in the pass, but 12"),
        ({"norm_first": True}, "norm_first is True in the pass, but False"),
        ({"activation": "gelu"}, "activation is 'gelu' in the pass, but 'relu'"),
        ({"bias": False}, "bias is False in the pass, but True"),
        ({"eps": 0.1}, "eps is 0.1 in the pass"),
        ({"final_norm": True}, "final_norm is True in the stack, but the encoder has none"),
    ],
)
def test_a_stack_of_other_sizes_is_refused(options, message):
    given = {"channels": 8, "num_passes": 2, "heads": 2, "feedforward_channels": 12, **options}
    with pytest.raises(ValueError, match=message):
        Propagation(**given).from_torch(make_encoder(dtype=torch.float))


# Masks #############################################################################


def test_from_mask_keeps_edges_and_numbers():
    mask = torch.tensor([[0.0, -torch.inf, 1.0], [0.5, 0.0, -torch.inf], [0.0, 0.0, 0.0]])
    relation = from_mask(mask)(topology.NodeSet.from_counts([3, 2]))
    assert relation.edge_index.T.tolist() == [
        [0, 0], [2, 0], [0, 1], [1, 1], [0, 2], [1, 2], [2, 2], [3, 3], [3, 4], [4, 4],
    ]  # fmt: skip
    assert relation.bias.flatten().tolist() == [0.0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0]
    plain = from_mask(torch.zeros(3, 3))(topology.NodeSet.from_counts([3]))
    assert plain.bias is None and plain.num_edges == 9


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 3), r"mask of shape \(L, L\) or \(heads, L, L\), but got \(2, 3\)"),
        (torch.zeros(2), "a mask of padding is a ragged batch here"),
        (torch.zeros(2, 2, dtype=torch.long), "needs a boolean mask"),
        (torch.tensor([[0.0, torch.nan], [0.0, 0.0]]), r"NaN in 1 places, the first at \[0, 1\]"),
    ],
)
def test_from_mask_refuses(mask, message):
    with pytest.raises(ValueError, match=message):
        from_mask(mask)


def test_a_mask_that_is_too_small_says_so():
    rule = from_mask(torch.zeros(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"from_mask\(9 edges, 3 pages\) is for .* of up to 3"):
        rule(topology.NodeSet.from_counts([4]))
    with pytest.raises(ValueError, match=r"but one has 5.*example 1"):
        rule(topology.NodeSet.from_counts([2, 5]))
