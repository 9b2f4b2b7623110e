"""QM9: molecules as graphs, with PyTorch Geometric's network."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import command, stopping

import mtl
from mtl.data import Loader, collate_graphs, qm9
from mtl.data.qm9 import PROPERTIES
from mtl.metrics import ScaledMAE

pytest.importorskip("torch_geometric")
SMALL = ["data.batch_size=8", "data.validation=4", "data.test=4", "data.num_workers=0", "model.trunk.num_features=8"]


def made_molecules(count: int = 24) -> list[dict[str, Any]]:
    """Makes chains of atoms in the format of qm9_v3.pt, with targets that are functions of the atoms."""
    draw = torch.Generator().manual_seed(0)
    molecules = []
    for number in range(count):
        atoms = 2 + number % 4
        kinds = torch.randint(5, (atoms,), generator=draw)
        x = torch.zeros(atoms, 11)
        x[torch.arange(atoms), kinds] = 1
        first = torch.arange(atoms - 1)
        pairs = torch.stack([torch.cat([first, first + 1]), torch.cat([first + 1, first])])
        pos = torch.randn(atoms, 3, generator=draw)
        molecules.append({
            "x": x,
            "z": kinds + 1,
            "pos": pos,
            "edge_index": pairs,
            "edge_attr": torch.eye(4)[pairs.sum(0) % 4],
            "y": (kinds.sum() + torch.arange(19.0) + pos.norm())[None],
            "smiles": "C" * atoms,
            "name": f"gdb_{number + 1}",
            "idx": number,
        })  # fmt: skip
    return molecules


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    torch.save(made_molecules(), tmp_path / "raw" / "qm9_v3.pt")
    return tmp_path


def splits_of(folder: Path, **options: Any) -> mtl.data.Splits:
    return qm9(root=str(folder), validation=4, test=4, **options)


def test_each_pair_of_atoms_is_an_edge_with_its_bond_and_its_distance(folder: Path) -> None:
    splits = splits_of(folder)
    assert [len(dataset) for _, dataset in splits.items()] == [16, 4, 4]
    numbers = torch.cat([dataset.numbers for _, dataset in splits.items()])
    assert sorted(numbers.tolist()) == list(range(24))
    sample, molecule = splits.val[1], made_molecules()[int(splits.val.numbers[1])]
    atoms = len(molecule["x"])
    assert torch.equal(sample["x"], molecule["x"])
    pairs = [(a, b) for a in range(atoms) for b in range(atoms) if a != b]
    assert sample["edge_index"].T.tolist() == [list(pair) for pair in pairs]
    bonds = {
        tuple(pair): kind for pair, kind in zip(molecule["edge_index"].T.tolist(), molecule["edge_attr"], strict=True)
    }
    for pair, features in zip(pairs, sample["edge_attr"], strict=True):
        assert torch.equal(features[:4], bonds.get(pair, torch.zeros(4)))
        assert features[4] == pytest.approx(torch.dist(molecule["pos"][pair[0]], molecule["pos"][pair[1]]).item())


def test_targets_are_standardised_and_the_scales_lead_back_to_the_units_of_the_papers(folder: Path) -> None:
    splits = splits_of(folder)
    # Columns of torch_geometric.datasets.QM9: gap (4) and the total energies (7 to 10) aren't used.
    columns = {
        "mu": 0,
        "alpha": 1,
        "homo": 2,
        "lumo": 3,
        "r2": 5,
        "zpve": 6,
        "u0": 12,
        "u": 13,
        "h": 14,
        "g": 15,
        "cv": 11,
    }
    assert list(columns) == list(PROPERTIES)
    y = torch.cat([molecule["y"] for molecule in made_molecules()])
    for name, column in columns.items():
        fact = splits.facts["targets"][name]
        trained = torch.stack([splits.train[i][name] for i in range(16)])
        assert trained.mean().item() == pytest.approx(0, abs=1e-6)
        assert trained.std(correction=0).item() == pytest.approx(1, abs=1e-5)
        back = splits.test[0][name] * fact["std"] + fact["mean"]
        assert back.item() == pytest.approx(y[splits.test.numbers[0], column].item(), rel=1e-5)
        per_unit = 1000 if name in ("homo", "lumo", "zpve", "u0", "u", "h", "g") else 1
        assert splits.facts["scales"][name] == pytest.approx(per_unit * fact["std"])
    metric = ScaledMAE({"mu": 2.5, "cv": 1.0}, "mu")
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]))
    assert metric.compute().item() == 1.5 * 2.5
    with pytest.raises(ValueError, match="no scale for 'x'; there are scales for: mu, cv"):
        ScaledMAE({"mu": 2.5, "cv": 1.0}, "x")


def test_batches_are_those_of_pytorch_geometric(folder: Path) -> None:
    from torch_geometric.data import Batch, Data

    data = splits_of(folder).train
    samples = [data[i] for i in range(5)]
    wanted = Batch.from_data_list([Data(**sample) for sample in samples])
    batch = collate_graphs(samples)
    assert set(batch) == {"x", "edge_index", "edge_attr", "batch", *PROPERTIES}
    assert all(torch.equal(batch[name], wanted[name]) for name in batch)
    with pytest.raises(mtl.UserError, match="a graph has no field 'weights'; its fields are: x, edge_index"):
        collate_graphs(samples, edges=["weights"])
    with pytest.raises(mtl.UserError, match=r"can't be cut into micro-batches: its field 'x' is a tensor .* 5 samples"):
        mtl.batch.cut(batch, 5, size=2)
    pieces = next(iter(Loader(data, batch_size=5, collate=collate_graphs, micro_batch_size=2).batches()))
    assert [len(piece["mu"]) for piece in pieces] == [2, 2, 1]
    assert all(piece["batch"].unique().tolist() == list(range(len(piece["mu"]))) for piece in pieces)
    assert all(piece["edge_index"].max() == len(piece["x"]) - 1 for piece in pieces)


def test_the_processed_file_of_pytorch_geometric_has_the_same_molecules(folder: Path) -> None:
    raw = splits_of(folder)
    assert "data.download=true makes processed/data_v3.pt of it, once" in raw.warnings[0]
    splits_of(folder, download=True)  # PyTorch Geometric needs nothing but what is in raw
    (folder / "raw" / "qm9_v3.pt").unlink()
    again = splits_of(folder)
    assert again.warnings == []
    for (_, one), (_, other) in zip(raw.items(), again.items(), strict=True):
        for index in range(len(one)):
            assert all(torch.equal(one[index][name], other[index][name]) for name in one[index])


class Opened:
    def __reduce__(self) -> Any:
        return open, (str(Path.cwd() / "written"), "w")


def test_files_that_are_missing_damaged_or_programs(folder: Path, here: Path) -> None:
    with pytest.raises(mtl.UserError, match=r"data.validation is 20 and data.test 4, of 24 molecules"):
        qm9(root=str(folder), validation=20, test=4)
    with pytest.raises(mtl.UserError, match=r"QM9: its files can't be read in .*nowhere.*raw/qm9_v3.pt.*data.pyg.org"):
        splits_of(here / "nowhere")
    torch.save([{**each, "x": each["x"][:, :10]} for each in made_molecules()], folder / "raw" / "qm9_v3.pt")
    with pytest.raises(mtl.UserError, match=r"\(10, 3, 2, 4, 19\) features, not \(11, 3, 2, 4, 19\)"):
        splits_of(folder)
    for name in ("raw/qm9_v3.pt", "processed/data_v3.pt"):
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save(Opened(), folder / name)
        with pytest.raises(mtl.UserError, match="QM9: its files can't be read"):
            splits_of(folder)
        assert not (here / "written").exists()


def test_without_the_extra_one_sentence_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtl.problems.qm9 import Network

    for name in [name for name in sys.modules if name.split(".")[0] == "torch_geometric"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    with pytest.raises(mtl.UserError, match=r'model.trunk: .* is needed .*pip install "mtl-train\[qm9\]"'):
        Network()
    (folder / "processed").mkdir()
    (folder / "processed" / "data_v3.pt").write_bytes(b"")
    with pytest.raises(mtl.UserError, match=r'needed for processed/data_v3.pt: pip install "mtl-train\[qm9\]"'):
        splits_of(folder)


def test_the_network_is_that_of_the_published_code() -> None:
    from mtl.problems.qm9 import Network

    def messages_of(network: Network, x: torch.Tensor, pairs: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The rounds for one molecule, written out with one matrix for each edge, and Set2Set as in its paper."""
        states = torch.relu(network.embed(x))
        matrices = network.messages.nn(features).view(-1, 8, 8)
        for _ in range(3):
            sums, counts = torch.zeros_like(states), torch.zeros(len(x), 1)
            for (a, b), matrix in zip(pairs.T.tolist(), matrices, strict=True):
                sums[b] = sums[b] + states[a] @ matrix
                counts[b] += 1
            messages = sums / counts.clamp(min=1) + network.messages.lin(states) + network.messages.bias
            states = network.update(torch.relu(messages)[None], states[None])[0][0]
        query, memory = torch.zeros(1, 16), None
        for _ in range(3):
            out, memory = network.summary.lstm(query[None], memory)
            weights = torch.softmax(states @ out[0, 0], 0)
            query = torch.cat([out[0], (weights[:, None] * states).sum(0)[None]], 1)
        return torch.relu(network.output(query))

    torch.manual_seed(0)
    network = Network(num_features=8)
    samples = []
    for atoms in (3, 4):
        pairs = torch.tensor([(a, b) for a in range(atoms) for b in range(atoms) if a != b]).T
        samples.append({"x": torch.randn(atoms, 11), "edge_index": pairs, "edge_attr": torch.rand(pairs.shape[1], 5)})
    batch = collate_graphs(samples)
    features = network(batch["x"], batch["edge_index"], batch["edge_attr"], batch["batch"])
    alone = [messages_of(network, s["x"], s["edge_index"], s["edge_attr"]) for s in samples]
    torch.testing.assert_close(features, torch.cat(alone))


