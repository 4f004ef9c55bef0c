"""BERT and GPT-2 of Hugging Face transformers as stacks of passes.

Modules are known by their class names and parts; the library itself is not imported.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nsm_graph.mmsb.as_built import check_activation, check_as_built
from nsm_graph.mmsb.convert_torch import copy_norm
from nsm_graph.mmsb.propagation import Propagation
from nsm_graph.mmsb.propagation_pass import ACTIVATIONS, PropagationPass
from nsm_graph.mmsb.shadow_graph import ShadowGraph
from nsm_graph.mmsb.token_propagation import PageEmbedding, TokenPropagation
from nsm_graph.topology import causal, complete

#: Their names of activations that a page update has.
_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def from_hugging_face(
    model: nn.Module, *, shadow_graph: ShadowGraph | None = None
) -> TokenPropagation:
    r"""A ``BertModel`` or ``GPT2Model`` as pages and passes, weights copied.

    BERT: word, position and type embeddings with LayerNorm, post-norm passes, the pooler if there
    is one; complete, or causal for a decoder. GPT-2: word and position embeddings, pre-norm passes,
    a final norm; causal. Factors that GPT-2 may put on its scores (``scale_attn_weights=False``,
    ``scale_attn_by_inverse_layer_idx``) go into the weights of the queries;
    ``reorder_and_upcast_attn`` computes the same in another order. Training or evaluation mode
    comes along.

    Args:
        model: The model; of one with a head, its ``.bert`` or ``.transformer``.
        shadow_graph: Who hears whom; ``None`` for what the model does. (default: :obj:`None`)

    Raises:
        ValueError: If it is another model, or uses what passes do not have: cross-attention,
            relative positions, another activation, layers that were exchanged.
    """
    name = type(model).__name__
    readers = {"BertModel": _read_bert, "GPT2Model": _read_gpt2}
    if name not in readers:
        hint = ""
        if name.startswith("Bert") and hasattr(model, "bert"):
            hint = "; hand over its .bert"
        elif name.startswith("GPT2") and hasattr(model, "transformer"):
            hint = "; hand over its .transformer"
        raise ValueError(f"from_hugging_face reads BertModel and GPT2Model, but got {name}{hint}")
    if getattr(model.config, "add_cross_attention", False):
        raise ValueError(f"{name} has cross-attention (add_cross_attention), which passes have not")
    check_as_built(model, "transformers.")
    with torch.no_grad():
        tokens = readers[name](model, shadow_graph)
    return tokens.train(model.training)


class Layer(NamedTuple):
    """The weights of one of their layers, matrices ``[out, in]``."""

    query_key_value: tuple[Tensor, Tensor]
    attended: tuple[Tensor, Tensor]
    inner: tuple[Tensor, Tensor]
    outer: tuple[Tensor, Tensor]
    norm_route: nn.LayerNorm
    norm_update: nn.LayerNorm


# BERT ##############################################################################


def _read_bert(model: nn.Module, shadow_graph: ShadowGraph | None) -> TokenPropagation:
    config, theirs = model.config, model.embeddings
    places = theirs.position_ids.flatten()
    if not torch.equal(places, torch.arange(places.numel(), device=places.device)):
        raise ValueError("embeddings.position_ids must count from 0, but were changed")
    kind = getattr(config, "position_embedding_type", None)
    if kind not in (None, "absolute"):
        raise ValueError(f"BertModel has position_embedding_type={kind!r}, but only 'absolute' is")
    activation = _activation(config.hidden_act, "hidden_act")
    for i, layer in enumerate(model.encoder.layer):
        _check_parts(layer, ("BertLayer",), f"encoder.layer.{i}")
        _check_parts(
            layer.attention.self, ("BertSelfAttention", "BertSdpaSelfAttention"),
            f"encoder.layer.{i}.attention.self",
        )  # fmt: skip
        check_activation(
            layer.intermediate.intermediate_act_fn, ACTIVATIONS[activation],
            f"encoder.layer.{i}.intermediate", config.hidden_act,
        )  # fmt: skip
    layers = [
        _bert_layer(layer, f"encoder.layer.{i}") for i, layer in enumerate(model.encoder.layer)
    ]
    if shadow_graph is None:
        shadow_graph = causal() if config.is_decoder else complete()
    stack = _stack(
        layers,
        heads=config.num_attention_heads,
        activation=activation,
        norm_first=False,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        shadow_graph=shadow_graph,
    )
    embedding = _embedding(
        theirs.word_embeddings,
        theirs.position_embeddings,
        theirs.token_type_embeddings,
        _norm(theirs.LayerNorm, "embeddings.LayerNorm"),
        config.hidden_dropout_prob,
    )
    pooler = getattr(model, "pooler", None)
    pooler = None if pooler is None else deepcopy(pooler.dense)
    return TokenPropagation(embedding, stack, pooler)


def _bert_layer(layer: nn.Module, path: str) -> Layer:
    attention = layer.attention
    parts = [
        _linear(getattr(attention.self, name), f"{path}.attention.self.{name}")
        for name in ("query", "key", "value")
    ]
    weights, biases = zip(*parts, strict=True)
    return Layer(
        (torch.cat(weights), torch.cat(biases)),
        _linear(attention.output.dense, f"{path}.attention.output.dense"),
        _linear(layer.intermediate.dense, f"{path}.intermediate.dense"),
        _linear(layer.output.dense, f"{path}.output.dense"),
        _norm(attention.output.LayerNorm, f"{path}.attention.output.LayerNorm"),
        _norm(layer.output.LayerNorm, f"{path}.output.LayerNorm"),
    )


# GPT-2 #############################################################################


def _read_gpt2(model: nn.Module, shadow_graph: ShadowGraph | None) -> TokenPropagation:
    config = model.config
    activation = _activation(config.activation_function, "activation_function")
    for i, block in enumerate(model.h):
        _check_parts(block, ("GPT2Block",), f"h.{i}")
        _check_parts(block.attn, ("GPT2Attention",), f"h.{i}.attn")
        _check_parts(block.mlp, ("GPT2MLP",), f"h.{i}.mlp")
        check_activation(
            block.mlp.act, ACTIVATIONS[activation], f"h.{i}.mlp.act", config.activation_function
        )
    layers = [_gpt2_layer(block, f"h.{i}") for i, block in enumerate(model.h)]
    stack = _stack(
        layers,
        heads=config.num_attention_heads,
        activation=activation,
        norm_first=True,
        dropout=config.resid_pdrop,
        attention_dropout=config.attn_pdrop,
        shadow_graph=causal() if shadow_graph is None else shadow_graph,
        final_norm=True,
    )
    stack.final_norm = deepcopy(_norm(model.ln_f, "ln_f"))
    embedding = _embedding(model.wte, model.wpe, None, None, config.embd_pdrop)
    return TokenPropagation(embedding, stack)


def _gpt2_layer(block: nn.Module, path: str) -> Layer:
    weight, bias = _linear(block.attn.c_attn, f"{path}.attn.c_attn")
    # Passes divide scores by sqrt(D); whatever factor they have here goes into the queries.
    factor = block.attn.scaling * block.attn.head_dim**0.5
    scale = torch.ones_like(bias)
    scale[: weight.size(1)] = factor
    return Layer(
        (weight * scale.unsqueeze(1), bias * scale),
        _linear(block.attn.c_proj, f"{path}.attn.c_proj"),
        _linear(block.mlp.c_fc, f"{path}.mlp.c_fc"),
        _linear(block.mlp.c_proj, f"{path}.mlp.c_proj"),
        _norm(block.ln_1, f"{path}.ln_1"),
        _norm(block.ln_2, f"{path}.ln_2"),
    )


# What both share ###################################################################


def _check_parts(part: nn.Module, classes: tuple[str, ...], path: str) -> None:
    if type(part).__name__ not in classes:
        raise ValueError(
            f"{path} must be a {' or '.join(classes)}, but is a {type(part).__name__}; was it "
            f"exchanged?"
        )


def _stack(layers: list[Layer], **options: Any) -> Propagation:
    if not layers:
        raise ValueError("from_hugging_face got a model without layers")
    first = layers[0]
    weight = first.attended[0]
    eps = {norm.eps for layer in layers for norm in (layer.norm_route, layer.norm_update)}
    if len(eps) > 1:
        raise ValueError(f"layers must share the eps of their norms, but have {sorted(eps)}")
    stack = Propagation(
        weight.size(0),
        len(layers),
        feedforward_channels=first.inner[0].size(0),
        feedforward_dropout=0.0,
        eps=eps.pop(),
        **options,
    ).to(weight.device, weight.dtype)
    for refine, layer in zip(stack.passes, layers, strict=True):
        assert isinstance(refine, PropagationPass)
        _copy_layer(refine, layer)
    return stack


def _copy_layer(refine: PropagationPass, layer: Layer) -> None:
    for ours, (weight, bias) in (
        (refine.router.lin_qkv, layer.query_key_value),
        (refine.router.lin_out, layer.attended),
        (refine.lin_in, layer.inner),
        (refine.lin_out, layer.outer),
    ):
        ours.weight.copy_(weight)
        ours.bias.copy_(bias)
    copy_norm(refine.norm_route, layer.norm_route)
    copy_norm(refine.norm_update, layer.norm_update)


def _embedding(
    word: nn.Embedding,
    position: nn.Embedding,
    token_type: nn.Embedding | None,
    norm: nn.LayerNorm | None,
    dropout: float,
) -> PageEmbedding:
    embedding = PageEmbedding(
        word.num_embeddings,
        word.embedding_dim,
        position.num_embeddings,
        num_types=None if token_type is None else token_type.num_embeddings,
        norm=norm is not None,
        dropout=dropout,
        eps=1e-5 if norm is None else norm.eps,
    ).to(word.weight.device, word.weight.dtype)
    embedding.word.weight.copy_(word.weight)
    embedding.position.weight.copy_(position.weight)
    if token_type is not None and embedding.token_type is not None:
        embedding.token_type.weight.copy_(token_type.weight)
    if norm is not None and embedding.norm is not None:
        copy_norm(embedding.norm, norm)
    return embedding


def _linear(module: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    """Matrix ``[out, in]`` and bias; their ``Conv1D`` keeps the matrix the other way round."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    is_linear, is_transposed = type(module) is nn.Linear, type(module).__name__ == "Conv1D"
    if (is_linear or is_transposed) and isinstance(weight, Tensor) and isinstance(bias, Tensor):
        return weight if is_linear else weight.T, bias
    raise ValueError(
        f"{path} must be a linear layer with a bias, but is {module}; was it exchanged?"
    )


def _norm(module: nn.Module, path: str) -> nn.LayerNorm:
    if type(module) is not nn.LayerNorm or module.weight is None or module.bias is None:
        raise ValueError(f"{path} must be a LayerNorm with weight and bias, but is {module}")
    return module


def _activation(name: object, option: str) -> str:
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ValueError(
            f"{option} is {name!r}, but a page update from there may have one of "
            f"{', '.join(map(repr, _ACTIVATIONS))}"
        )
    return _ACTIVATIONS[name]
