import pytest

from nsm_graph.data.tasks import TASKS, MultiQueryRecall, SequenceTask, make_task


def test_names():
    assert list(TASKS) == [
        "parity",
        "modular_arithmetic",
        "modular_arithmetic_brackets",
        "s3",
        "a5",
        "s5",
        "mqar",
        "copy",
        "selective_copy",
        "induction",
        "bindings",
    ]
    for name in TASKS:
        task = make_task(name)
        assert isinstance(task, SequenceTask) and task.name == name
        assert 0 < task.chance <= 0.5


def test_sizes():
    sizes = {name: (make_task(name).num_symbols, make_task(name).num_classes) for name in TASKS}
    assert sizes == {
        "parity": (2, 2),
        "modular_arithmetic": (8, 5),
        "modular_arithmetic_brackets": (10, 5),
        "s3": (6, 6),
        "a5": (60, 60),
        "s5": (120, 120),
        "mqar": (8192, 8192),
        "copy": (10, 10),
        "selective_copy": (16, 16),
        "induction": (16, 16),
        "bindings": ((68, 18), 16),
    }


def test_options_reach_the_task():
    task = make_task("mqar", num_pairs=16, filler="zero")
    assert task == MultiQueryRecall(num_pairs=16, filler="zero")


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("s4", {}, "unknown task 's4'; choose one of parity, modular_arithmetic, modular"),
        ("mqar", {"pairs": 4}, "'mqar' has no option 'pairs'; its options are vocab_size, num_pai"),
        ("s5", {"degree": 5}, "'s5' has no option 'degree'; it has none"),
        ("parity", {"modulus": 2}, "'parity' has no option 'modulus'; it has none"),
        ("modular_arithmetic", {"modulus": "5"}, "modulus is '5'; give an integer of at least 2"),
    ],
)
def test_bad_names_and_options(name, options, match):
    with pytest.raises(ValueError, match=match):
        make_task(name, **options)
