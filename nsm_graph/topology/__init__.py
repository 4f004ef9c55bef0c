"""Who talks to whom: rules that make relations, composed with ``|``, ``&``, ``-`` and ``~``."""

from nsm_graph.topology.base import NodeSet as NodeSet
from nsm_graph.topology.base import Topology as Topology
from nsm_graph.topology.base import rule as rule
from nsm_graph.topology.builders import complete as complete
from nsm_graph.topology.builders import from_edge_index as from_edge_index
from nsm_graph.topology.builders import ring as ring
from nsm_graph.topology.builders import self_loops as self_loops
from nsm_graph.topology.builders import star as star
from nsm_graph.topology.dynamic import knn as knn