def test_micro_batches_and_all_sources_of_gradients_move_alike(folder: Path) -> None:
    from mtl.problems.qm9 import Network

    data = splits_of(folder).train

    def moved(source: str, micro: int | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        names = ["mu", "zpve", "cv"]
        tasks = [mtl.Task(name, head=mtl.heads.Linear(8, 1), loss=torch.nn.MSELoss(), target=name) for name in names]
        model = mtl.MultiTaskModel(Network(num_features=8), tasks, inputs=["x", "edge_index", "edge_attr", "batch"])
        balancer, gradients = mtl.balancers.UPGrad(), mtl.Gradients(source=source)
        step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), 0.1), balancer=balancer, gradients=gradients)
        for batch in Loader(data, batch_size=8, collate=collate_graphs, micro_batch_size=micro).batches():
            step(batch)
        return model.state_dict()

    wanted = moved("rows", None)
    for source, micro in (("rows", 3), ("layerwise", None), ("auto", 3)):
        torch.testing.assert_close(moved(source, micro), wanted, rtol=1e-4, atol=1e-5)


def test_the_published_set_up_takes_two_steps(here: Path) -> None:
    write(here)
    ended = command("train", "experiment=qm9_famo", *SMALL, "trainer.max_epochs=1", "logger=[]")
    assert ended.code == 0, ended.err
    assert ended.metrics["steps"] == 2
    assert list(ended.metrics["test"]) == list(PROPERTIES)
    config = yaml.safe_load((ended.run / "config.yaml").read_text())
    assert config["balancer"]["_target_"] == "mtl.balancers.FAMO"
    assert config["balancer"]["weight_decay"] == 1e-3
    assert (config["scheduler"]["factor"], config["scheduler"]["patience"]) == (0.7, 5)
    assert config["data"]["collate"]["_target_"] == "mtl.data.collate_graphs"


@pytest.mark.slow
def test_stopped_runs_go_on_are_evaluated_and_drawn(here: Path) -> None:
    write(here)
    setting = ["experiment=qm9_famo", *SMALL, "trainer.max_epochs=2", "only=[mu,cv]", "trainer.micro_batch_size=3"]
    whole = command("train", *setting)
    stopped = command("train", *setting, *stopping(3))
    assert (whole.code, stopped.code) == (0, 143), whole.err + stopped.err
    again = command("train", *setting, f"resume={stopped.run}")
    assert again.code == 0, again.err
    assert stopped.metrics["test"] == whole.metrics["test"]
    evaluated = command("evaluate", f"run={whole.run}")
    assert evaluated.code == 0, evaluated.err
    assert type(mtl.load(whole.run).trunk).__name__ == "Network"
    drawn = command("graph", "experiment=qm9_famo", *SMALL, "only=[mu,cv]")
    assert drawn.code == 0, drawn.err
    assert "batch    8 samples, the first of epoch 1" in drawn.out


def write(here: Path) -> None:
    (here / "data" / "qm9" / "raw").mkdir(parents=True)
    torch.save(made_molecules(), here / "data" / "qm9" / "raw" / "qm9_v3.pt")
