"""Benchmarks: what `nsm-graph bench` runs. Correctness is checked before any number is printed."""

from collections.abc import Callable

from nsm_graph.bench.attention import bench_attention as bench_attention
from nsm_graph.bench.attention import bench_memory as bench_memory
from nsm_graph.bench.attention import bench_routing as bench_routing
from nsm_graph.bench.record import BenchRecord as BenchRecord
from nsm_graph.bench.scan import bench_scan as bench_scan

#: The benchmarks by name.
BENCHES: dict[str, Callable[..., list[BenchRecord]]] = {
    "attention": bench_attention,
    "memory": bench_memory,
    "routing": bench_routing,
    "scan": bench_scan,
}
