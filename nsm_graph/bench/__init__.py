"""Benchmarks: what `nsm-graph bench` runs. Correctness is checked before any number is printed."""

from collections.abc import Callable

from nsm_graph.bench.attention import bench_attention as bench_attention
from nsm_graph.bench.attention import bench_memory as bench_memory
from nsm_graph.bench.attention import bench_routing as bench_routing
from nsm_graph.bench.editing import bench_editing as bench_editing
from nsm_graph.bench.gpu import bench_gpu as bench_gpu
from nsm_graph.bench.imports import bench_imports as bench_imports
from nsm_graph.bench.loop import bench_loop as bench_loop
from nsm_graph.bench.propagation import bench_propagation as bench_propagation
from nsm_graph.bench.ragged import bench_ragged as bench_ragged
from nsm_graph.bench.record import BenchRecord as BenchRecord
from nsm_graph.bench.scaling import bench_scaling as bench_scaling
from nsm_graph.bench.scan import bench_scan as bench_scan
from nsm_graph.bench.streaming import bench_streaming as bench_streaming


def bench_all(*, repetitions: int = 5) -> list[BenchRecord]:
    """Every benchmark for processors, one after another."""
    names = [name for name in BENCHES if name not in ("all", "gpu")]
    return [record for name in names for record in BENCHES[name](repetitions=repetitions)]


#: The benchmarks by name.
BENCHES: dict[str, Callable[..., list[BenchRecord]]] = {
    "all": bench_all,
    "attention": bench_attention,
    "editing": bench_editing,
    "gpu": bench_gpu,
    "import": bench_imports,
    "loop": bench_loop,
    "memory": bench_memory,
    "propagation": bench_propagation,
    "ragged": bench_ragged,
    "routing": bench_routing,
    "scaling": bench_scaling,
    "scan": bench_scan,
    "streaming": bench_streaming,
}
