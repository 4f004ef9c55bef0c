"""The cache holds complete entries or none; the raw files' folder is never written to."""

import os

import pytest
from torch_geometric.datasets import TUDataset

from nsm_graph.data import MissingDataError, load
from nsm_graph.data.cache import whole_or_nothing


@pytest.fixture
def tu(tmp_path):
    return lambda: load("tu", root=tmp_path / "root", cache=tmp_path / "cache", dataset="TINY")


@pytest.fixture
def raw(tmp_path, write_tu):
    folder = tmp_path / "root" / "TINY" / "raw"
    write_tu(folder, "TINY")
    return folder


def test_processed_once(tu, raw, monkeypatch):
    tu()
    monkeypatch.setattr(TUDataset, "process", None)
    assert len(tu().train) == 32


def test_changed_raw_files_are_processed_again(tu, raw):
    assert tu().info.in_channels == 3
    (raw / "TINY_node_labels.txt").write_text("0\n1\n2\n3\n4\n" * 24)
    assert tu().info.in_channels == 5


def test_read_only_raw_folder(tu, raw):
    raw.chmod(0o555)
    try:
        assert len(tu().train) == 32
    finally:
        raw.chmod(0o755)


def test_interrupted_processing_leaves_nothing(tu, raw, tmp_path, tree, monkeypatch):
    process = TUDataset.process

    def interrupted(self):
        process(self)  # everything is written, but it is not known to be complete
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TUDataset, "process", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tu()
    assert tree(tmp_path / "cache") == []
    assert len(tu().train) == 32


def test_killed_processing_is_not_taken_for_complete(tu, raw, tmp_path):
    tu()
    (entry,) = (tmp_path / "cache").iterdir()
    # What a killed process leaves: a temporary folder with half a file.
    left_over = entry.rename(entry.with_name(f".{entry.name}-abc"))
    for file in left_over.rglob("*.pt"):
        file.write_bytes(file.read_bytes()[:10])
    assert len(tu().train) == 32
    assert entry.is_dir()


def test_damaged_entry_says_what_to_delete(tu, raw, tmp_path):
    tu()
    (entry,) = (tmp_path / "cache").iterdir()
    file = entry / "TINY" / "processed" / "data.pt"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{entry.name} is damaged .* delete that folder"):
        tu()


def test_unwritable_cache(raw, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ValueError, match=r"cannot be written .* choose another one with cache="):
        load("tu", root=tmp_path / "root", cache=blocked, dataset="TINY")


def test_the_faster_of_two_processes_wins(tmp_path):
    entry = tmp_path / "entry"
    with whole_or_nothing(entry) as staging:
        (staging / "mine").touch()
        entry.mkdir()
        (entry / "theirs").touch()
    assert os.listdir(tmp_path) == ["entry"] and os.listdir(entry) == ["theirs"]


def test_missing_without_network(tu, tmp_path, tree):
    with pytest.raises(MissingDataError) as caught:
        tu()
    folder = tmp_path / "root" / "TINY" / "raw"
    assert str(caught.value) == (
        "TINY is missing: put TINY_A.txt, TINY_graph_indicator.txt, TINY_graph_labels.txt "
        f"into {folder} (TUDataset collection, TU Dortmund, Morris et al.)"
    )
    assert isinstance(caught.value, FileNotFoundError)
    assert tree(tmp_path) == ["cache", "cache/downloads"]


def test_zinc_missing_without_network(tmp_path):
    with pytest.raises(MissingDataError, match=r"^ZINC is missing: put train.pickle, .* into "):
        load("zinc", root=tmp_path, cache=tmp_path / "cache")


def test_download_goes_to_the_cache(tu, tmp_path, write_tu, monkeypatch):
    def download(self):
        os.rmdir(self.raw_dir)
        write_tu(type(tmp_path)(self.raw_dir), "TINY")

    with monkeypatch.context() as patch:
        patch.setattr(TUDataset, "download", download)
        assert len(tu().train) == 32
    assert len(tu().train) == 32
    assert not (tmp_path / "root").exists()


def test_broken_download_leaves_nothing(tu, tmp_path, tree, monkeypatch):
    def download(self):
        with open(os.path.join(self.raw_dir, "TINY_A.txt"), "w") as file:
            file.write("1, 2\n")

    monkeypatch.setattr(TUDataset, "download", download)
    with pytest.raises(MissingDataError):
        tu()
    assert tree(tmp_path) == ["cache", "cache/downloads"]
