"""A memory that fits the example: bindings, learned by the recipe and counted."""

import json

import pytest

from nsm_graph.cli import main


@pytest.mark.slow
def test_examples_hold_as_many_states_as_they_have_bindings(tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", "bindings", "--out", run]) == 0
    capsys.readouterr()
    results = []
    for options in ([], ["--keep-states"]):
        assert main(["evaluate", run, "--examples", "1000", *options]) == 0
        results.append(json.loads(capsys.readouterr().out))
    pruned, kept = results
    assert pruned["states_within_one"] >= 0.95
    assert pruned["accuracy"] >= kept["accuracy"] - 0.005
    assert pruned["accuracy"] >= 0.98
    assert pruned["num_states"] < kept["num_states"]
