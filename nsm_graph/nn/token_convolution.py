"""A causal convolution of width two over the tokens of each example (X8)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch_geometric.nn.dense.linear import Linear

from nsm_graph.nn.checks import check_features
from nsm_graph.partition import Partition


class TokenConvolution(nn.Module):
    r"""Lets every token know the one before it: :math:`x_i + W_c [x_{i-1}; x_i]`.

    Before the first token of an example stands its ``tail``, the last token of the call before,
    or zero.

    Args:
        token_channels: Size of each token.

    Shapes:
        - **input:** tokens :math:`(T, C_t)` of B examples, tail :math:`(B, C_t)`
        - **output:** :math:`(T, C_t)`

    Example:
        >>> convolution = TokenConvolution(4)
        >>> convolution(torch.randn(5, 4), Partition.from_ptr(torch.tensor([0, 3, 5]))).shape
        torch.Size([5, 4])
    """

    def __init__(self, token_channels: int) -> None:
        super().__init__()
        self.token_channels = token_channels
        self.lin = Linear(2 * token_channels, token_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Closed at first: what a token does should not depend on the one before it unless that
        # helps; a random dependence makes every pair of symbols a symbol of its own to learn.
        nn.init.zeros_(self.lin.weight)
        nn.init.zeros_(self.lin.bias)

    def forward(self, x: Tensor, examples: Partition, tail: Tensor | None = None) -> Tensor:
        """Runs the forward pass of the module."""
        check_features(x, self.token_channels, "x")
        if x.size(0) != examples.num_rows:
            raise ValueError(
                f"the examples have {examples.num_rows} tokens, but x has {x.size(0)} rows; build "
                f"both from the same batch"
            )
        shape = (examples.num_examples, self.token_channels)
        if tail is not None and tail.shape != shape:
            raise ValueError(
                f"tail must have shape {shape}, the last token of each example, but has "
                f"{tuple(tail.shape)}"
            )
        return x + self.lin(torch.cat([self.previous(x, examples, tail), x], dim=-1))

    @staticmethod
    def previous(x: Tensor, examples: Partition, tail: Tensor | None = None) -> Tensor:
        """The token before each token, ``[T, C_t]``."""
        shifted = torch.cat([x[:1], x[:-1]])
        is_first = (examples.place == 0).unsqueeze(1)
        if tail is None:
            return shifted.masked_fill(is_first, 0.0)
        return torch.where(is_first, tail.to(x)[examples.batch], shifted)

    @staticmethod
    def next_tail(x: Tensor, examples: Partition, tail: Tensor | None = None) -> Tensor:
        """What to hand to the next call: each example's last token, ``[B, C_t]``."""
        if tail is None:
            tail = x.new_zeros(examples.num_examples, x.size(1))
        if x.size(0) == 0:
            return tail
        has_tokens = (examples.ptr.diff() > 0).unsqueeze(1)
        return torch.where(has_tokens, x[(examples.ptr[1:] - 1).clamp(min=0)], tail.to(x))
