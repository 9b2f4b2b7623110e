"""Trains the same MMoE on a made table of clicks and purchases by mtl and by the trainer of Torch-RecHub, in one run.

    pip install torch-rechub scipy
    python scripts/bench_recommender.py [--rows 1000000] [--seeds 0 1 2] [--epochs 1] [--whole-batches]

The table has the kinds of columns of a log of advertisements: 15 columns of ids, 8 of numbers, and two labels. Both
networks have an embedding of 16 numbers for each id, 8 experts of 32 and 16 units, gates, and towers of 32 and 16
units, all with batch norm. They begin with the same parameters, and the script checks that they then make the same
predictions. Both are trained on one thread with Adam, the learning rate and weight decay that are Torch-RecHub's
defaults, and batches of 1024 rows, as in its example for Ali-CCP. Data and trainer of Torch-RecHub are used as its
README does: `DataGenerator` and `MTLTrainer`. With `--whole-batches`, a further case passes whole batches to it, which
are indexed as those of mtl are, so that loading and training can be told apart. The trainer of mtl writes its CSV and
TensorBoard logs and its checkpoints. Times are CPU times of the process, which other processes change less than the
time of a clock.

An epoch is the training on 80 % of the rows and the validation on 10 % of them. The AUC is that of the other 10 %,
computed by scikit-learn from the predictions of each.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from scipy.stats import t
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models.multi_task import MMOE
from torch_rechub.trainers import MTLTrainer
from torch_rechub.utils.data import DataGenerator
from torchmetrics.classification import BinaryAUROC

import mtl
from mtl.data import Fields, Loader
from mtl.data.made_ctr import zipf
from mtl.loggers import CsvLogger, Loggers, TensorBoardLogger
from mtl.training.options import Checkpoints, Logs
from mtl.training.trainer import Trainer
from mtl.trunks.table import Columns

SIZES = (50_000, 20_000, 10_000, 5_000, 5_000, 2_000, 1_000, 500, 100, 24, 12, 8, 4, 3, 2)
IDS = {f"id{number}": size for number, size in enumerate(SIZES)}
NUMBERS = tuple(f"number{number}" for number in range(8))
TASKS = ("click", "purchase")
SPLITS = {"train": 0.8, "val": 0.1, "test": 0.1}
WIDTH, EXPERTS, UNITS = 16, 8, [32, 16]
BATCH = 1024
ADAM = {"lr": 1e-3, "weight_decay": 1e-5}
Rows = dict[str, Tensor]


@dataclass
class Outcome:
    """Seconds of an epoch's training and validation, and the AUC of each task on the test split."""

    training: float
    validation: float
    auc: list[float]


def made_rows(count: int) -> dict[str, Rows]:
    """Draws the rows of each split: ids by Zipf's law, normal numbers, and labels whose log-odds have interactions."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows: Rows = {}
    hidden = torch.zeros(count, 4)
    odds = {"click": torch.full((count,), -1.5), "purchase": torch.full((count,), -3.0)}
    for name, size in IDS.items():
        rows[name] = zipf(size, count, generator)
        hidden += 0.4 * normal(size + 1, 4)[rows[name]]
        for task in TASKS:
            odds[task] += 0.3 * normal(size + 1)[rows[name]]
    for name in NUMBERS:
        rows[name] = normal(count)
        hidden += 0.3 * rows[name][:, None] * normal(4)
    odds["click"] += hidden[:, 0] * hidden[:, 1]
    odds["purchase"] += hidden[:, 0] * hidden[:, 1] / 2 + hidden[:, 2].tanh() + 0.5 * hidden[:, 3]
    for task in TASKS:
        rows[task] = (torch.rand(count, generator=generator) < odds[task].sigmoid()).float()
    ends = [round(count * share) for share in SPLITS.values()]
    parts = {name: values.split([ends[0], ends[1], count - ends[0] - ends[1]]) for name, values in rows.items()}
    return {split: {name: each[i] for name, each in parts.items()} for i, split in enumerate(SPLITS)}


def layers(width: int, units: list[int]) -> list[nn.Module]:
    """Returns the layers of an expert, a tower or a gate as Torch-RecHub has them."""
    made: list[nn.Module] = []
    for out in units:
        made += [nn.Linear(width, out), nn.BatchNorm1d(out), nn.ReLU(), nn.Dropout(0)]
        width = out
    return made


def their_network() -> MMOE:
    """Returns Torch-RecHub's network."""
    features = [SparseFeature(name, size + 1, embed_dim=WIDTH) for name, size in IDS.items()]
    return MMOE(
        features + [DenseFeature(name) for name in NUMBERS],
        ["classification"] * len(TASKS),
        EXPERTS,
        expert_params={"dims": UNITS},
        tower_params_list=[{"dims": UNITS} for _ in TASKS],
    )


