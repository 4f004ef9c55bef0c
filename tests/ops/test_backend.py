"""The table of backends: which one serves a call, and why."""

import pytest
import torch

from nsm_graph.ops import available_backends, backend, edge_attention, explain
from nsm_graph.ops.backend import choose_backend
from nsm_graph.relation import Relation

GENERAL = Relation.from_edge_index(torch.tensor([[0], [0]]))
CAUSAL = Relation.causal([0, 3, 6])
UNIFORM = Relation.complete([0, 3, 6], [0, 2, 4])
HALF_FULL = Relation.complete([0, 4, 4], [0, 2, 4])
MOSTLY_EMPTY = Relation.complete([0, 4, 4, 4], [0, 2, 4, 6])


@pytest.mark.parametrize(
    ("relation", "dtype", "name", "reason"),
    [
        (UNIFORM, torch.float64, "reference", "float64"),
        (GENERAL, torch.float32, "sparse", "general edges"),
        (GENERAL, torch.float16, "sparse", "general edges"),
        (GENERAL, torch.float64, "reference", "float64"),
        (
            GENERAL.to("meta"),
            torch.float32,
            "reference",
            "general edges; no kernels for this device",
        ),
        (UNIFORM, torch.float32, "dense", "uniform"),
        (UNIFORM, torch.bfloat16, "dense", "uniform"),
        (HALF_FULL, torch.float32, "dense", "enough of the padding full (50% full)"),
        (MOSTLY_EMPTY, torch.float32, "sparse", "too little of the padding full (33% full)"),
        (Relation.complete([0], [0]), torch.float32, "dense", "uniform"),
        (CAUSAL, torch.float64, "reference", "float64"),
        (CAUSAL, torch.float32, "dense", "causal and uniform"),
        (Relation.causal([0]), torch.float32, "dense", "causal and uniform"),
        (CAUSAL.with_bias(torch.zeros(12)), torch.float32, "sparse", "causal, with a bias"),
        (
            Relation.causal([0, 4, 7]),
            torch.float32,
            "dense",
            "causal and ragged, enough of the padding full (80% full)",
        ),
        (
            Relation.causal([0, 3, 4]),
            torch.float32,
            "sparse",
            "causal and ragged, too little of the padding full (58% full)",
        ),
        (
            Relation.causal([0, 256, 272]),
            torch.float32,
            "dense",
            "causal and ragged, long examples: one by one (50% full)",
        ),
    ],
)
def test_explain(relation, dtype, name, reason):
    choice = explain(relation, dtype)
    assert choice.name == name
    assert reason in choice.reason


def test_what_a_causal_call_brings_decides_too():
    assert explain(CAUSAL, has_bias=True) == ("sparse", "causal, with a bias")
    assert explain(CAUSAL, normalise="source") == ("sparse", "causal, grouped by source")
    assert explain(UNIFORM, normalise="source", has_bias=True).name == "dense"


def test_the_operation_tells_the_table_what_a_call_brings(monkeypatch):
    calls = []
    for name in ("dense", "sparse"):
        monkeypatch.setitem(
            edge_attention.__globals__["BACKENDS"],
            name,
            lambda *args, name=name, **options: calls.append(name),
        )
    q = torch.zeros(6, 1, 1)
    edge_attention(q, q, q, CAUSAL)
    edge_attention(q, q, q, CAUSAL, bias=torch.zeros(12))
    edge_attention(q, q, q, CAUSAL.with_bias(torch.zeros(12)))
    edge_attention(q, q, q, CAUSAL, normalise="source")
    assert calls == ["dense", "sparse", "sparse", "sparse"]


def test_a_forced_backend_is_used_whatever_the_table_says():
    choice = choose_backend(MOSTLY_EMPTY, torch.float64, forced="dense")
    assert choice == ("dense", "forced by backend=")
    assert choose_backend(UNIFORM, torch.float32, forced="reference").name == "reference"


@pytest.mark.parametrize(("relation", "used"), [(UNIFORM, "dense"), (GENERAL, "sparse")])
def test_the_operation_runs_what_explain_says(monkeypatch, relation, used):
    calls = []
    for name in ("dense", "reference", "sparse"):
        monkeypatch.setitem(
            edge_attention.__globals__["BACKENDS"],
            name,
            lambda *args, name=name, **options: calls.append(name),
        )
    q, k = torch.zeros(relation.num_dst, 1, 1), torch.zeros(relation.num_src, 1, 1)
    edge_attention(q, k, k, relation)
    assert calls == [used] == [explain(relation).name]


class OnGpu(Relation):
    """General edges that claim to be on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self):
        super().__init__(torch.tensor([[0], [0]]), (1, 1))


def test_general_edges_on_a_gpu_need_triton(monkeypatch):
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    assert explain(OnGpu()) == ("sparse", "general edges")
    assert explain(OnGpu(), torch.float64).name == "reference"
    table = {name: why for name, _, why in available_backends()}
    assert "any edges on a CPU (Numba) and a GPU (Triton)" in table["sparse"]
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    reason = "general edges; needs Triton: pip install 'nsm-graph[gpu]'"
    assert explain(OnGpu()) == ("reference", reason)
    table = {name: why for name, _, why in available_backends()}
    assert "on a CPU (Numba); a GPU needs Triton: pip install" in table["sparse"]
    with pytest.raises(ValueError, match='"sparse" on cuda:0 needs Triton: pip install'):
        choose_backend(OnGpu(), torch.float32, forced="sparse")
    assert choose_backend(GENERAL, torch.float32, forced="sparse").name == "sparse"


def test_available_backends_say_what_they_need(monkeypatch):
    monkeypatch.setattr(backend, "HAS_TORCH_SCATTER", False)
    table = {name: (is_available, why) for name, is_available, why in available_backends()}
    assert table["reference"][0]
    assert table["dense"][0]
    is_available, why = table["segment_csr"]
    assert not is_available
    assert "pip install --no-build-isolation torch-scatter" in why
    monkeypatch.setattr(backend, "HAS_TORCH_SCATTER", True)
    assert ("segment_csr", True, "torch-scatter is installed; only where forced") in (
        available_backends()
    )


def test_forcing_what_cannot_serve(monkeypatch):
    with pytest.raises(ValueError, match=r"must be one of .* or None, but is 'quick'"):
        choose_backend(UNIFORM, torch.float32, forced="quick")
    with pytest.raises(ValueError, match='"dense" needs a complete relation'):
        choose_backend(GENERAL, torch.float32, forced="dense")
    monkeypatch.setattr(backend, "HAS_TORCH_SCATTER", False)
    with pytest.raises(ValueError, match="'segment_csr' is not available: needs torch-scatter"):
        choose_backend(UNIFORM, torch.float32, forced="segment_csr")
