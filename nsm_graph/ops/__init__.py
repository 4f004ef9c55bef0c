"""Pure functions of tensors, each with a reference and faster backends."""

from nsm_graph.ops.backend import BackendChoice as BackendChoice
from nsm_graph.ops.backend import available_backends as available_backends
from nsm_graph.ops.backend import explain as explain
from nsm_graph.ops.delta_scan import DeltaSteps as DeltaSteps
from nsm_graph.ops.delta_scan import delta_scan as delta_scan
from nsm_graph.ops.edge_attention import edge_attention as edge_attention
from nsm_graph.ops.edge_attention import edge_attention_weights as edge_attention_weights
from nsm_graph.ops.routing import route as route
