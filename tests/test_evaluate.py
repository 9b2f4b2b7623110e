"""Evaluation on other data: figures against numpy, with the encoding of the training; and refusals."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from conftest import ROOT, Ended, command
from PIL import Image

import mtl
from mtl.config.data import LOADER_KEYS
from mtl.config.other_data import with_other_data
from mtl.config.targets import make
from mtl.data import image_table, table
from mtl.training.validation import Validation

PEOPLE = """
# @package _global_
defaults:
  - /objective@tasks.smoker: classification
  - /objective@tasks.income: regression
  - _self_
  - override /data: table
  - override /model: hard_sharing
  - override /model/trunk: table
model:
  inputs: ${data.inputs}
tasks:
  smoker: {target: smoker, num_outputs: 2}
  income: {target: income}
data: {path: people.csv, inputs: [age, city], targets: [income, smoker], standardize_targets: [income], batch_size: 16}
trainer: {max_epochs: 2, monitor: {smoker/accuracy: max}}
"""


def people(count: int, seed: int, **columns: Any) -> pandas.DataFrame:
    rng = np.random.default_rng(seed)
    age = rng.integers(18, 80, count).astype(float)
    frame = pandas.DataFrame(
        {
            "age": np.where(rng.random(count) < 0.1, np.nan, age),
            "city": rng.choice(["Bern", "Basel", "Chur"], count),
            "income": np.where(rng.random(count) < 0.2, np.nan, 900 * age + 5000 * seed),
            "smoker": np.where(rng.random(count) < 0.2, None, np.where(age > 45, "yes", "no")),
        }
    )
    return frame.assign(**columns)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Provides a list that gets the figures of each evaluation."""
    seen: list[Any] = []
    original = Validation.__call__
    monkeypatch.setattr(Validation, "__call__", lambda self, loader: (seen.append(original(self, loader)), seen[-1])[1])
    return seen


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("people")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        people(200, 0).to_csv("people.csv", index=False)
        Path("mine/task").mkdir(parents=True)
        Path("mine/task/people.yaml").write_text(PEOPLE)
        ended = command("train", "--config-dir", "mine", "task=people")
        assert ended.code == 0, ended.err
        assert ended.run is not None
        ended.run = ended.run.resolve()
    return ended


@pytest.fixture
def run(trained_run: Ended, monkeypatch: pytest.MonkeyPatch) -> Ended:
    """Provides the trained run; its folder is the current one."""
    assert trained_run.run is not None
    monkeypatch.chdir(trained_run.run.parents[2])
    return trained_run


def by_hand(run: Path, frame: pandas.DataFrame) -> dict[str, dict[str, float]]:
    """Returns the figures on raw rows, in numpy, with mean and deviation of the training rows by pandas."""
    drawn = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:160].sort().values
    income = pandas.read_csv("people.csv").iloc[drawn.numpy()]["income"]
    rows = frame[["age", "city"]].astype(object).where(frame[["age", "city"]].notna(), None)
    with torch.no_grad():
        predicted = mtl.load(run)({name: rows[name].tolist() for name in rows})
    logits, numbers = (predicted[name].double().numpy() for name in ("smoker", "income"))
    labelled = frame["smoker"].notna().to_numpy()
    truth = (frame["smoker"] == "yes").astype(int).to_numpy()
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wanted = ((frame["income"] - income.mean()) / income.std(ddof=0)).to_numpy()
    measured = ~np.isnan(wanted)
    difference = (numbers.reshape(-1) - wanted)[measured]
    return {
        "smoker": {
            "accuracy": (logits.argmax(1) == truth)[labelled].mean(),
            "loss": -np.log(shares[np.arange(len(truth)), truth])[labelled].mean(),
        },
        "income": {"mae": np.abs(difference).mean(), "loss": (difference**2).mean()},
    }


def assert_close(mine: Any, other: Any) -> None:
    for task, named in other.items():
        assert mine[task] == pytest.approx(named, rel=1e-5), task


