"""Benchmarks: what `nsm-graph bench` runs. Correctness is checked before any number is printed."""

from nsm_graph.bench.record import BenchRecord as BenchRecord
from nsm_graph.bench.scan import bench_scan as bench_scan

#: The benchmarks by name.
BENCHES = {"scan": bench_scan}
