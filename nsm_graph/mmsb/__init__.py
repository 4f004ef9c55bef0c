"""The Transformer as pages, deltas and a shadow graph."""

from nsm_graph.mmsb.attention_sql import attention_sql as attention_sql
from nsm_graph.mmsb.convert_hugging_face import from_hugging_face as from_hugging_face
from nsm_graph.mmsb.masks import from_mask as from_mask
from nsm_graph.mmsb.page_cache import PropagationCache as PropagationCache
from nsm_graph.mmsb.propagation import Propagation as Propagation
from nsm_graph.mmsb.propagation import PropagationOutput as PropagationOutput
from nsm_graph.mmsb.propagation_pass import PropagationPass as PropagationPass
from nsm_graph.mmsb.router import DeltaRouter as DeltaRouter
from nsm_graph.mmsb.token_propagation import PageEmbedding as PageEmbedding
from nsm_graph.mmsb.token_propagation import TokenPropagation as TokenPropagation