@pytest.mark.parametrize("split", ["test", "val", "train"])
def test_all_rows_of_another_table_are_measured_with_the_trainings_encoding(
    run: Ended, figures: list[Any], split: str
) -> None:
    """Other means, other deviations, and cities of which one is unknown and some are missing."""
    frame = people(50, 3, city=["Zug", "Chur"] * 25)
    frame.to_csv("new.csv", index=False)
    ended = command("evaluate", f"run={run.run}", "data.path=new.csv", f"split={split}", "data.eval_batch_size=7")
    assert ended.code == 0, ended.err
    assert_close(figures[-1], by_hand(run.run, frame))
    assert f"data     new.csv, all of its rows: 50 {split}; fields: age, city, income, smoker" in ended.out
    assert "these are not the run's own data; vocabularies, means and standard deviations are those of the" in ended.out


def test_the_runs_own_data_give_the_runs_own_figures(run: Ended, figures: list[Any]) -> None:
    """Also where how they are loaded is changed, or their file is named in another way."""
    for more in (
        [],
        ["data.eval_batch_size=3"],
        ["data.path=people.csv"],
        [f"data.path={Path('people.csv').resolve()}"],
    ):
        ended = command("evaluate", f"run={run.run}", *more)
        assert ended.code == 0, ended.err
        if more[:1] == ["data.eval_batch_size=3"]:
            assert_close(figures[-1], run.metrics["test"])
        else:
            assert figures[-1] == run.metrics["test"]
        assert "people.csv, split at random (data.seed=0): 20 test" in ended.out
        assert "these are not the run's own" not in ended.out


def test_a_group_of_data_has_splits_of_its_own(run: Ended, figures: list[Any]) -> None:
    Path("own/data").mkdir(parents=True, exist_ok=True)
    for name, seed in (("a", 5), ("b", 6)):
        people(30, seed).to_csv(f"{name}.csv", index=False)
    group = Path("own/data/others.yaml")
    group.write_text(
        "_target_: mtl.data.table\npath: {train: a.csv, test: b.csv}\ninputs: [age, city]\n"
        "targets: [income, smoker]\nstandardize_targets: [income]\nbatch_size: 8\neval_batch_size: 8\nnum_workers: 0\n"
    )
    given = ["--config-dir", "own", f"run={run.run}", "data=others"]
    ended = command("evaluate", *given)
    assert ended.code == 0, ended.err
    assert_close(figures[-1], by_hand(run.run, pandas.read_csv("b.csv")))
    ended = command("evaluate", *given, "data.path=a.csv")
    assert ended.code == 0, ended.err
    assert_close(figures[-1], by_hand(run.run, pandas.read_csv("a.csv")))
    assert "split: the data have no 'val'; they have train, test" in command("evaluate", *given, "split=val").err
    text = group.read_text()
    for old, new, message in (
        (
            "standardize_targets: [income]",
            "standardize_targets: []",
            "standardize_targets: 'income' was listed in the config",
        ),
        ("batch_size: 8\n", "classes: [income]\nbatch_size: 8\n", "classes: 'income' was not listed in the config"),
        ("inputs: [age, city]", "inputs: [age]", "model.inputs: 'city' not in batch"),
        ("[age, city]", "[age, city]\ncategories: [age]", "categories: 'age' was not listed in the config"),
    ):
        group.write_text(text.replace(old, new, 1))
        ended = command("evaluate", *given)
        assert ended.code == 1
        assert message in ended.err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+nonsense.key=1", "there is no key 'nonsense.key'"),
        ("splt=val", "there is no key 'splt'; did you mean 'split'?"),
        (
            "model.x=1",
            "model.x: a model is evaluated as it was trained; the options are run, checkpoint, split, data",
        ),
        ("+tasks.smoker.num_outputs=3", "tasks.smoker.num_outputs: a model is evaluated as it was trained"),
        ("optimizer=sgd", "optimizer: a model is evaluated as it was trained"),
        ("~data.path", "~data.path: nothing can be removed here"),
        ("data.pth=new.csv", "mtl.data.table got an unexpected keyword argument 'pth'"),
        ("data.path=nowhere.csv", "there is no file"),
        (
            "data.path={test: people.csv}",
            "data.path.train: a file is required; for all rows of one file: data.path=",
        ),
        (
            "data.seed=1",
            "data.seed: with another draw, the evaluation would include samples that the model was trained on",
        ),
        ("+data.split=[0.5,0,0.5]", "data.split: with another draw"),
        ("data.inputs=[age]", "data.inputs: other data are read and encoded as in training"),
        ("data.eval_batch_size=0", "data.eval_batch_size is 0; it must be a whole number of at least 1"),
        ("data=nope", "data: there is no 'nope'"),
        ("data=mnist", "task 'smoker': target 'smoker' not in batch; the dataset gives: image, digit, parity"),
        (
            "data.path=castle.csv",
            "row 3 of castle.csv has the class 'often' in the column 'smoker', which the model was",
        ),
        ("data.path=words.csv", "row 1 of words.csv has 'old' in the column 'age', which is not a finite number"),
        ("data.path=short.csv", "data.targets: there is no column 'smoker' in short.csv"),
    ],
)
def test_what_cannot_be_measured_is_refused(run: Ended, override: str, message: str) -> None:
    frame = people(10, 1)
    frame.assign(smoker=["yes", "no", "often", *["no"] * 7]).to_csv("castle.csv", index=False)
    frame.assign(age=["old", *["3"] * 9]).to_csv("words.csv", index=False)
    frame.drop(columns="smoker").to_csv("short.csv", index=False)
    ended = command("evaluate", f"run={run.run}", override)
    assert ended.code == 1
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert "accuracy" not in ended.out


