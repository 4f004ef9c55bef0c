r"""Bindings: keys are bound to values, bound anew and released; how many are left varies."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from nsm_graph.data.tasks.base import IGNORED, Examples, SequenceTask
from nsm_graph.data.tasks.checks import check_at_least
from nsm_graph.data.tasks.draws import distinct


@dataclass(frozen=True)
class Bindings(SequenceTask):
    r"""A number K of bindings that differs from example to example, then questions about them.

    A token is a pair of symbols, a key and a value. Three quarters of the sequence bind keys to
    values; a key that comes again is bound anew, and what it was bound to before no longer counts.
    Some tokens are noise: their keys are never asked for. Others release a key. K, drawn uniformly
    from 1 to :obj:`max_bindings` (in a short sequence, to as many as it has room for), is the
    number of keys that are bound at the end. The last quarter asks: tokens of a bound key and the
    value "?", whose label is the key's last value; every bound key is asked for while there is
    room.

    Keys are symbols 0 to :obj:`num_keys` - 1, noise the :obj:`num_noise` after them; values are 0
    to :obj:`num_values` - 1, then "?" and "release".

    Source: ours. How much memory an example needs is known, and has nothing to do with its length.

    Args:
        max_bindings: Most bindings that are left.  (default: :obj:`16`)
        num_keys: Number of keys.  (default: :obj:`64`)
        num_values: Number of values.  (default: :obj:`16`)
        num_noise: Number of keys that are noise.  (default: :obj:`4`)
        noise: Share of noise among the tokens that need not be bindings.  (default: :obj:`0.3`)
        max_released: Most keys that are released, and at most a quarter as many as there are
            tokens to tell; their number is uniform from 0.  (default: :obj:`0`)

    Shapes:
        - **output:** symbols int64 :math:`(B, L, 2)`, labels int64 :math:`(B, L)`

    Raises:
        ValueError: If an option is out of range, or there are too few keys.

    Example:
        >>> task = Bindings(max_bindings=2, num_keys=8, num_values=4, num_noise=1)
        >>> x, y = task.sample(1, 8, torch.Generator().manual_seed(0))
        >>> x[0].T
        tensor([[8, 8, 8, 4, 7, 7, 4, 7],
                [3, 2, 0, 1, 1, 1, 4, 4]])
        >>> y[0].tolist(), task.needed_states(x).tolist()
        ([-100, -100, -100, -100, -100, -100, 1, 1], [2])
    """

    max_bindings: int = 16
    num_keys: int = 64
    num_values: int = 16
    num_noise: int = 4
    noise: float = 0.3
    max_released: int = 0
    name = "bindings"

    def __post_init__(self) -> None:
        for option, least in (
            ("max_bindings", 1), ("num_values", 2), ("num_noise", 0), ("max_released", 0),
        ):  # fmt: skip
            check_at_least(self.name, option, getattr(self, option), least)
        check_at_least(self.name, "num_keys", self.num_keys, self.max_bindings + self.max_released)
        if not isinstance(self.noise, int | float) or not 0 <= self.noise <= 1:
            raise ValueError(f"{self.name}: noise is {self.noise!r}; give a share from 0 to 1")
        if self.noise > 0 and self.num_noise == 0:
            raise ValueError(f"{self.name}: noise={self.noise} needs num_noise of at least 1")

    @property
    def num_symbols(self) -> tuple[int, int]:
        """Numbers of keys, noise included, and of values, "?" and "release" included."""
        return self.num_keys + self.num_noise, self.num_values + 2

    @property
    def num_classes(self) -> int:
        return self.num_values

    @property
    def min_length(self) -> int:
        return 4

    @property
    def ask(self) -> int:
        """The value "?"."""
        return self.num_values

    @property
    def release(self) -> int:
        """The value "release"."""
        return self.num_values + 1

    def needed_states(self, x: Tensor) -> Tensor:
        """How many keys are bound at the end of each sequence, ``[B]``."""
        key, value = x.unbind(-1)
        tells = (key < self.num_keys) & (value != self.ask)
        last = self._last_place(key.masked_fill(~tells, self.num_keys), self.num_keys + 1)
        last = last[:, : self.num_keys]
        bound = value.gather(1, last.clamp(min=0)) != self.release
        return (bound & (last >= 0)).sum(1)

    @staticmethod
    def _last_place(key: Tensor, num_keys: int) -> Tensor:
        """The last place of every key, ``[B, keys]``; -1 where it does not occur."""
        places = torch.arange(key.size(1)).expand_as(key)
        last = torch.full((key.size(0), num_keys), -1)
        return last.scatter_reduce(1, key, places, "amax")

    def _sample(self, num_examples: int, length: int, generator: Generator) -> Examples:
        num_asks = length // 4
        num_tells = length - num_asks
        most_released = min(self.max_released, num_tells // 4)
        most_bound = min(self.max_bindings, num_tells - 2 * most_released)
        most = most_bound + most_released
        keys = distinct(num_examples, most, self.num_keys, generator)

        def draw(high: int, *size: int) -> Tensor:
            return torch.randint(high, (num_examples, *size), generator=generator)

        def shuffle(rows: Tensor) -> Tensor:
            return rows.gather(1, torch.rand(rows.shape, generator=generator).argsort(1))

        num_bound = 1 + draw(most_bound, 1)
        num_released = draw(most_released + 1, 1)
        num_used = num_bound + num_released
        # Which of its keys a token is about: each once, those to release twice, then any or noise.
        # Keys to release come first; `most` stands for noise.
        place = torch.arange(num_tells)
        any_key = (torch.rand(num_examples, num_tells, generator=generator) * num_used).long()
        is_noise = torch.rand(num_examples, num_tells, generator=generator) < self.noise
        about = torch.where(place < num_used, place, any_key.masked_fill(is_noise, most))
        again = (place >= num_used) & (place < num_used + num_released)
        about = shuffle(torch.where(again, place - num_used, about))
        last = self._last_place(about, most + 1)

        # The last token about a key to release does so. Keys that do not occur have no last token;
        # what is written for them is what stands there.
        value = draw(self.num_values, num_tells)
        place = last[:, :most].clamp(min=0)
        is_released = torch.arange(most) < num_released
        ends = torch.where(is_released, self.release, value.gather(1, place))
        values = value.scatter(1, place, ends)

        noise = self.num_keys + draw(max(self.num_noise, 1), num_tells)
        key = torch.where(about == most, noise, keys.gather(1, about.clamp(max=most - 1)))

        # Every bound key once while there is room, then any of them.
        turn = torch.arange(num_asks)
        any_bound = (torch.rand(num_examples, num_asks, generator=generator) * num_bound).long()
        asked = num_released + shuffle(torch.where(turn < num_bound, turn, any_bound))
        answer = values.gather(1, last.gather(1, asked))
        asks = torch.stack([keys.gather(1, asked), torch.full_like(asked, self.ask)], -1)
        x = torch.cat([torch.stack([key, values], -1), asks], 1)
        y = torch.cat([torch.full((num_examples, num_tells), IGNORED), answer], 1)
        return x, y
