r"""Reading one long text in parallel, in order, so that states can be carried along."""

from collections.abc import Iterator

from torch_geometric.data import Batch, Data


class CharacterStreams:
    r"""Cuts one long sequence into parallel streams and reads them piece by piece.

    Stream b of every batch goes on where stream b of the batch before ended: carry the states from
    batch to batch, detach them, and this is truncated backpropagation through time. Every
    character is read once. Stream lengths differ by one at most; the last batch takes
    what is left, from 1 to :obj:`length` + 1 characters a stream.

    Args:
        data: One sequence, :obj:`x` and :obj:`y` of length :math:`L`.
        num_streams: Streams that are read in parallel, the examples of a batch.
        length: Characters of each stream in a batch.

    Shapes:
        - **output:** :obj:`x`, :obj:`y` :math:`(B \cdot length)`, with :obj:`batch`, :obj:`ptr`

    Raises:
        ValueError: If a size is not positive, or there are fewer characters than streams.
    """

    def __init__(self, data: Data, num_streams: int, length: int) -> None:
        if num_streams < 1 or length < 1:
            raise ValueError(
                f"num_streams is {num_streams} and length is {length}; both must be at least 1"
            )
        if len(data.x) < num_streams:
            raise ValueError(
                f"{num_streams} streams need as many characters, got {len(data.x)}; "
                "use fewer streams or a longer text"
            )
        if len(data.y) != len(data.x):
            raise ValueError(f"x has {len(data.x)} characters, but y has {len(data.y)}")
        self.data = data
        self.num_streams = num_streams
        self.length = length
        # Stream b is x[bounds[b] : bounds[b + 1]].
        self.bounds = [len(data.x) * b // num_streams for b in range(num_streams + 1)]

    def __len__(self) -> int:
        shortest = len(self.data.x) // self.num_streams
        # A batch for the shortest stream's last piece; nobody is left with an empty one.
        return -(-shortest // self.length)

    def __iter__(self) -> Iterator[Batch]:
        for step in range(len(self)):
            is_last = step == len(self) - 1
            pieces = []
            for start, end in zip(self.bounds, self.bounds[1:], strict=False):
                first = start + step * self.length
                last = end if is_last else first + self.length
                x, y = self.data.x[first:last], self.data.y[first:last]
                pieces.append(Data(x=x, y=y))
            yield Batch.from_data_list(pieces)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_streams} streams, length={self.length})"