OWN = """
import torch
from mtl.data import Fields, Splits

def centred(shift=0.0, trained_on=None, fields=None):
    x = torch.arange(12.0).reshape(12, 1) + shift
    mean = trained_on["mean"] if trained_on else float(x.mean())
    sets = [Fields({"x": x - mean, "y": x[:, 0] * 2}) for _ in range(3)]
    return Splits(*sets, facts={"mean": mean})

def strict(shift=0.0, fields=None):
    return centred(shift)

class Numbers(torch.utils.data.Dataset):
    def __init__(self, count, start=0.0):
        self.count, self.start = count, start
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        return {"x": torch.tensor([self.start + index]), "y": torch.tensor(2 * (self.start + index))}

class Trunk(torch.nn.Linear):
    def __init__(self, num_features):
        super().__init__(1, num_features)
"""
TASK = """# @package _global_
defaults:
  - /objective@tasks.y: regression
  - _self_
  - override /data: datasets
  - override /model: hard_sharing
  - override /model/trunk: custom
model: {inputs: [x], trunk: {_target_: numbers_of_ones_own.Trunk, num_features: 4}}
tasks: {y: {target: y}}
data: {batch_size: 4, train: {_target_: numbers_of_ones_own.Numbers, count: 8}, val: {_target_: numbers_of_ones_own.Numbers, count: 8}, test: {_target_: numbers_of_ones_own.Numbers, count: 8}}
trainer: {max_epochs: 1, monitor: {y/mae: min}}
"""


@pytest.fixture
def own(here: Path) -> list[str]:
    (here / "mine/task").mkdir(parents=True)
    (here / "mine/numbers_of_ones_own.py").write_text(OWN)
    (here / "mine/task/own.yaml").write_text(TASK)
    return ["--config-dir", "mine", "task=own"]


