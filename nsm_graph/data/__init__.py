r"""Real data as PyG objects: sequences are :class:`~torch_geometric.data.Data` without edges.

>>> splits = load("digits", seed=0)
>>> len(splits.test), splits.info.task
(360, 'classification')
"""

from nsm_graph.data.errors import MissingDataError as MissingDataError
from nsm_graph.data.idx import read_idx as read_idx
from nsm_graph.data.info import DatasetInfo as DatasetInfo
from nsm_graph.data.info import Splits as Splits
from nsm_graph.data.pixels import PixelSequences as PixelSequences
from nsm_graph.data.positional import AddPositionalEncoding as AddPositionalEncoding
from nsm_graph.data.registry import available as available
from nsm_graph.data.registry import load as load
from nsm_graph.data.sequences import TaskSequences as TaskSequences
from nsm_graph.data.streams import CharacterStreams as CharacterStreams
