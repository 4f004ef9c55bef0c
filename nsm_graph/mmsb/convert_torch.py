"""The weights of torch's Transformer encoders as checkpoints of passes."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsm_graph.mmsb.as_built import check_as_built
from nsm_graph.mmsb.masks import from_mask
from nsm_graph.mmsb.shadow_graph import ShadowGraph
from nsm_graph.topology import causal

if TYPE_CHECKING:
    from nsm_graph.mmsb.propagation import Propagation
    from nsm_graph.mmsb.propagation_pass import PropagationPass


def read_encoder(
    called_on: type[Propagation] | Propagation,
    encoder: nn.Module,
    mask: Tensor | None,
    is_causal: bool,
    shadow_graph: ShadowGraph | None,
) -> Propagation:
    """A new stack for an encoder, or one that exists with the encoder's weights."""
    layers, norm = _layers_of(encoder)
    options = options_of_layers(layers)
    given = [mask is not None, is_causal, shadow_graph is not None]
    if sum(given) > 1:
        raise ValueError(
            "give one of mask, is_causal=True and shadow_graph, which all say who hears whom; "
            "topologies combine with |, & and -"
        )
    if mask is not None:
        shadow_graph = from_mask(mask)
    elif is_causal:
        shadow_graph = causal()
    if isinstance(called_on, type):
        weight = layers[0].linear1.weight
        stack = called_on(
            num_passes=len(layers),
            final_norm=norm is not None,
            shadow_graph=shadow_graph,
            **options,
        ).to(weight.device, weight.dtype)
        stack.train(encoder.training)
    else:
        stack = called_on
        _check_same_sizes(stack, len(layers), options, norm)
        if shadow_graph is not None:
            stack.shadow_graph = shadow_graph
    with torch.no_grad():
        for refine, layer in zip(stack.passes, layers, strict=True):
            copy_layer(refine, layer)
        if norm is not None and isinstance(called_on, type):
            stack.final_norm = deepcopy(norm)  # its eps and bias may be others than the passes'
        elif norm is not None:
            copy_norm(stack.final_norm, norm)
    return stack


def read_layer(
    called_on: type[PropagationPass] | PropagationPass, layer: nn.Module
) -> PropagationPass:
    """A new pass for an encoder layer, or one that exists with the layer's weights."""
    options = options_of_layers([layer])
    if isinstance(called_on, type):
        weight = layer.linear1.weight
        refine = called_on(**options).to(weight.device, weight.dtype)
        refine.train(layer.training)
    else:
        refine = called_on
        _check_options(refine, options)
    with torch.no_grad():
        copy_layer(refine, layer)
    return refine


#: What an encoder layer is made of, beside norms and activation.
_PARTS = {"self_attn": nn.MultiheadAttention, "linear": nn.Linear, "dropout": nn.Dropout}


def _layers_of(encoder: nn.Module) -> tuple[list[nn.Module], nn.LayerNorm | None]:
    if isinstance(encoder, nn.TransformerEncoderLayer):
        return [encoder], None
    if type(encoder) is not nn.TransformerEncoder:
        raise ValueError(
            f"from_torch reads torch.nn.TransformerEncoder and TransformerEncoderLayer, but got "
            f"{type(encoder).__name__}"
        )
    layers, norm = list(encoder.layers), encoder.norm
    if not layers:
        raise ValueError("from_torch got a TransformerEncoder without layers")
    if norm is not None and not isinstance(norm, nn.LayerNorm):
        raise ValueError(
            f"from_torch reads a LayerNorm as the encoder's final norm, but got "
            f"{type(norm).__name__}"
        )
    return layers, norm


def options_of_layers(layers: list[nn.Module]) -> dict[str, Any]:
    """The options of passes that compute what the layers do, or a ``ValueError``."""
    options = [_options_of(layer, number) for number, layer in enumerate(layers)]
    for number, other in enumerate(options):
        for name, value in options[0].items():
            if not _is_same(other[name], value):
                raise ValueError(
                    f"all layers of a stack must be alike, but {name} is {value!r} in layer 0 and "
                    f"{other[name]!r} in layer {number}"
                )
    return options[0]