def mean_absolute_error(run: Path, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return (mtl.load(run)({"x": x})["y"].reshape(-1) - y).abs().mean().item()


@pytest.mark.parametrize("plus", ["+", ""])
def test_keys_of_ones_own_data_sets_are_changed(own: list[str], figures: list[Any], plus: str) -> None:
    ended = command("train", *own)
    assert ended.code == 0, ended.err
    again = command("evaluate", f"run={ended.run}", f"{plus}data.test.count=5", "+data.test.start=3.0")
    assert again.code == 0, again.err
    x = torch.arange(3.0, 8.0)
    assert figures[-1]["y"]["mae"] == pytest.approx(mean_absolute_error(ended.run, x[:, None], 2 * x), rel=1e-6)
    assert "Numbers: 5 test" in again.out
    assert "count: there is no" not in again.err
    wrong = command("evaluate", f"run={ended.run}", "+data.test.cuont=5")
    assert (wrong.code, "unexpected keyword argument 'cuont'" in wrong.err) == (1, True)


def test_a_function_of_ones_own_is_given_the_trainings_facts_or_compared(own: list[str], figures: list[Any]) -> None:
    replaced = ["~data.train", "~data.val", "~data.test", "data._target_=numbers_of_ones_own.{}"]
    for name in ("centred", "strict"):
        ended = command("train", *own, *(each.format(name) for each in replaced))
        assert ended.code == 0, ended.err
        again = command("evaluate", f"run={ended.run}", "+data.shift=100.0")
        if name == "strict":
            assert again.code == 1
            assert "they differ from what this run was trained on: mean was 5.5 and is 105.5" in again.err
            continue
        assert again.code == 0, again.err
        x = torch.arange(12.0) + 100
        expected = mean_absolute_error(ended.run, (x - 5.5)[:, None], 2 * x)
        assert figures[-1]["y"]["mae"] == pytest.approx(expected, rel=1e-6)


def test_one_of_several_sources(run: Ended, tmp_path: Path, figures: list[Any]) -> None:
    source = (
        "{_target_: mtl.data.table, path: people.csv, inputs: [age, city], targets: [%s], standardize_targets: [%s]}"
    )
    task = PEOPLE.replace("override /data: table", "override /data: sources").replace("${data.inputs}", "[age, city]")
    task = re.sub(
        r"^data: .*",
        f"data: {{sources: {{a: {source % ('smoker', '')}, b: {source % ('income', 'income')}}}}}",
        task,
        flags=re.M,
    )
    task = task.replace("{target: smoker,", "{source: a, target: smoker,").replace(
        "{target: income}", "{source: b, target: income}"
    )
    Path("mine/task/two.yaml").write_text(task)
    ended = command("train", "--config-dir", "mine", "task=two")
    assert ended.code == 0, ended.err
    frame = people(30, 4)
    frame.to_csv("later.csv", index=False)
    again = command("evaluate", f"run={ended.run}", "data.sources.b.path=later.csv")
    assert again.code == 0, again.err
    assert figures[-1]["smoker"] == ended.metrics["test"]["smoker"]
    assert figures[-1]["income"] == pytest.approx(by_hand(ended.run, frame)["income"], rel=1e-5)
    refused = command("evaluate", f"run={ended.run}", "data.sources.b.seed=4")
    assert (refused.code, "data.sources.b.seed: with another draw" in refused.err) == (1, True)


def test_tables_follow_the_facts_that_they_are_given(tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("x,c,n,k\n5,b,30,no\n,z,,\n")
    facts = {
        "columns": {
            "x": {"kind": "number", "mean": 1.0, "std": 2.0},
            "c": {"kind": "category", "vocabulary": ["a", "b"]},
        },
        "targets": {
            "n": {"kind": "number", "mean": 10.0, "std": 5.0},
            "k": {"kind": "class", "vocabulary": ["yes", "no"]},
        },
    }
    options: dict[str, Any] = {"inputs": ["x", "c"], "targets": ["n", "k"], "standardize_targets": ["n"]}
    splits = table(str(tmp_path / "new.csv"), **options, split=None, trained_on=facts)
    assert splits.facts == facts
    for _, dataset in splits.items():
        fields = dataset.fields
        assert fields["c"].tolist() == [2, 0]
        assert fields["k"].tolist() == [1, -100]
        assert fields["n"].nan_to_num(-1).tolist() == [4, -1]
        assert fields["x"].nan_to_num(-1).tolist() == [5, -1]  # the trunk standardises, by the facts
    with pytest.raises(mtl.UserError, match="data.split is null; training needs three shares"):
        table(str(tmp_path / "new.csv"), **options, split=None)
    with pytest.raises(mtl.UserError, match="the model was trained without the column 'n'; its inputs are: x, c"):
        table(str(tmp_path / "new.csv"), inputs=["n"], targets=["k"], split=None, trained_on=facts)


def test_pictures_follow_the_facts_that_they_are_given(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("file,kind\na.png,dog\na.png,\n")
    facts = {"targets": {"kind": {"kind": "class", "vocabulary": ["cat", "dog"]}}}
    options: dict[str, Any] = {"targets": ["kind"], "size": 4, "split": None}
    splits = image_table(str(tmp_path), str(tmp_path / "labels.csv"), **options, trained_on=facts)
    assert splits.test.fields["kind"].tolist() == [1, -100]
    assert splits.name == "pictures of labels.csv, all of its rows"
    assert splits.facts == facts
    with pytest.raises(mtl.UserError, match="data.split is null"):
        image_table(str(tmp_path), str(tmp_path / "labels.csv"), **options)


def test_a_column_of_splits_is_the_trainings_alone(tmp_path: Path) -> None:
    """Of another table all rows are measured; of the run's own none that were trained on."""
    node = {"_target_": "mtl.data.image_table", "images": str(tmp_path), "labels": "old.csv", "targets": ["kind"]}
    config = {"data": {**node, "split": [0.8, 0.1, 0.1], "split_column": "part", "batch_size": 4}}
    config["data"] |= {"eval_batch_size": 4, "num_workers": 0}
    facts = {"targets": {"kind": {"kind": "class", "vocabulary": ["cat", "dog"]}}}
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "new.csv").write_text("file,kind\na.png,dog\na.png,cat\na.png,dog\n")
    (tmp_path / "marked.csv").write_text("file,kind,part\na.png,dog,test\na.png,cat,val\na.png,dog,test\n")
    for name in ("new.csv", "marked.csv"):
        given = {**config["data"], "labels": str(tmp_path / name)}
        changed, others = with_other_data(config, given, ["data.labels"], facts)
        kept = {k: v for k, v in changed["data"].items() if k not in LOADER_KEYS}
        assert others
        assert make(kept, "data").test.fields["kind"].tolist() == [1, 0, 1]
    given = {**config["data"], "split_column": None}
    with pytest.raises(
        mtl.UserError, match=r"data\.split_column: with another draw, the evaluation would include samples"
    ):
        with_other_data(config, given, ["data.split_column"], facts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 3}, r"data\.seed: with another draw"),
        ({"split": [0.5, 0.2, 0.3]}, r"data\.split: with another draw"),
        (
            {"mean": [0.0, 0.0, 0.0]},
            r"data\.mean is \[0\.0, 0\.0, 0\.0\] and was \[0\.485, 0\.456, 0\.406\] in training",
        ),
        ({"labels": "new.csv", "std": [1.0, 1.0, 1.0]}, r"data\.std is .* Set data\.std in the group to the same"),
        ({"labels": "new.csv", "seed": 3, "std": [0.229, 0.224, 0.225]}, None),
    ],
)
def test_a_group_keeps_the_draw_and_the_pictures_scale(change: dict[str, Any], message: str | None) -> None:
    node = {"_target_": "mtl.data.image_table", "images": "here", "labels": "old.csv", "targets": ["kind"]}
    node |= {"batch_size": 4, "eval_batch_size": 4, "num_workers": 0}
    if message is None:
        assert with_other_data({"data": node}, {**node, **change}, ["data"], {})[1]
        return
    with pytest.raises(mtl.UserError, match=message):
        with_other_data({"data": node}, {**node, **change}, ["data"], {})


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ([], "error: run: a value is required: run=outputs/…\n"),
        (["my run"], "error: 'my run' can't be read; values are written key=value, as run=outputs/…\n"),
    ],
)
def test_a_command_line_without_a_run(here: Path, typed: list[str], message: str) -> None:
    ended = command("evaluate", *typed)
    assert ended.code == 1
    assert ended.err.startswith(message)


def test_the_documentation_names_what_is_refused() -> None:
    text = (ROOT / "docs/howto/evaluate.md").read_text().split("## Evaluation on other data")[1].split("\n## ")[0]
    for word in ("data.path=new.csv", "data.labels=new.csv", "trained_on", "data.seed", "data.split", "data.inputs"):
        assert word in text
