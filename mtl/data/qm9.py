"""QM9, from the files of PyTorch Geometric: molecules with properties that quantum chemistry computed."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mtl.data.fields import Splits
from mtl.data.public import files_of
from mtl.errors import UserError

PAGE = "https://data.pyg.org/datasets/qm9_v3.zip"
RAW, PROCESSED = "raw/qm9_v3.pt", "processed/data_v3.pt"
FILES = f"{RAW}, or {PROCESSED}, which torch_geometric.datasets.QM9 makes of it"
TENSORS = ("x", "pos", "edge_index", "edge_attr", "y")
PROPERTIES = {  # by name: the column of the targets, and the factor from their unit to that of the papers
    "mu": (0, 1.0),
    "alpha": (1, 1.0),
    "homo": (2, 1000.0),  # eV to meV, as for all energies
    "lumo": (3, 1000.0),
    "r2": (5, 1.0),
    "zpve": (6, 1000.0),
    "u0": (12, 1000.0),
    "u": (13, 1000.0),
    "h": (14, 1000.0),
    "g": (15, 1000.0),
    "cv": (11, 1.0),
}


@dataclass
class Stored:
    """Molecules, with all atoms and all bonds one after the other.

    Attributes:
        x: The features of the atoms, (atoms, 11).
        pos: Their positions, (atoms, 3).
        edge_index: The two atoms of each bond, by their numbers in the molecule, (2, bonds); in both directions.
        edge_attr: The kind of each bond, one-hot, (bonds, 4).
        y: The targets of the molecules, (molecules, 19).
        atoms, bonds: Where the atoms and bonds of each molecule begin, and of the last one end, (molecules + 1,).
    """

    x: Tensor
    pos: Tensor
    edge_index: Tensor
    edge_attr: Tensor
    y: Tensor
    atoms: Tensor
    bonds: Tensor

    def __post_init__(self) -> None:
        widths = self.x.shape[1], self.pos.shape[1], len(self.edge_index), self.edge_attr.shape[1], self.y.shape[1]
        if widths != (11, 3, 2, 4, 19):
            raise ValueError(f"x, pos, edge_index, edge_attr and y have {widths} features, not (11, 3, 2, 4, 19)")


class Molecules(Dataset[dict[str, Tensor]]):
    """Molecules as complete graphs: each pair of atoms is an edge, with the kind of the bond and the distance.

    Args:
        stored: All molecules.
        numbers: The numbers of the molecules that belong to this split.
        mean, std: Each property minus its mean is divided by the std, both of shape (properties,).
    """

    def __init__(self, stored: Stored, numbers: Tensor, mean: Tensor, std: Tensor) -> None:
        self.stored = stored
        self.numbers = numbers
        self.values = ((properties_of(stored.y) - mean) / std).float()

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number = int(self.numbers[index])
        atoms, bonds = (slice(*each[number : number + 2].tolist()) for each in (self.stored.atoms, self.stored.bonds))
        pos, kinds = self.stored.pos[atoms], self.stored.edge_attr[bonds]
        known = kinds.new_zeros(len(pos), len(pos), kinds.shape[1])
        known[tuple(self.stored.edge_index[:, bonds])] = kinds
        pairs = (~torch.eye(len(pos), dtype=torch.bool)).nonzero().T
        distance = (pos[pairs[0]] - pos[pairs[1]]).norm(dim=1, keepdim=True)
        return {
            "x": self.stored.x[atoms],
            "edge_index": pairs,
            "edge_attr": torch.cat([known[pairs[0], pairs[1]], distance], 1),
            **dict(zip(PROPERTIES, self.values[number], strict=True)),
        }


def properties_of(targets: Tensor) -> Tensor:
    """Returns the properties, (N, 11), in float64, of all targets, (N, 19)."""
    return targets[:, [column for column, _ in PROPERTIES.values()]].double()


def qm9(
    *,
    root: str = "data/qm9",
    download: bool = False,
    validation: int = 10_000,
    test: int = 10_000,
    seed: int = 0,
) -> Splits:
    """Returns the molecules of QM9 as graphs, with 11 properties, from the files of PyTorch Geometric.

    A sample has the atoms `x` (atoms, 11) and all pairs of atoms: `edge_index` (2, pairs) and `edge_attr` (pairs, 5),
    which are the kind of the bond, one-hot, and the distance. `collate_graphs` makes batches of them. Each property is
    a field (N,), scaled to mean 0 and standard deviation 1 in the training split: mu, alpha, homo, lumo, r2, zpve, u0,
    u, h, g and cv, where u0, u, h and g are energies of atomization.

    The fact `targets` has the means and standard deviations, the energies in eV. The fact `scales` has the factor from
    each field to the unit of the papers, with the energies in meV, for `mtl.metrics.ScaledMAE`.

    Args:
        root: The folder of `torch_geometric.datasets.QM9`. Its file `processed/data_v3.pt` is read or, if it doesn't
            exist, `raw/qm9_v3.pt`, which takes minutes.
        download: Whether to let PyTorch Geometric make the first file if it doesn't exist, and download what it needs.
        validation, test: The numbers of molecules in these splits; all others are for training.
        seed: The seed of the random split.

    Raises:
        UserError: If files are missing or damaged, if no molecule remains for training, or if PyTorch Geometric isn't
            installed, except where only the second file is read.
    """
    folder = Path(root)
    with files_of("QM9", folder, FILES, PAGE, download=download):
        stored = _read(folder, download)
    count = len(stored.y)
    rest = count - validation - test
    if min(validation, test) < 1 or rest < 1:
        raise UserError(
            f"data.validation is {validation} and data.test {test}, of {count} molecules; both must be at least 1, and "
            "leave molecules for training"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = [part.sort().values for part in torch.split(order, [rest, validation, test])]
    values = properties_of(stored.y)[parts[0]].numpy()
    mean, std = values.mean(0), values.std(0)
    std[std == 0] = 1.0  # a property that is constant is only shifted
    each = list(zip(PROPERTIES, mean.tolist(), std.tolist(), strict=True))
    train, val, of_test = (Molecules(stored, part, torch.from_numpy(mean), torch.from_numpy(std)) for part in parts)
    slow = f"data.root: {folder / RAW} takes minutes to read; data.download=true makes {PROCESSED} of it, once"
    return Splits(
        train,
        val,
        of_test,
        name=f"QM9 in {root}, split at random (data.seed={seed})",
        facts={
            "targets": {name: {"kind": "number", "mean": m, "std": s} for name, m, s in each},
            "scales": {name: s * PROPERTIES[name][1] for name, _, s in each},
        },
        warnings=[] if (folder / PROCESSED).is_file() else [slow],
    )


def _read(folder: Path, download: bool) -> Stored:
    """Reads the molecules; runs no code from the files, as `torch_geometric.datasets.QM9` might do."""
    processed, raw = folder / PROCESSED, folder / RAW
    if download and not processed.is_file():
        _import("datasets").QM9(str(folder))
    if processed.is_file():
        _import("data")  # declares its classes as safe for torch.load
        values, slices, *_ = torch.load(processed, weights_only=True)
        return Stored(**{name: values[name] for name in TENSORS}, atoms=slices["x"], bonds=slices["edge_attr"])
    molecules = torch.load(raw, weights_only=True)
    joined = {name: torch.cat([m[name] for m in molecules], int(name == "edge_index")) for name in TENSORS}
    starts = [torch.tensor([0, *(len(m[name]) for m in molecules)]).cumsum(0) for name in ("x", "edge_attr")]
    return Stored(**joined, atoms=starts[0], bonds=starts[1])


def _import(name: str) -> Any:
    try:
        return import_module(f"torch_geometric.{name}")
    except ImportError as error:
        raise UserError(f'data: {error.name} is needed for {PROCESSED}: pip install "mtl-train[qm9]"') from error
