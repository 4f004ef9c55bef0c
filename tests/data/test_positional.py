import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.transforms import AddRandomWalkPE
from torch_geometric.utils import get_laplacian, grid, to_dense_adj, to_undirected

from nsm_graph.data import AddPositionalEncoding

pytest.importorskip("scipy", reason="Laplacian encodings need SciPy")


def path(num_nodes: int) -> Data:
    nodes = torch.arange(num_nodes)
    edge_index = to_undirected(torch.stack([nodes[:-1], nodes[1:]]), num_nodes=num_nodes)
    return Data(x=torch.zeros(num_nodes, 1), edge_index=edge_index)


@pytest.mark.parametrize("kind", ["random_walk", "laplacian"])
@pytest.mark.parametrize("num_nodes", [1, 2, 5, 6, 7, 8, 99, 100, 101])
@pytest.mark.parametrize("channels", [1, 6, 120])
def test_any_number_of_nodes(kind, num_nodes, channels):
    pe = AddPositionalEncoding(kind, channels)(path(num_nodes)).pe
    assert pe.shape == (num_nodes, channels) and pe.dtype == torch.float32
    assert pe.isfinite().all()
    if kind == "laplacian":
        assert (pe[:, num_nodes - 1 :] == 0).all()


@pytest.mark.parametrize("kind", ["random_walk", "laplacian"])
def test_without_edges_or_directed(kind):
    transform = AddPositionalEncoding(kind, 3)
    isolated = Data(x=torch.zeros(4, 1), edge_index=torch.empty(2, 0, dtype=torch.long))
    one_way = Data(x=torch.zeros(4, 1), edge_index=torch.tensor([[0, 1, 2], [1, 2, 3]]))
    for data in (isolated, one_way):
        pe = transform(data).pe
        assert pe.shape == (4, 3) and pe.isfinite().all()


def test_random_walk_is_pygs():
    ours = AddPositionalEncoding("random_walk", 4)(path(6)).pe
    assert torch.equal(ours, AddRandomWalkPE(4, attr_name="pe")(path(6)).pe)


@pytest.mark.parametrize("data", [path(12), Data(edge_index=grid(11, 13)[0], num_nodes=143)])
def test_laplacian_gives_eigenvectors(data):
    pe = AddPositionalEncoding("laplacian", 3)(data).pe
    edge_index, weight = get_laplacian(data.edge_index, normalization="sym")
    laplacian = to_dense_adj(edge_index, edge_attr=weight)[0]
    values = (pe * (laplacian @ pe)).sum(0)
    assert torch.allclose(laplacian @ pe, values * pe, atol=1e-4)
    assert torch.allclose(values, torch.linalg.eigvalsh(laplacian)[1:4], atol=1e-4)


@pytest.mark.parametrize("num_nodes", [12, 150])
def test_deterministic_and_leaves_the_generator_alone(num_nodes):
    torch.manual_seed(1)
    expected = torch.rand(3)
    transform = AddPositionalEncoding("laplacian", 4)
    first = transform(path(num_nodes)).pe
    torch.manual_seed(1)
    assert torch.equal(transform(path(num_nodes)).pe, first)
    assert torch.equal(torch.rand(3), expected)


def test_bad_options():
    with pytest.raises(ValueError, match="unknown pe 'rw'; choose one of random_walk, laplacian"):
        AddPositionalEncoding("rw", 4)
    with pytest.raises(ValueError, match="pe_channels is 0; it must be at least 1"):
        AddPositionalEncoding("laplacian", 0)
    assert repr(AddPositionalEncoding("laplacian", 2)) == "AddPositionalEncoding('laplacian', 2)"
