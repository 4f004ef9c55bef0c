"""The Transformer as pages, deltas and a shadow graph."""

from nsm_graph.mmsb.attention_sql import attention_sql as attention_sql
