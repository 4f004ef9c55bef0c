"""The Transformer as pages, deltas and a shadow graph."""

from nsm_graph.mmsb.masks import from_mask as from_mask
from nsm_graph.mmsb.page_cache import PropagationCache as PropagationCache
from nsm_graph.mmsb.propagation import Propagation as Propagation
from nsm_graph.mmsb.propagation import PropagationOutput as PropagationOutput
from nsm_graph.mmsb.propagation_pass import PropagationPass as PropagationPass
from nsm_graph.mmsb.router import DeltaRouter as DeltaRouter
