"""The network with which the Nash-MTL and FAMO papers predict eleven properties of the molecules of QM9."""

import torch.nn.functional as F
from torch import Tensor, nn

from mtl.errors import UserError


class Network(nn.Module):
    """Messages between atoms, three times, then a summary of each molecule.

    The atoms x (atoms, inputs) become states h = ReLU(W x). In each of the three rounds, every atom gets the mean of
    A(e) h over its neighbours, where the matrix A(e) is computed from the features e of the edge by a network with one
    hidden layer, plus a linear function of its own state. A GRU takes the ReLU of this and gives the new state. The
    weights are the same in all rounds. Set2Set then summarises the atoms of each molecule in three steps, and a linear
    layer with ReLU gives the features.

    Needs PyTorch Geometric, whose layers NNConv and Set2Set it uses.

    Sources: Gilmer et al., "Neural Message Passing for Quantum Chemistry", arXiv 1704.01212; Navon et al., "Multi-Task
    Learning as a Bargaining Game", arXiv 2202.01017, and its published code.

    Args:
        inputs: The number of features of an atom.
        edges: The number of features of an edge.
        num_features: The number of features of a state, and of the output.

    Raises:
        UserError: If PyTorch Geometric isn't installed.
    """

    rounds = 3

    def __init__(self, inputs: int = 11, edges: int = 5, num_features: int = 64) -> None:
        super().__init__()
        try:
            from torch_geometric.nn import NNConv, Set2Set
        except ImportError as error:
            raise UserError(
                f'model.trunk: {error.name} is needed for this network: pip install "mtl-train[qm9]"'
            ) from error
        self.num_features = num_features
        self.embed = nn.Linear(inputs, num_features)
        matrix = nn.Sequential(nn.Linear(edges, 128), nn.ReLU(), nn.Linear(128, num_features**2))
        self.messages = NNConv(num_features, num_features, matrix, aggr="mean")
        self.update = nn.GRU(num_features, num_features)
        self.summary = Set2Set(num_features, processing_steps=3)
        self.output = nn.Linear(2 * num_features, num_features)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor) -> Tensor:
        """Returns the features of the molecules, (N, num_features), from the fields of `mtl.data.collate_graphs`."""
        states = F.relu(self.embed(x))
        hidden = states[None]
        for _ in range(self.rounds):
            messages = F.relu(self.messages(states, edge_index, edge_attr))
            after, hidden = self.update(messages[None], hidden)
            states = after[0]
        return F.relu(self.output(self.summary(states, batch)))
