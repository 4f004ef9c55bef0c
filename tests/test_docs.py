"""What the documents show runs, and what they name exists."""

import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "code",
    blocks("python"),
    ids=["layer", "graph", "scan", "memory", "allocator", "topology", "pages"],
)
def test_readme_example_runs(code: str, capsys) -> None:
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "nan" not in capsys.readouterr().out


def test_the_page_on_topologies_runs(capsys) -> None:
    names: dict = {"__name__": "docs"}
    for code in blocks("python", (ROOT / "docs" / "topologies.md").read_text()):
        if "topology.sql(" in code and find_spec("duckdb") is None:
            continue
        exec(compile(code, "topologies.md", "exec"), names)
    assert "(ring(1) | (knn(4) - star(1)))" in capsys.readouterr().out
    nodes = names["topology"].NodeSet.from_counts([6])
    assert names["both"](nodes).bias.shape == (names["both"](nodes).num_edges, 2)
    assert names["elders"](nodes).num_edges == 12


def test_the_page_on_attention_in_sql_runs(capsys) -> None:
    pytest.importorskip("duckdb", reason="the page runs DuckDB: pip install 'nsm-graph[sql]'")
    from nsm_graph.mmsb.attention_sql import attention_statement

    text = (ROOT / "docs" / "attention_in_sql.md").read_text()
    assert blocks("sql", text) == [attention_statement()]
    for code in blocks("python", text):
        exec(compile(code, "attention_in_sql.md", "exec"), {"__name__": "docs"})
    assert capsys.readouterr().out == "tensor(True)\n"


def test_the_page_on_propagation_runs(capsys) -> None:
    torch.manual_seed(0)
    names: dict = {"__name__": "docs"}
    for code in blocks("python", (ROOT / "docs" / "propagation.md").read_text()):
        exec(compile(code, "propagation.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(line.endswith("True") for line in lines), lines


def test_readme_starts_with_the_two_commands() -> None:
    train, test = blocks("bash")[:2]
    assert train.splitlines()[-1].endswith("nsm-graph train digits")
    assert test.splitlines()[-1].endswith("pytest")
    for block in (train, test):
        assert block.startswith("python3.11 -m venv"), "complete on a fresh machine"


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_file_that_the_equations_name_exists() -> None:
    text = (ROOT / "docs" / "equations.md").read_text()
    for name in re.findall(r"`((?:nn|ops|memory|models|topology)/[\w/.]*)`", text):
        assert (ROOT / "nsm_graph" / name).exists(), name


def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted += [name for name in extra if not name.startswith("nsm-graph")]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    names = {re.split(r"[\[><=]", name)[0].lower() for name in wanted}
    assert names <= pinned, f"not pinned: {sorted(names - pinned)}"
