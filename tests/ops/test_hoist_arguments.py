"""What is hoisted: arguments that do not fit."""

import pytest
import torch
from hoist_oracle import make_case

from nsm_graph.ops.hoist import HoistWeights, TokenGroups, hoist


def arguments(**changes):
    """A call of ten tokens, two groups of them, that fits; all in float32."""
    case = make_case(3, 5, 4, 2, counts=[4, 3], gaps=(1,), dtype=torch.float32)
    weights = {name: changes.pop(name) for name in HoistWeights._fields if name in changes}
    groups = {name: changes.pop(name) for name in TokenGroups._fields if name in changes}
    given = {
        "x": case.x,
        "groups": TokenGroups(torch.tensor([5, 0]), torch.tensor([0, 4, 7]))._replace(**groups),
        "weights": case.weights._replace(**weights),
        "heads": 2,
        "backend": "cpu",
    }
    return given | changes


@pytest.mark.parametrize("backend", ["cpu", "reference", None])
def test_the_arguments_fit(backend):
    out = hoist(**arguments(backend=backend))
    assert [tuple(x.shape) for x in out] == [(7, 4), (7, 4), (6, 4), (21,)]
    out = hoist(**arguments(backend=backend, value=None, value_bias=None))
    assert [tuple(x.shape) for x in out] == [(7, 4), (7, 4), (6, 4), (21,)]


zeros, whole = torch.zeros, torch.tensor


@pytest.mark.parametrize("backend", ["cpu", "reference", None])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": zeros(9)}, r"x must have shape \(tokens, channels\), but has \(9,\)"),
        ({"x": zeros(9, 6)}, r"weights\.key must have shape \(4, 6\) .* but has \(4, 5\)"),
        ({"x": zeros(9, 5).double()}, r"weights\.key must have .*float64 .* has .*float32"),
        ({"heads": 0}, r"heads=0 must divide the 6 rows of weights\.logits"),
        ({"heads": 4}, r"heads=4 must divide the 6 rows of weights\.logits"),
        ({"logits": zeros(0, 5)}, r"heads=2 must divide the 0 rows"),
        ({"key": None}, r"weights\.key is missing"),
        ({"key_bias": None}, r"weights\.key_bias is missing"),
        ({"value": None}, r"weights\.value is missing"),
        ({"value_bias": None}, r"weights\.value_bias is missing"),
        ({"logits_bias": None}, r"weights\.logits_bias is missing"),
        ({"out_bias": None}, r"weights\.out_bias is missing"),
        ({"key_bias": zeros(5)}, r"weights\.key_bias must have shape \(4,\) .* has \(5,\)"),
        ({"value": zeros(5, 5)}, r"weights\.value must have shape \(4, 5\) .* but has \(5, 5\)"),
        ({"logits": zeros(6, 4)}, r"weights\.logits must have shape \(6, 5\)"),
        ({"logits_bias": zeros(4)}, r"weights\.logits_bias must have shape \(6,\)"),
        ({"out": zeros(5, 4)}, r"weights\.out must have shape \(4, 5\) .* but has \(5, 4\)"),
        (
            {"out_bias": zeros(4).double()},
            r"weights\.out_bias must have .* torch.float32 on cpu, but has .* torch.float64",
        ),
        ({"out": zeros(4, 5, device="meta")}, r"weights\.out must have .* on cpu, .* on meta"),
        ({"first": whole([5.0, 0.0])}, r"groups\.first .* torch.int64 on cpu, .* torch.float32"),
        ({"first": whole([[5, 0]])}, r"groups\.first must have one dimension .* but has 2"),
        ({"ptr": whole([0, 4, 7]).int()}, r"groups\.ptr must .* torch.int64 .* torch.int32"),
        ({"ptr": whole([0, 4, 7]).to("meta")}, r"groups\.ptr must .* on cpu, .* on meta"),
        ({"ptr": whole([0, 7])}, r"groups\.ptr must begin at 0 and grow 2 times, .* \(2 numbers"),
        ({"ptr": whole([1, 4, 7])}, r"groups\.ptr must begin at 0 .* is \[1, 4, 7\]"),
        ({"ptr": whole([0, 4, 4])}, r"groups\.ptr must begin at 0 and grow 2 times"),
        ({"ptr": whole([0, 4, 3])}, r"groups\.ptr must begin at 0 and grow 2 times"),
        ({"first": whole([5, -1])}, r"reach from token -1 to 9, but x has 10 rows"),
        ({"first": whole([7, 0])}, r"reach from token 0 to 11, but x has 10 rows"),
        # The second one stands first, and reaches into the first one.
        (
            {"first": whole([2, 0])},
            r"one group, but group 1 has tokens 0 to 2 and group 0 has tokens 2 to 5; give x",
        ),
        ({"first": whole([3, 3])}, r"group \d has tokens 3 to \d and group \d has tokens 3 to"),
        ({"first": whole([1, 2])}, r"group 0 has tokens 1 to 4 and group 1 has tokens 2 to 4"),
    ],
)  # fmt: skip
def test_wrong_arguments(changes, message, backend):
    with pytest.raises(ValueError, match=message):
        hoist(**arguments(backend=backend, **changes))


def test_no_such_backend():
    with pytest.raises(ValueError, match=r"backend must be one of .*'cpu', 'reference'.* 'fast'"):
        hoist(**arguments(backend="fast"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_says_what_it_takes(dtype):
    case = make_case(3, 5, 4, 2, dtype=dtype)
    with pytest.raises(ValueError, match=f"float32 and torch.float64 on cpu, but x is {dtype}"):
        case.run()
    assert case.run(backend=None).key.dtype == dtype


def test_three_groups_of_which_two_that_are_no_neighbours_share_tokens():
    # The longest one stands first and reaches over the second into the third.
    groups = TokenGroups(torch.tensor([0, 2, 4]), torch.tensor([0, 6, 7, 9]))
    with pytest.raises(ValueError, match="group 0 has tokens 0 to 5 and group 1 has tokens 2 to 2"):
        hoist(**arguments(groups=groups))
