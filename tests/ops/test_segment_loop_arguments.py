"""The loop over segments: arguments that do not fit."""

import pytest
import torch
from segment_loop_oracle import make_case

from nsm_graph.ops.segment_loop import LoopSegments, LoopWeights, segment_loop


def arguments(**changes):
    """A call of two steps, three groups, seven tokens, that fits; all in float32."""
    case = make_case(3, 4, 2, counts=[[2, 3], [2]], idle=0, dtype=torch.float32, is_shared=False)
    given = {**case.rows, "segments": case.segments, "weights": case.weights, "heads": 2}
    weights = {name: changes.pop(name) for name in LoopWeights._fields if name in changes}
    parts = {name: changes.pop(name) for name in LoopSegments._fields if name in changes}
    given["weights"] = given["weights"]._replace(**weights)
    given["segments"] = given["segments"]._replace(**parts)
    return {**given, "backend": "cpu", **changes}


def test_the_arguments_fit():
    for weights in ({}, dict.fromkeys(LoopWeights._fields[8:])):
        after, final = segment_loop(**arguments(**weights))
        assert after.shape == (9, 4)
        assert final.shape == (6, 4)


zeros, whole = torch.zeros, torch.tensor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "fast"}, "backend must be one of .*'triton', 'reference'.* but is 'fast'"),
        ({"routed": zeros(9, 5)}, r"routed must have shape \(rows, 4\), but has \(9, 5\)"),
        ({"key": zeros(7)}, r"key must have shape \(rows, 4\), but has \(7,\)"),
        ({"value": zeros(7, 2, 2)}, r"value must have shape \(rows, 4\), but has \(7, 2, 2\)"),
        ({"states": zeros(2, 3, 4)}, r"states must have shape .* but has \(2, 3, 4\)"),
        ({"key": zeros(7, 4).double()}, "key is torch.float64 on cpu, but states .*float32 on cpu"),
        ({"value": zeros(7, 4, device="meta")}, "value is torch.float32 on meta, but .* on cpu"),
        ({"heads": 0}, "heads=0 must divide the 4 channels"),
        ({"heads": 3}, "heads=3 must divide the 4 channels"),
        ({"num_active": whole([2, 2])}, "adds up to 4 groups, but token_ptr has 3"),
        ({"num_active": whole([1, 2])}, "num_active must not grow"),
        ({"token_ptr": whole([0, 2, 4, 8])}, "token_ptr ends at 8, but key and value have 7 and 7"),
        ({"value": zeros(6, 4)}, "token_ptr ends at 7, but key and value have 7 and 6 rows"),
        ({"token_ptr": whole([0, 4, 4, 7])}, "every group needs at least one token"),
        ({"token_ptr": whole([0, 5, 4, 7])}, "every group needs at least one token"),
        ({"token_ptr": whole([1, 2, 4, 7])}, "token_ptr"),
        ({"routed": zeros(8, 4)}, "routed has 8 rows for 3 groups and states have 6"),
        ({"states": zeros(5, 4)}, "states have 5 for at least 2 examples"),
        ({"query": None}, r"weights\.query is missing"),
        ({"candidate_bias": None}, r"weights\.candidate_bias is missing"),
        ({"mix": None}, r"weights\.mix is missing"),
        ({"shift": None}, r"weights\.shift is missing"),
        ({"out": zeros(4, 5)}, r"weights\.out must have shape \(4, 4\) .* but has \(4, 5\)"),
        ({"gates": zeros(8, 4)}, r"weights\.gates must have shape \(8, 8\)"),
        ({"candidate": zeros(8, 8)}, r"weights\.candidate must have shape \(4, 8\)"),
        ({"qkv_bias": zeros(4)}, r"weights\.qkv_bias must have shape \(12,\)"),
        ({"qkv": None}, r"weights\.qkv is missing"),
        (
            {"scale": zeros(4).double()},
            r"weights\.scale must have shape \(4,\) in torch.float32.* in torch.float64",
        ),
        ({"out": zeros(4, 4, device="meta")}, r"weights\.out must have .* on cpu, .* on meta"),
    ],
)  # fmt: skip
def test_wrong_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        segment_loop(**arguments(**changes))
