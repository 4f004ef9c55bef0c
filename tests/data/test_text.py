import pytest
import torch

from nsm_graph.data import MissingDataError, load


@pytest.fixture
def write(tmp_path):
    def file(text: str):
        path = tmp_path / "some.txt"
        path.write_bytes(text.encode())
        return path

    return file


def decode(data, symbols):
    return "".join(symbols[i] for i in data.x.tolist())


def test_splits_in_order(write):
    text = "".join(chr(97 + i * 7 % 26) for i in range(197)) + "é\r\n😀"
    splits = load("text", path=write(text))
    symbols = splits.info.symbols
    assert symbols == sorted(set(text))
    assert splits.info.num_embeddings == splits.info.out_channels == len(symbols)
    assert splits.info.task == "next_token" and splits.info.in_channels == 1
    read = ""
    for part in (splits.train, splits.validation, splits.test):
        (data,) = part
        assert data.x.dtype == data.y.dtype == torch.int64
        assert data.num_nodes == len(data.x) == len(data.y)
        assert torch.equal(data.x[1:], data.y[:-1])
        read += decode(data, symbols) + symbols[data.y[-1]]
    assert read == text
    assert len(splits.train[0].x) == 201 * 90 // 100 - 1


def test_shortest_text(write):
    splits = load("text", path=write("a" * 40))
    assert [len(p[0].x) for p in (splits.train, splits.validation, splits.test)] == [35, 1, 1]
    with pytest.raises(ValueError, match="expected at least 40 characters, got 39"):
        load("text", path=write("a" * 39))


def test_missing(tmp_path):
    with pytest.raises(MissingDataError, match=r"put input.txt into .*tinyshakespeare \(Tiny Sh"):
        load("text", root=tmp_path)
    with pytest.raises(MissingDataError, match=r"put no.txt into .* \(any UTF-8 text\)"):
        load("text", path=tmp_path / "no.txt")


def test_not_utf8(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("é".encode("latin-1") * 50)
    with pytest.raises(ValueError, match=r"expected UTF-8, got .* at byte 0; convert the file"):
        load("text", path=path)


def test_real_shakespeare(real_data):
    splits = load("text", root=real_data("tinyshakespeare", "input.txt"))
    assert splits.info.num_embeddings == 65
    assert len(splits.train[0].x) == 1_003_853
    assert decode(splits.train[0], splits.info.symbols).startswith("First Citizen:")
