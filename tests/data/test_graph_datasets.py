import json
from itertools import chain

import pytest
import torch
from torch_geometric.loader import DataLoader

from nsm_graph.data import MissingDataError, load


@pytest.fixture
def tu(tmp_path, write_tu):
    """Loads the set TINY; the options of the first call say what its files have."""

    def load_tiny(*, labels=True, attributes=False, edges=False, **options):
        raw = tmp_path / "root" / "TINY" / "raw"
        if not raw.exists():
            write_tu(raw, "TINY", labels=labels, attributes=attributes, edges=edges)
        return load(
            "tu", root=tmp_path / "root", cache=tmp_path / "cache", dataset="TINY", **options
        )

    return load_tiny


def identities(part):
    return [tuple(data.x.flatten().tolist()) for data in part]


def test_tu(tu, tmp_path, tree):
    splits = tu(edges=True)
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [32, 4, 4]
    info = splits.info
    assert (info.in_channels, info.out_channels, info.edge_channels) == (3, 2, 2)
    assert info.name == "TINY" and info.task == "classification" and info.num_embeddings is None
    assert sum(data.y.item() for data in splits.test) == 2
    batch = next(iter(DataLoader(splits.train, batch_size=8)))
    assert batch.x.dtype == torch.float32 and batch.y.shape == (8,)
    assert batch.edge_attr.size(1) == 2
    # Nothing was written beside the raw files.
    assert all(name.startswith("TINY/raw") or name == "TINY" for name in tree(tmp_path / "root"))


def test_tu_folds_partition_the_set(tu):
    # Attributes number the nodes, so they identify the graphs.
    folds = [tu(attributes=True, use_node_attr=True, fold=fold) for fold in range(10)]
    tested = [graph for fold in folds for graph in identities(fold.test)]
    assert len(tested) == len(set(tested)) == 40
    for fold in folds:
        parts = [identities(part) for part in (fold.train, fold.validation, fold.test)]
        assert len(set(chain.from_iterable(parts))) == 40
    again = tu(use_node_attr=True, fold=3)
    assert identities(again.train) == identities(folds[3].train)
    other = tu(use_node_attr=True, fold=3, seed=1)
    assert identities(other.test) != identities(folds[3].test)


def test_tu_published_folds(tu, tmp_path):
    path = tmp_path / "splits.json"
    inner = [{"train": [5, 6], "validation": [7]}]
    path.write_text(json.dumps([{"test": [0, 39], "model_selection": inner}]))
    splits = tu(attributes=True, splits=path, use_node_attr=True)
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [2, 1, 2]
    assert identities(splits.test)[0][0] == 0.0  # graph 0 begins with node 0
    for folds, match in [
        ([{"test": [0, 40], "model_selection": inner}], "expected indices 0 to 39, got 0 to 40"),
        ([{"test": [5], "model_selection": inner}], "fold 0 has a graph twice"),
        ([{"test": [5]}], "expected folds in the form"),
        ([{"test": ["a"], "model_selection": inner}], "expected folds in the form"),
        ({"a": 1}, "expected folds in the form"),
        ([], "fold is 0"),
    ]:
        path.write_text(json.dumps(folds))
        with pytest.raises(ValueError, match=match):
            tu(splits=path)
    path.write_text("{")
    with pytest.raises(ValueError, match="expected folds in the form"):
        tu(splits=path)
    with pytest.raises(MissingDataError, match=r"splits is missing: put no.json into"):
        tu(splits=tmp_path / "no.json")


def test_tu_without_node_features(tu):
    degrees = tu(labels=False)
    # The largest path has inner nodes of degree 2; a single node has degree 0.
    assert degrees.info.in_channels == 3
    for data in degrees.train:
        assert data.x.size(0) == data.num_nodes
        assert torch.equal(data.x.argmax(1), data.edge_index[0].bincount(minlength=data.num_nodes))
    constant = tu(node_features="constant", pe="random_walk", pe_channels=4)
    assert constant.info.in_channels == 1 and constant.info.pe_channels == 4
    for data in constant.train:
        assert (data.x == 1).all() and data.pe.shape == (data.num_nodes, 4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"fold": 10}, "fold is 10; choose 0 to 9"),
        ({"fold": -1}, "fold is -1; choose 0 to 9"),
        ({"num_folds": 41}, "num_folds is 41; choose 2 to 40"),
        ({"node_features": "ones"}, "unknown node_features 'ones'"),
        ({"pe": "random_walk"}, "give both, or neither"),
        ({"pe_channels": 4}, "give both, or neither"),
        ({"pe": "sine", "pe_channels": 4}, "unknown pe 'sine'"),
    ],
)
def test_tu_bad_options(tu, options, match):
    with pytest.raises(ValueError, match=match):
        tu(**options)


