"""A problem on a table, from a config alone: what models know of their data, and predictions from raw rows."""

import re
from pathlib import Path

import pandas
import pytest
import torch
from conftest import ROOT, command
from omegaconf import OmegaConf

import mtl
from mtl.config.data import check_facts, fill_from_data
from mtl.data import Fields, Splits, table
from mtl.runs import loading as runs

(TASK,) = re.findall(r"```yaml\n(# @package.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)


@pytest.fixture
def problem(here: Path) -> Path:
    """A folder with people.csv and mine/task/people.yaml."""
    rows = 100
    generator = torch.Generator().manual_seed(0)
    age = torch.randint(18, 80, (rows,), generator=generator).tolist()
    city = torch.randint(0, 3, (rows,), generator=generator).tolist()
    pandas.DataFrame(
        {
            "age": [None if index % 7 == 0 else value for index, value in enumerate(age)],
            "city": [("Bern", "Basel", None)[value] for value in city],
            "income": [1000.0 * value for value in age],
            "smoker": ["yes" if value > 50 else "no" for value in age],
        }
    ).to_csv("people.csv", index=False)
    (here / "mine" / "task").mkdir(parents=True)
    (here / "mine" / "task" / "people.yaml").write_text(TASK)
    return here


def train(*arguments: str):
    return command("train", "--config-dir", "mine", "task=people", *arguments)


def test_raw_rows_are_predicted_as_the_datas_fields_are(problem: Path) -> None:
    ended = train()
    assert ended.code == 0, ended.err
    columns = table("people.csv", inputs=["age", "city"], targets=["smoker"]).facts["columns"]
    assert OmegaConf.load(ended.run / "config.yaml").model.trunk.columns == "from_data"  # so that resume can compare it
    assert runs.read(ended.run)["config"]["model"]["trunk"]["columns"] == columns

    splits = table("people.csv", inputs=["age", "city"], targets=["smoker"])
    frame = pandas.read_csv("people.csv")
    Path("people.csv").unlink()  # the model needs no data
    model = mtl.load(ended.run)
    chosen = splits.test.fields
    smoker = ["no", "yes"]
    raw = {
        "age": [None if age != age else int(age) for age in chosen["age"].tolist()],
        "city": [(None, "Basel", "Bern")[code] for code in chosen["city"]],
    }
    rows = frame.astype(object).where(frame.notna(), None)[["age", "city", "smoker"]].to_numpy().tolist()
    for age, city, label in zip(raw["age"], raw["city"], chosen["smoker"], strict=True):
        assert [age, city, smoker[label]] in rows  # they are rows of the file
    for task in ("smoker", "income"):
        assert torch.equal(model(raw)[task], model(chosen)[task])
    unknown = model({"age": [31, None], "city": ["Bern", "Atlantis"]})["smoker"]
    known = model({"age": torch.tensor([31, float("nan")]), "city": torch.tensor([2, 0])})["smoker"]
    assert torch.equal(unknown, known)
    with pytest.raises(mtl.UserError, match="'age': 'old' is not a finite number"):
        model({"age": ["old"], "city": ["Bern"]})


def test_empty_cells_of_targets_do_not_count(problem: Path) -> None:
    frame = pandas.read_csv("people.csv")
    frame.loc[::3, "smoker"] = None
    frame.loc[1::4, "income"] = None
    frame.to_csv("people.csv", index=False)
    ended = train()
    assert ended.code == 0, ended.err
    test = table(
        "people.csv", inputs=["age", "city"], targets=["smoker", "income"], standardize_targets=["income"]
    ).test
    predictions, fields = mtl.load(ended.run)(test.fields), test.fields
    known, measured = fields["smoker"] != -100, ~fields["income"].isnan()
    assert 0 < known.sum() < len(known)
    assert 0 < measured.sum() < len(measured)
    right = (predictions["smoker"].argmax(1) == fields["smoker"])[known].float().mean()
    error = (predictions["income"] - fields["income"]).abs()[measured].mean()
    assert ended.metrics["test"]["smoker"]["accuracy"] == pytest.approx(right.item())
    assert ended.metrics["test"]["income"]["error"] == pytest.approx(error.item(), rel=1e-5)


def test_resume_and_evaluate_refuse_other_data(problem: Path) -> None:
    ended = train("trainer.max_epochs=1")
    assert ended.code == 0, ended.err
    evaluated = command("evaluate", f"run={ended.run}")
    assert evaluated.code == 0, evaluated.err
    again = train("trainer.max_epochs=2", f"resume={ended.run}")
    assert again.code == 0, again.err
    assert "resume   from step 5" in again.out
    text = Path("people.csv").read_text()
    Path("people.csv").write_text(text.replace("Basel", "Aarau"))
    for refused in (
        command("evaluate", f"run={ended.run}"),
        train("trainer.max_epochs=3", f"resume={ended.run}"),
    ):
        assert refused.code == 1
        assert "columns.city.vocabulary was ['Basel', 'Bern'] and is ['Aarau', 'Bern']" in refused.err
    assert mtl.load(ended.run)
    assert ended.metrics["status"] == "finished"  # the run is left as it was
    Path("people.csv").write_text(text)
    assert command("evaluate", f"run={ended.run}").code == 0


def test_the_word_from_data_anywhere_in_model_and_tasks() -> None:
    splits = Splits(Fields({"x": torch.zeros(1)}), facts={"num_nodes": 5, "weight": [0.1, 0.9]})
    config = {
        "model": {"trunk": {"layers": [{"num_nodes": "from_data"}, 3], "name": "resnet"}},
        "tasks": {"t": {"loss": {"weight": "from_data"}, "target": "x"}},
        "data": {"weight": "from_data"},
    }
    assert fill_from_data(config, splits) == {
        "model": {"trunk": {"layers": [{"num_nodes": 5}, 3], "name": "resnet"}},
        "tasks": {"t": {"loss": {"weight": [0.1, 0.9]}, "target": "x"}},
        "data": {"weight": "from_data"},
    }
    assert config["tasks"]["t"]["loss"] == {"weight": "from_data"}
    config["tasks"]["t"]["head"] = {"size": "from_data"}
    message = r"tasks\.t\.head\.size: from_data, but the data have no fact 'size'; they have: num_nodes, weight"
    with pytest.raises(mtl.UserError, match=message):
        fill_from_data(config, splits)


def test_facts_may_differ_in_the_last_digits() -> None:
    data = Fields({"x": torch.zeros(1)})
    check_facts(Splits(data, facts={"a": {"mean": 1.0, "names": ["b"]}}), {"a": {"mean": 1 + 1e-9, "names": ["b"]}})
    for before in ({"a": {"mean": 1.01, "names": ["b"]}}, {"a": {"mean": 1.0, "names": ["c"]}}, {}):
        with pytest.raises(mtl.UserError, match="they differ from what this run was trained on: a"):
            check_facts(Splits(data, facts={"a": {"mean": 1.0, "names": ["b"]}}), before)


def test_a_fact_that_the_data_do_not_have(problem: Path) -> None:
    ended = command("train", "task=mnist_two_head", "+model.trunk.size=from_data")
    assert "model.trunk.size: from_data, but the data have no fact 'size'; they have: none" in ended.err


def test_what_a_table_leaves_in_doubt_is_said_at_the_start(problem: Path) -> None:
    frame = pandas.read_csv("people.csv")
    frame["age"] = [f"{50 if age != age else int(age)} y" for age in frame["age"]]
    frame.to_csv("people.csv", index=False)
    ended = train("trainer.max_epochs=1")
    assert ended.code == 0, ended.err
    told = "warning  data.inputs: the column 'age' of people.csv is taken for categories, though all of its cells look"
    assert told in ended.out
    assert ended.out.index(told) < ended.out.index("epoch 1/1")
    assert "warning" not in train("trainer.max_epochs=1", "data.categories=[age]").out


def test_classes_that_look_like_numbers_are_told_with_what_helps(problem: Path) -> None:
    frame = pandas.read_csv("people.csv")
    frame["smoker"] = (frame["smoker"] == "yes").astype(int)
    frame.to_csv("people.csv", index=False)
    ended = train("trainer.max_epochs=1")
    assert ended.code == 1
    assert (
        "task 'smoker': its target 'smoker' has numbers, and CrossEntropyLoss expects classes; list 'smoker'"
        in ended.err
    )
    assert "in data.classes" in ended.err
    assert train("trainer.max_epochs=1", "data.classes=[smoker]").code == 0
    for income, standardize, message in (
        (
            "1,5 2,5",
            "",
            "MSELoss compares numbers; write plain numbers into the column, or use /objective@tasks.income",
        ),
        (
            "1,5 2,5",
            "income",
            "'income' contains classes, which have no mean. If '1,5' is meant as a number, write plain",
        ),
        ("many", "", "which no row for training has; it has: $0"),
    ):
        cells = [f"${row}" for row in range(100)] if income == "many" else income.split() * 50
        frame.assign(income=cells).to_csv("people.csv", index=False)
        ended = train("trainer.max_epochs=1", "data.classes=[smoker]", f"data.standardize_targets=[{standardize}]")
        assert ended.code == 1
        assert message in ended.err
    assert "with data.seed. If '$0'" in ended.err
