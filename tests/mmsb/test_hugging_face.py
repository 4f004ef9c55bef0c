"""BERT and GPT-2 with random weights, beside their pages: padded batches are ragged ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pages_oracle import scramble

from nsm_graph import topology
from nsm_graph.mmsb import PageEmbedding, Propagation, TokenPropagation, from_hugging_face

transformers = pytest.importorskip("transformers")

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
VOCABULARY, LONGEST = 30, 12


def calm(model):
    """Weights at random, but of a size at which float32 can be compared."""
    with torch.no_grad():
        for name, parameter in scramble(model).named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(0.4)
    return model


def bert(dtype=torch.double, pooler=True, **options):
    options = {
        "vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": LONGEST,
        "type_vocab_size": 3, **options,
    }  # fmt: skip
    config = transformers.BertConfig(attn_implementation="eager", **options)
    return calm(transformers.BertModel(config, add_pooling_layer=pooler)).to(dtype).eval()


def gpt2(dtype=torch.double, **options):
    options = {
        "vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": LONGEST,
        "bos_token_id": 0, "eos_token_id": 0, **options,
    }  # fmt: skip
    config = transformers.GPT2Config(attn_implementation="eager", **options)
    return calm(transformers.GPT2Model(config)).to(dtype).eval()


def padded(counts):
    mask = torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1)
    return torch.randint(VOCABULARY, mask.shape), mask


def ragged(values, mask):
    return values[mask], mask.nonzero()[:, 0]


COUNTS = st.lists(st.integers(1, LONGEST), min_size=1, max_size=4)


@settings(max_examples=25)
@given(
    counts=COUNTS,
    dtype=st.sampled_from([*TOLERANCE]),
    activation=st.sampled_from(["gelu", "gelu_new", "relu", "gelu_pytorch_tanh"]),
    has_types=st.booleans(),
    is_decoder=st.booleans(),
    seed=st.integers(0, 99),
)
def test_bert(counts, dtype, activation, has_types, is_decoder, seed):
    torch.manual_seed(seed)
    model = bert(dtype, hidden_act=activation, is_decoder=is_decoder)
    tokens, mask = padded(counts)
    types = torch.randint(3, tokens.shape) if has_types else None
    out = model(tokens, attention_mask=mask.long(), token_type_ids=types)
    ours = from_hugging_face(model)
    rows, batch = ragged(tokens, mask)
    pages = ours(rows, batch, token_types=types[mask] if has_types else None)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(pages, out.last_hidden_state[mask], rtol=0, atol=tolerance)
    torch.testing.assert_close(ours.pool(pages, batch), out.pooler_output, rtol=0, atol=tolerance)


@settings(max_examples=25)
@given(
    counts=COUNTS,
    dtype=st.sampled_from([*TOLERANCE]),
    activation=st.sampled_from(["gelu_new", "gelu", "relu"]),
    is_scaled=st.booleans(),
    by_layer=st.booleans(),
    inner=st.sampled_from([None, 20]),
    seed=st.integers(0, 99),
)
def test_gpt2(counts, dtype, activation, is_scaled, by_layer, inner, seed):
    torch.manual_seed(seed)
    model = gpt2(
        dtype, activation_function=activation, scale_attn_weights=is_scaled,
        scale_attn_by_inverse_layer_idx=by_layer, n_inner=inner,
    )  # fmt: skip
    tokens, mask = padded(counts)
    out = model(tokens, attention_mask=mask.long(), output_hidden_states=True)
    ours = from_hugging_face(model).run(*ragged(tokens, mask))
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(ours.pages, out.last_hidden_state[mask], rtol=0, atol=tolerance)
    # Their last hidden state is normalised, our last snapshot is not.
    for snapshot, state in zip(ours.snapshots[:-1], out.hidden_states[:-1], strict=True):
        torch.testing.assert_close(snapshot, state[mask], rtol=0, atol=tolerance)


def test_reordered_attention_is_the_same_in_float32():
    model = gpt2(torch.float32, reorder_and_upcast_attn=True)
    tokens = torch.randint(VOCABULARY, (9,))
    expected = model(tokens[None]).last_hidden_state[0]
    torch.testing.assert_close(from_hugging_face(model)(tokens), expected, rtol=0, atol=1e-5)


def test_token_by_token_as_with_their_cache():
    model = gpt2()
    tokens = torch.randint(VOCABULARY, (LONGEST,))
    expected = model(tokens[None]).last_hidden_state[0]
    ours = from_hugging_face(model)
    pages = [ours.run(tokens[:3], cache=True).pages]
    pages += [ours.append(tokens[i : i + 1]) for i in range(3, LONGEST)]
    torch.testing.assert_close(torch.cat(pages), expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="there are 12 positions, but an example is longer: row 0"):
        ours.append(tokens[:1])


def test_another_shadow_graph_is_one_argument_away():
    model, tokens = gpt2(), torch.randint(VOCABULARY, (9,))
    ours = from_hugging_face(model, shadow_graph=topology.window(2))
    causal = from_hugging_face(model)
    assert not torch.allclose(ours(tokens), causal(tokens))
    assert torch.equal(ours(tokens), causal(tokens, shadow_graph=topology.window(2)))


def test_weights_are_copied_and_the_mode_comes_along():
    for make in (bert, gpt2):
        model, tokens = make(), torch.randint(VOCABULARY, (7,))
        ours = from_hugging_face(model)
        before = ours(tokens)
        assert not ours.training
        assert from_hugging_face(model.train()).training
        scramble(model)
        assert torch.equal(ours(tokens), before)
        theirs = {parameter.data_ptr() for parameter in model.parameters()}
        assert theirs.isdisjoint(parameter.data_ptr() for parameter in ours.parameters())


def test_dropout_stands_where_theirs_does():
    ours = from_hugging_face(
        bert(hidden_dropout_prob=0.25, attention_probs_dropout_prob=0.5)
    ).stack.passes[0]
    assert (ours.dropout, ours.router.dropout, ours.feedforward_dropout) == (0.25, 0.5, 0.0)
    model = from_hugging_face(gpt2(resid_pdrop=0.25, attn_pdrop=0.5, embd_pdrop=0.125))
    ours = model.stack.passes[0]
    assert (ours.dropout, ours.router.dropout, ours.feedforward_dropout) == (0.25, 0.5, 0.0)
    assert model.embedding.dropout == 0.125


def test_a_model_without_a_pooler_says_so():
    ours, tokens = from_hugging_face(bert(pooler=False)), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="the model has no pooler"):
        ours.pool(ours(tokens))


# What is refused ###################################################################


def small(kind, config, **options):
    sizes = {"bert": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}}
    sizes["gpt2"] = {"n_embd": 8, "n_layer": 1, "n_head": 2}
    given = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, **sizes[kind]}
    return getattr(transformers, config)(**given, **options)


def exchanged(model, path, module):
    *owners, name = path.split(".")
    setattr(model.get_submodule(".".join(owners)), name, module)
    return model


BAD = [
    (lambda: torch.nn.Linear(2, 2), "reads BertModel and GPT2Model, but got Linear$"),
    (
        lambda: transformers.BertForMaskedLM(small("bert", "BertConfig")),
        "but got BertForMaskedLM; hand over its .bert",
    ),
    (
        lambda: transformers.GPT2LMHeadModel(small("gpt2", "GPT2Config")),
        "but got GPT2LMHeadModel; hand over its .transformer",
    ),
    (lambda: gpt2(add_cross_attention=True), "GPT2Model has cross-attention"),
    (lambda: bert(is_decoder=True, add_cross_attention=True), "BertModel has cross-attention"),
    (lambda: bert(hidden_act="silu"), "hidden_act is 'silu', but a page update"),
    (lambda: gpt2(activation_function="gelu_fast"), "activation_function is 'gelu_fast'"),
    (
        lambda: exchanged(
            bert(), "encoder.layer.1.output.dense", torch.nn.Linear(12, 8, bias=False)
        ),
        "encoder.layer.1.output.dense must be a linear layer with a bias",
    ),
    (
        lambda: exchanged(gpt2(), "h.0.ln_2", torch.nn.RMSNorm(8)),
        "h.0.ln_2 must be a LayerNorm with weight and bias, but is RMSNorm",
    ),
    (
        lambda: exchanged(gpt2(), "h.1.ln_2", torch.nn.LayerNorm(8, eps=0.1)),
        r"share the eps of their norms, but have \[1e-05, 0.1\]",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_refuses_what_it_cannot_read(make, message):
    with pytest.raises(ValueError, match=message):
        from_hugging_face(make())


def test_relative_positions_are_refused():
    model = bert()
    model.config.position_embedding_type = "relative_key"
    with pytest.raises(ValueError, match="position_embedding_type='relative_key'"):
        from_hugging_face(model)


@pytest.mark.parametrize(
    ("tokens", "given", "message"),
    [
        ([1, 30, -1], {}, r"tokens must lie in 0..29, but: row 1: 30, row 2: -1"),
        ([0.5], {}, "tokens must hold one integer for each page"),
        ([[1]], {}, "tokens must hold one integer for each page"),
        ([1] * 13, {}, "there are 12 positions, but an example is longer: row 12: 12"),
        ([1, 2], {"token_types": torch.tensor([0, 3])}, "token_types must lie in 0..2, but: row 1"),
        ([1, 2], {"token_types": torch.tensor([0])}, "token_types must hold one integer"),
    ],
)
def test_refuses_bad_tokens(tokens, given, message):
    model = TokenPropagation(PageEmbedding(30, 8, 12, num_types=3), Propagation(8, 1, 2))
    with pytest.raises(ValueError, match=message):
        model(torch.tensor(tokens), **given)


def test_types_where_there_are_none_are_refused():
    model = TokenPropagation(PageEmbedding(30, 8, 12), Propagation(8, 1, 2))
    with pytest.raises(ValueError, match="the embedding has none"):
        model(torch.tensor([1]), token_types=torch.tensor([0]))