def _options_of(layer: nn.Module, number: int) -> dict[str, Any]:
    if type(layer) is not nn.TransformerEncoderLayer:
        raise ValueError(
            f"layer {number} must be a torch.nn.TransformerEncoderLayer, but is "
            f"{type(layer).__name__}, which may compute something else"
        )
    check_as_built(layer, "torch.nn.", except_for="activation")
    for name in ("self_attn", "linear1", "linear2", "dropout", "dropout1", "dropout2"):
        kind = _PARTS[name.rstrip("12")]
        if type(getattr(layer, name)) is not kind:
            raise ValueError(
                f"{name} of layer {number} must be a torch.nn.{kind.__name__}, but is "
                f"{getattr(layer, name)}; was it exchanged?"
            )
    attention, has_bias = layer.self_attn, layer.linear1.bias is not None
    norms = layer.norm1, layer.norm2
    for norm in norms:
        if type(norm) is not nn.LayerNorm or norm.weight is None:
            raise ValueError(f"layer {number} has {norm}, but passes have a LayerNorm with weights")
    refused = {
        "bias_k": attention.bias_k is not None,
        "add_zero_attn": attention.add_zero_attn,
        "kdim or vdim": not attention._qkv_same_embed_dim,
        "bias in some of its parts only": any(
            (part.bias is not None) != has_bias
            for part in (attention.out_proj, layer.linear2, *norms)
        ),
        "norms with unlike eps": layer.norm1.eps != layer.norm2.eps,
        "dropouts with unlike p": layer.dropout1.p != layer.dropout2.p,
    }
    for name, is_there in refused.items():
        if is_there:
            raise ValueError(f"layer {number} has {name}, which passes do not have")
    return {
        "channels": attention.embed_dim,
        "heads": attention.num_heads,
        "feedforward_channels": layer.linear1.out_features,
        "activation": _activation_of(layer.activation),
        "norm_first": layer.norm_first,
        "dropout": layer.dropout1.p,
        "attention_dropout": attention.dropout,
        "feedforward_dropout": layer.dropout.p,
        "bias": has_bias,
        "eps": layer.norm1.eps,
    }


def _activation_of(function: Callable[[Tensor], Tensor]) -> str | Callable[[Tensor], Tensor]:
    if function is F.relu or isinstance(function, nn.ReLU):
        return "relu"
    if function is F.gelu:
        return "gelu"
    if isinstance(function, nn.GELU):
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    return function


def _is_same(one: object, other: object) -> bool:
    """Options are compared by value; activations that are modules by what they are."""
    return type(one) is type(other) if isinstance(one, nn.Module) else one == other


def _check_same_sizes(
    stack: Propagation, num_layers: int, options: dict[str, Any], norm: nn.Module | None
) -> None:
    if stack.num_passes != num_layers:
        raise ValueError(
            f"the stack has {stack.num_passes} passes, but the encoder has {num_layers} layers"
        )
    has_final = stack.final_norm is not None
    if has_final != (norm is not None):
        raise ValueError(
            f"final_norm is {has_final} in the stack, but the encoder has "
            f"{'one' if norm is not None else 'none'}"
        )
    if norm is not None and _kind_of_norm(norm) != _kind_of_norm(stack.final_norm):
        raise ValueError(
            f"the stack's final norm is {stack.final_norm}, but the encoder's is {norm}; let "
            f"Propagation.from_torch(encoder) make the stack"
        )
    for refine in stack.passes:
        _check_options(refine, options)


def _kind_of_norm(norm: nn.Module) -> tuple:
    return norm.normalized_shape, norm.eps, norm.weight is None, norm.bias is None


def _check_options(refine: PropagationPass, options: dict[str, Any]) -> None:
    """Raises where a pass computes something else. What it drops in training is its own."""
    for name, wanted in options.items():
        if name.endswith("dropout"):
            continue
        got = refine.has_bias if name == "bias" else getattr(refine, name)
        if not _is_same(got, wanted):
            raise ValueError(
                f"{name} is {got!r} in the pass, but {wanted!r} in the module whose weights it "
                f"was given; make it with {name}={wanted!r}"
            )


def copy_layer(refine: PropagationPass, layer: nn.Module) -> None:
    """Copies the weights of an encoder layer."""
    attention = layer.self_attn
    # One with parameters has its own in every layer.
    refine.activation = deepcopy(_activation_of(layer.activation))
    refine.router.lin_qkv.weight.copy_(attention.in_proj_weight)
    if attention.in_proj_bias is not None:
        refine.router.lin_qkv.bias.copy_(attention.in_proj_bias)
    copy_linear(refine.router.lin_out, attention.out_proj)
    copy_linear(refine.lin_in, layer.linear1)
    copy_linear(refine.lin_out, layer.linear2)
    copy_norm(refine.norm_route, layer.norm1)
    copy_norm(refine.norm_update, layer.norm2)


def copy_linear(ours: nn.Module, theirs: nn.Module) -> None:
    """Weight ``[out, in]`` and, where there is one, bias."""
    ours.weight.copy_(theirs.weight)
    if theirs.bias is not None:
        ours.bias.copy_(theirs.bias)


def copy_norm(ours: nn.LayerNorm, theirs: nn.Module) -> None:
    """Scale and, where there is one, shift."""
    if theirs.weight is not None:
        ours.weight.copy_(theirs.weight)
    if theirs.bias is not None:
        ours.bias.copy_(theirs.bias)
