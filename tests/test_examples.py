"""Every example runs as a user would run it, and says what it should."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "01_import_a_layer.py": "complete relation = its edges: True",
    "02_train_on_a_graph.py": "accuracy on the 30 unlabelled members: 0.8",
    "03_custom_topology.py": "two camps (ours)",
    "04_stream.py": "pieces = whole: True",
    "05_edit_the_memory.py": "active states: 6 -> 4 -> 7",
    "06_transformer_as_pages.py": "updated = computed again: True",
}


def test_every_script_is_listed() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", sorted(SAYS))
def test_example_runs(name: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert SAYS[name] in result.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_config_is_valid(path: Path) -> None:
    from nsm_graph.training.parse import config_parser, parse

    config, _ = parse(config_parser("test", ""), ["--config", str(path)])
    assert config.model.kind == "nsm"
