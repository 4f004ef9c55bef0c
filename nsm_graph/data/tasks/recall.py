r"""Multi-query associative recall: pairs of key and value, then keys whose values are asked."""

from dataclasses import dataclass

import torch
from torch import Generator

from nsm_graph.data.tasks.base import IGNORED, Examples, SequenceTask
from nsm_graph.data.tasks.checks import check_at_least
from nsm_graph.data.tasks.draws import distinct, weighted_distinct

FILLERS = ("random", "zero")


@dataclass(frozen=True)
class MultiQueryRecall(SequenceTask):
    r"""Key-value pairs, then each key once more at a random place, where its value is asked.

    Keys are distinct symbols from 1 to :math:`V/2 - 1`, values distinct symbols from
    :math:`V/2` to :math:`V - 1`. The K pairs fill the first 2K places, key before value.
    The rest has :math:`S = (L - 2K) / 2` slots of two tokens; the queries go to the first token of
    K distinct slots, drawn one after the other, the first pair's first, with weights
    :math:`i^{a-1}` for slot :math:`i = 1, \dots, S`. Only queries have a label, and the last
    token is never one.

    Source: MQAR of Arora et al., Zoology, 2023, ``zoology/data/multiquery_ar.py``; symbols, places
    and weights are theirs. Differs: pairs are shown once (their ``num_passes=1``).

    Args:
        vocab_size: Number of symbols, V.  (default: :obj:`8192`)
        num_pairs: Key-value pairs, K.  (default: :obj:`4`)
        power: Exponent a of the power law; 1 for uniform places.  (default: :obj:`0.01`)
        filler: What stands where no pair and no query does: ``"random"`` for uniform symbols, keys
            and values among them, as in the public default, or ``"zero"`` for symbol 0.
            (default: :obj:`"random"`)

    Raises:
        ValueError: If an option is out of range, or the vocabulary has too few keys.

    Example:
        >>> task = MultiQueryRecall(vocab_size=12, num_pairs=2, filler="zero")
        >>> x, y = task.sample(1, 12, torch.Generator().manual_seed(0))
        >>> x
        tensor([[5, 6, 4, 7, 5, 0, 0, 0, 4, 0, 0, 0]])
        >>> y
        tensor([[-100, -100, -100, -100,    6, -100, -100, -100,    7, -100, -100, -100]])
    """

    vocab_size: int = 8192
    num_pairs: int = 4
    power: float = 0.01
    filler: str = "random"
    name = "mqar"

    def __post_init__(self) -> None:
        check_at_least(self.name, "num_pairs", self.num_pairs, 1)
        check_at_least(self.name, "vocab_size", self.vocab_size, 4)
        num_keys = self.vocab_size // 2 - 1
        if self.num_pairs > num_keys:
            raise ValueError(
                f"{self.name}: {self.num_pairs} pairs need as many keys, but a vocabulary of "
                f"{self.vocab_size} has {num_keys}; use vocab_size={2 * self.num_pairs + 2} or more"
            )
        if not isinstance(self.power, int | float) or not 0 <= self.power < float("inf"):
            raise ValueError(f"{self.name}: power is {self.power!r}; give a number of at least 0")
        if self.filler not in FILLERS:
            raise ValueError(
                f"{self.name}: unknown filler {self.filler!r}; choose one of {', '.join(FILLERS)}"
            )

    @property
    def num_symbols(self) -> int:
        return self.vocab_size

    @property
    def num_classes(self) -> int:
        return self.vocab_size

    @property
    def min_length(self) -> int:
        return 4 * self.num_pairs

    @property
    def chance(self) -> float:
        """One value among all; a guess among those of the sequence has 1 / :obj:`num_pairs`."""
        return 1 / (self.vocab_size - self.vocab_size // 2)

    def valid_length(self, length: int) -> int:
        length = super().valid_length(length)
        return length - length % 2

    def _sample(self, num_examples: int, length: int, generator: Generator) -> Examples:
        half, num_pairs = self.vocab_size // 2, self.num_pairs
        keys = 1 + distinct(num_examples, num_pairs, half - 1, generator)
        values = half + distinct(num_examples, num_pairs, self.vocab_size - half, generator)

        num_slots = length // 2 - num_pairs
        weights = torch.arange(1, num_slots + 1, dtype=torch.double) ** (self.power - 1)
        slots = weighted_distinct(num_examples, num_pairs, weights, generator)
        places = 2 * (num_pairs + slots)

        if self.filler == "random":
            x = torch.randint(self.vocab_size, (num_examples, length), generator=generator)
        else:
            x = torch.zeros(num_examples, length, dtype=torch.long)
        x[:, 0 : 2 * num_pairs : 2] = keys
        x[:, 1 : 2 * num_pairs : 2] = values
        x.scatter_(1, places, keys)
        y = torch.full_like(x, IGNORED).scatter_(1, places, values)
        return x, y