def test_tu_bad_name(tmp_path):
    with pytest.raises(ValueError, match="give the name of a TU set"):
        load("tu", root=tmp_path, dataset="../TINY")


@pytest.mark.parametrize(
    ("part", "match"),
    [
        ("graph_labels", r"TINY_graph_labels.txt: expected 40 lines, got 39\); put the original"),
        ("node_labels", r"TINY_node_labels.txt: expected 120 lines, got 119"),
        ("edge_labels", r"TINY_edge_labels.txt: expected 160 lines, got 159"),
    ],
)
def test_tu_damaged(tmp_path, write_tu, tree, part, match):
    raw = tmp_path / "root" / "TINY" / "raw"
    write_tu(raw, "TINY", edges=True)
    file = raw / f"TINY_{part}.txt"
    file.write_text("\n".join(file.read_text().split()[:-1]))
    with pytest.raises(ValueError, match=match):
        load("tu", root=tmp_path / "root", cache=tmp_path / "cache", dataset="TINY")
    assert tree(tmp_path / "cache") == []


def test_zinc(zinc_root, tmp_path, tree):
    before = tree(zinc_root)
    splits = load("zinc", root=zinc_root, cache=tmp_path / "cache")
    for part in (splits.train, splits.validation, splits.test):
        assert [data.num_nodes for data in part] == [1, 4, 6]
    data = splits.train[1]
    assert data.x.tolist() == [0, 1, 2, 3] and data.x.dtype == torch.int64
    assert data.edge_attr.dtype == torch.int64 and data.edge_attr.max() == 3
    assert data.y.tolist() == [[2.0]]
    info = splits.info
    assert info.task == "regression" and info.out_channels == 1
    assert (info.num_embeddings, info.edge_embeddings, info.in_channels) == (28, 4, 1)
    batch = next(iter(DataLoader(splits.train, batch_size=3)))
    assert batch.y.shape == (3, 1) and batch.x.shape == (11,) and batch.num_nodes == 11
    assert tree(zinc_root) == before


@pytest.mark.parametrize("pe", ["random_walk", "laplacian"])
def test_zinc_positional(zinc_root, tmp_path, pe):
    pytest.importorskip("scipy", reason="Laplacian encodings need SciPy")
    # 8 channels are more than any of these molecules has atoms.
    options = {"root": zinc_root, "cache": tmp_path / "cache", "pe": pe, "pe_channels": 8}
    first, again = load("zinc", **options), load("zinc", **options)
    for one, two in zip(first.train, again.train, strict=True):
        assert one.pe.shape == (one.num_nodes, 8)
        assert torch.equal(one.pe, two.pe)
    assert first.info.pe_channels == 8
    assert next(iter(DataLoader(first.train, batch_size=3))).pe.shape == (11, 8)


@pytest.mark.parametrize("damage", [b"", b"\x80\x04", b"no pickle at all", b"\x80\x04]."])
def test_zinc_damaged(zinc_root, tmp_path, tree, damage):
    (zinc_root / "ZINC" / "raw" / "test.pickle").write_bytes(damage)
    with pytest.raises(ValueError, match=r"ZINC.raw cannot be read as ZINC .* put the original"):
        load("zinc", root=zinc_root, cache=tmp_path / "cache")
    assert tree(tmp_path / "cache") == []


def test_real_tu(real_data, tmp_path):
    root = real_data("PROTEINS")
    file = root / "TU_splits" / "gnn-comparison" / "CHEMICAL" / "PROTEINS_full_splits.json"
    splits = load("tu", root=root, cache=tmp_path, splits=file)
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [900, 101, 112]
    splits = load(
        "tu", root=root, cache=tmp_path, dataset="MUTAG", pe="random_walk", pe_channels=12
    )
    assert splits.info.in_channels == 7 and splits.info.edge_channels == 4


def test_real_zinc(real_data, tmp_path):
    splits = load("zinc", root=real_data("ZINC", "raw"), cache=tmp_path)
    assert [len(p) for p in (splits.train, splits.validation, splits.test)] == [10000, 1000, 1000]
    assert sum(data.num_nodes for data in splits.train) == 231_664
