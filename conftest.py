"""What the examples of docstrings find, and which modules are not searched for them."""

from importlib.util import find_spec

import pytest
import torch

from nsm_graph.topology import NodeSet

collect_ignore = []
if find_spec("triton") is None:
    collect_ignore += [f"nsm_graph/ops/edge_attention/{name}.py" for name in ("gpu", "triton")]
    collect_ignore += [f"nsm_graph/ops/segment_loop/{name}" for name in ("gpu.py", "triton")]
if find_spec("duckdb") is None:
    collect_ignore += ["nsm_graph/topology/sql.py", "nsm_graph/mmsb/attention_sql.py"]


@pytest.fixture(autouse=True)
def names(doctest_namespace):
    """What examples of topologies have in common."""
    doctest_namespace.update(torch=torch, NodeSet=NodeSet)
