"""Layers: one equation each, PyG ``MessagePassing`` where edges are involved."""

from nsm_graph.nn.communication import StateCommunication as StateCommunication
from nsm_graph.nn.hybrid_attention import HybridAttention as HybridAttention
from nsm_graph.nn.memory_conv import MemoryConv as MemoryConv
from nsm_graph.nn.positional import GraphPosition as GraphPosition
from nsm_graph.nn.positional import LearnedPosition as LearnedPosition
from nsm_graph.nn.positional import RelativePosition as RelativePosition
from nsm_graph.nn.positional import RotaryPosition as RotaryPosition
from nsm_graph.nn.positional import SinusoidalPosition as SinusoidalPosition
from nsm_graph.nn.propagator import Propagated as Propagated
from nsm_graph.nn.propagator import StatePropagator as StatePropagator
from nsm_graph.nn.readout import StatePool as StatePool
from nsm_graph.nn.readout import TokenReadout as TokenReadout
from nsm_graph.nn.router import Routing as Routing
from nsm_graph.nn.router import TokenToStateRouter as TokenToStateRouter
from nsm_graph.nn.scan_aggregation import ScanAggregation as ScanAggregation
from nsm_graph.nn.segment_scan import SegmentScan as SegmentScan
from nsm_graph.nn.snap import Snapped as Snapped
from nsm_graph.nn.snap import StateSnap as StateSnap
from nsm_graph.nn.state_allocator import Founding as Founding
from nsm_graph.nn.state_allocator import StateAllocator as StateAllocator
from nsm_graph.nn.token_convolution import TokenConvolution as TokenConvolution
