"""A memory for an existing PyG model: node classification on Zachary's karate club.

Four labelled members, two graph convolutions, and one MemoryConv between them, so that every member
can reach every other through four state nodes. The data come with PyG; nothing is downloaded.
"""

import torch
from torch_geometric.datasets import KarateClub
from torch_geometric.nn import GCNConv

from nsm_graph.nn import MemoryConv


class Net(torch.nn.Module):
    def __init__(self, in_channels: int, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = GCNConv(in_channels, channels)
        self.memory = MemoryConv(channels, num_states=4)  # the one line
        self.conv2 = GCNConv(channels, out_channels)

    def forward(self, x, edge_index):
        x = self.conv1(x, edge_index).relu()
        x, _ = self.memory(x, edge_index)
        return self.conv2(x, edge_index)


def main(num_epochs: int = 100) -> float:
    torch.manual_seed(0)
    data = KarateClub()[0]
    net = Net(data.num_features, 16, int(data.y.max()) + 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=5e-4)
    for epoch in range(num_epochs):
        out = net(data.x, data.edge_index)
        loss = torch.nn.functional.cross_entropy(out[data.train_mask], data.y[data.train_mask])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (epoch + 1) % 20 == 0:
            print(f"epoch {epoch + 1:3d}  loss {loss.item():.3f}")
    unseen = ~data.train_mask
    accuracy = (out.argmax(1) == data.y)[unseen].float().mean().item()
    print(f"accuracy on the {int(unseen.sum())} unlabelled members: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()
