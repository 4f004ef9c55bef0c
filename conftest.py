"""Which modules of the package are not searched for examples where their library is missing."""

from importlib.util import find_spec

collect_ignore = []
if find_spec("triton") is None:
    collect_ignore += [f"nsm_graph/ops/edge_attention/{name}.py" for name in ("gpu", "triton")]
    collect_ignore += [f"nsm_graph/ops/segment_loop/{name}" for name in ("gpu.py", "triton")]
