"""The public names, their argument order, and what importing them costs."""

import inspect
import subprocess
import sys

import nsm_graph as nsm

HEAVY = ["sklearn", "matplotlib", "lightning_fabric", "jsonargparse", "tensorboard", "numba"]
HEAVY += ["transformers", "duckdb"]


def arguments(function: object) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY and p.name != "self"]


def test_argument_order_is_fixed() -> None:
    expected = {
        nsm.Relation.complete: ["src_ptr", "dst_ptr"],
        nsm.Relation.from_edge_index: ["edge_index", "size"],
        nsm.ops.edge_attention: ["query", "key", "value", "relation"],
        nsm.nn.TokenToStateRouter: ["token_channels", "state_channels", "num_states", "heads"],
        nsm.nn.HybridAttention: ["in_channels", "heads"],
        nsm.nn.StatePropagator: ["state_channels"],
        nsm.nn.StateCommunication: ["state_channels", "heads"],
        nsm.nn.MemoryConv: ["channels", "num_states", "heads"],
        nsm.nn.MemoryConv.forward: ["x", "edge_index", "batch", "state"],
        nsm.nn.StatePool: ["mode"],
        nsm.nn.TokenReadout: ["token_channels", "state_channels", "heads"],
        nsm.memory.StateManager: ["state_channels", "max_states"],
        nsm.NeuralStateMachine: ["in_channels", "state_channels", "num_states", "out_channels"],
        nsm.NeuralStateMachine.forward: ["x", "batch"],
        nsm.NeuralStateMachine.run: ["x", "batch", "state"],
        nsm.topology.ring: ["k"],
        nsm.topology.knn: ["k"],
        nsm.topology.star: ["hubs"],
        nsm.topology.band: ["width", "by"],
        nsm.topology.window: ["width", "by"],
        nsm.topology.small_world: ["k", "p", "seed"],
        nsm.topology.expander: ["degree", "seed"],
        nsm.topology.random_regular: ["degree", "seed"],
        nsm.topology.learned: ["num_states", "k"],
        nsm.topology.sql: ["query"],
        nsm.topology.from_edge_index: ["edge_index", "num_nodes"],
        nsm.mmsb.DeltaRouter: ["channels", "heads"],
        nsm.mmsb.PropagationPass: ["channels", "heads"],
        nsm.mmsb.PropagationPass.forward: ["pages", "shadow_graph", "batch"],
        nsm.mmsb.Propagation: ["channels", "num_passes", "heads"],
        nsm.mmsb.Propagation.forward: ["pages", "batch"],
        nsm.mmsb.Propagation.run: ["pages", "batch"],
        nsm.mmsb.Propagation.update: ["pages", "changed"],
        nsm.mmsb.Propagation.append: ["pages"],
        nsm.mmsb.Propagation.from_torch: ["encoder"],
        nsm.mmsb.PropagationPass.from_torch: ["layer"],
        nsm.mmsb.from_hugging_face: ["model"],
        nsm.mmsb.from_mask: ["mask"],
    }
    for function, names in expected.items():
        assert arguments(function) == names, function


def test_output_fields_are_fixed() -> None:
    assert nsm.MachineOutput._fields == ("out", "tokens", "state", "record")
    assert nsm.mmsb.PropagationOutput._fields == ("pages", "snapshots", "cache")


def test_import_is_light() -> None:
    loaded, peer = (
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"import {package}, sys; print(*[n for n in {HEAVY} if n in sys.modules])",
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for package in ("nsm_graph", "torch_geometric")
    )
    # PyG itself may load some of these where they are installed; we add none.
    assert set(loaded) <= set(peer)


def test_every_public_name_has_a_docstring() -> None:
    for module in (nsm, nsm.nn, nsm.ops, nsm.memory, nsm.topology, nsm.mmsb):
        for name, thing in vars(module).items():
            if not name.startswith("_") and (inspect.isclass(thing) or inspect.isfunction(thing)):
                assert inspect.getdoc(thing), f"{module.__name__}.{name}"