def our_network(theirs: MMOE) -> tuple[mtl.MultiTaskModel, list[mtl.Task]]:
    """Returns the network of mtl, with the parameters of Torch-RecHub's, and its tasks."""
    columns: dict[str, dict[str, Any]] = {name: {"kind": "number", "mean": 0.0, "std": 1.0} for name in NUMBERS}
    columns |= {name: {"kind": "category", "size": size} for name, size in IDS.items()}

    def trunk() -> nn.Module:
        first = Columns(columns, [*IDS, *NUMBERS], dimensions=WIDTH)
        return nn.Sequential(first, nn.Sequential(*layers(first.width, UNITS)))

    tasks = [
        mtl.Task(
            name,
            head=nn.Sequential(*layers(UNITS[-1], UNITS), mtl.heads.Linear(UNITS[-1], 1)),
            loss=mtl.losses.BinaryCrossEntropy(),
            target=name,
            missing=False,
            metrics={"auc": BinaryAUROC},
            weight=1 / len(TASKS),  # the loss of MTLTrainer is the mean over the tasks
        )
        for name in TASKS
    ]
    model: Any = mtl.architectures.MMoE(trunk, tasks, inputs=[*IDS, *NUMBERS], experts=EXPERTS)
    first = model.trunk.stem[0]
    for branch in model.branches.values():  # the gates of Torch-RecHub have a batch norm
        branch.gate = nn.Sequential(nn.Linear(first.width, EXPERTS), nn.BatchNorm1d(EXPERTS), nn.Softmax(1))
    with torch.no_grad():
        for embedding, name in zip(first.embeddings, IDS, strict=True):
            embedding.weight.copy_(theirs.embedding.embed_dict[name].weight)
        parts = [*zip(model.trunk.shared[0], theirs.experts, strict=True)]
        parts += [*zip([branch.gate for branch in model.branches.values()], theirs.gates, strict=True)]
        parts += [*zip(model.heads.values(), theirs.towers, strict=True)]
        for ours, its in parts:
            for mine, parameter in zip(ours.parameters(), its.parameters(), strict=True):
                mine.copy_(parameter if mine.shape == parameter.shape else in_our_order(parameter))
    return model, tasks


def in_our_order(weight: Tensor) -> Tensor:
    """Returns a weight for the columns of `Columns`: numbers, whether they are missing, and then the embeddings."""
    embedded, numbers = weight.split([WIDTH * len(IDS), len(NUMBERS)], 1)
    return torch.cat([numbers, torch.zeros_like(numbers), embedded], 1)


def timed(owner: Any, method: str) -> list[float]:
    """Replaces the method with one that also adds the seconds of each call to the returned list."""
    seconds: list[float] = []
    original: Callable[..., Any] = getattr(owner, method)

    def measured(*arguments: Any, **named: Any) -> Any:
        start = time.process_time()
        try:
            return original(*arguments, **named)
        finally:
            seconds.append(time.process_time() - start)

    setattr(owner, method, measured)
    return seconds


class WholeBatches:
    """Whole batches in the form of Torch-RecHub's, indexed from tensors, in another order each time."""

    def __init__(self, rows: Rows) -> None:
        self.inputs = {name: rows[name] for name in (*IDS, *NUMBERS)}
        self.labels = torch.stack([rows[name] for name in TASKS], 1)

    def __len__(self) -> int:
        return -(-len(self.labels) // BATCH)

    def __iter__(self) -> Iterator[tuple[Rows, Tensor]]:
        for indices in torch.randperm(len(self.labels)).split(BATCH):
            yield {name: values[indices] for name, values in self.inputs.items()}, self.labels[indices]


def train_theirs(network: MMOE, rows: dict[str, Rows], epochs: int, *, whole: bool) -> Outcome:
    """Trains the network by Torch-RecHub."""
    arrays = {split: {name: values.numpy() for name, values in part.items()} for split, part in rows.items()}
    inputs = {split: {name: part[name] for name in (*IDS, *NUMBERS)} for split, part in arrays.items()}
    labels = {split: np.stack([part[name] for name in TASKS], 1) for split, part in arrays.items()}
    train, val, _ = DataGenerator(inputs["train"], labels["train"]).generate_dataloader(
        inputs["val"], labels["val"], inputs["test"], labels["test"], batch_size=BATCH
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = MTLTrainer(
            network, ["classification"] * len(TASKS), optimizer_params=ADAM, n_epoch=epochs, model_path=folder
        )
        validation, fit = timed(trainer, "evaluate"), timed(trainer, "fit")
        if whole:
            trainer.fit(WholeBatches(rows["train"]), WholeBatches(rows["val"]))
        else:
            trainer.fit(train, val)
    return outcome(network, rows["test"], fit, validation, epochs)


def train_ours(network: MMOE, rows: dict[str, Rows], epochs: int, seed: int) -> Outcome:
    """Trains mtl's network with the same parameters by mtl."""
    model, tasks = our_network(network)
    batch = Fields(rows["train"]).take(torch.arange(1000))
    predictions = torch.stack([model(batch)[task].sigmoid() for task in TASKS], 1)
    torch.testing.assert_close(predictions, network(batch))  # batch norm by the statistics of the batch
    train, val = (Fields(rows[split]) for split in ("train", "val"))
    with tempfile.TemporaryDirectory() as folder:
        loggers = Loggers([kind(Path(folder), list(TASKS)) for kind in (CsvLogger, TensorBoardLogger)])
        trainer = Trainer(
            mtl.Step(model, tasks, torch.optim.Adam(model.parameters(), **ADAM)),
            Loader(train, batch_size=BATCH, shuffle=True, seed=seed),
            Loader(val, batch_size=BATCH),
            max_epochs=epochs,
            checkpoints=Checkpoints(Path(folder)),
            logs=Logs(loggers),
        )
        validation, fit = timed(trainer.selection, "validate"), timed(trainer, "fit")
        trainer.fit()
        loggers.close()
    return outcome(model, rows["test"], fit, validation, epochs)


def outcome(network: nn.Module, test: Rows, fit: list[float], validation: list[float], epochs: int) -> Outcome:
    """Returns the seconds of an epoch, and the AUC of the network's predictions for the test split."""
    network.eval()
    data, auc = Fields(test), []
    with torch.no_grad():
        made = [network(data.take(indices)) for indices in torch.arange(len(data)).split(10_000)]
    for number, task in enumerate(TASKS):
        scores = torch.cat([each[task] if isinstance(each, dict) else each[:, number] for each in made])
        auc.append(float(roc_auc_score(test[task].numpy(), scores.numpy())))
    return Outcome((sum(fit) - sum(validation)) / epochs, sum(validation) / epochs, auc)


def interval(values: list[float]) -> str:
    """Returns the mean with its 95 % confidence interval, by Student's t."""
    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{mean(values):.4f} ± {half:.4f}"


def main() -> None:
    """Trains all cases for each seed in turn, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--whole-batches", action="store_true", help="also train Torch-RecHub on whole batches")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = made_rows(options.rows)
    cases: dict[str, Callable[[int], Outcome]] = {
        "Torch-RecHub": lambda seed: train_theirs(their_network(), rows, options.epochs, whole=False),
        "mtl": lambda seed: train_ours(their_network(), rows, options.epochs, seed),
    }
    if options.whole_batches:
        cases["Torch-RecHub, whole batches"] = lambda seed: train_theirs(
            their_network(), rows, options.epochs, whole=True
        )
    outcomes: dict[str, list[Outcome]] = {name: [] for name in cases}
    for seed in options.seeds:
        for name, run in cases.items():
            torch.manual_seed(seed)  # the initial parameters are the same in all cases
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                outcomes[name].append(run(seed))
            print(f"seed {seed}, {name}: {outcomes[name][-1]}", file=sys.stderr, flush=True)
    print("| trainer | CPU s an epoch | of it training | validation | over Torch-RecHub | AUC click | AUC purchase |")
    print("|---|---|---|---|---|---|---|")
    first = outcomes["Torch-RecHub"]
    for name, each in outcomes.items():
        training, validation = mean(one.training for one in each), mean(one.validation for one in each)
        ratio = (training + validation) / mean(one.training + one.validation for one in first)
        aucs = " | ".join(interval([one.auc[number] for one in each]) for number in range(len(TASKS)))
        times = f"{training + validation:.1f} | {training:.1f} | {validation:.1f} | {ratio:.3f}"
        print(f"| {name} | {times} | {aucs} |")


if __name__ == "__main__":
    main()
