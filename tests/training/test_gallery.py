"""Pictures and histograms in the logs: when they appear, and that they change nothing else."""

from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Ended, batches, command, problem
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import mtl
from mtl.data import Fields, Loader
from mtl.loggers import pictures
from mtl.training import checkpoint, gallery
from mtl.training.faults import Faults
from mtl.training.readings import Readings

SMALL = ["task=mnist_two_head", "data.batch_size=250", "log.every=4"]


def events(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run), size_guidance={"images": 0, "histograms": 0})
    found.Reload()
    return found


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("shown")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ended = command("train", *SMALL, "trainer.max_epochs=5", "log.pictures=2", "log.histograms=4")
        ended.run = ended.run.resolve()
    assert ended.code == 0, ended.err
    return ended


def test_pictures_come_at_intervals_and_at_the_end(shown: Ended) -> None:
    found = events(shown.run)
    assert set(found.Tags()["images"]) == {"cosine/matrix", "prediction/digit", "prediction/parity"}
    for tag in found.Tags()["images"]:
        assert [event.step for event in found.Images(tag)] == [32, 64, 80]
    steps = [event.step for event in found.Histograms("parameter/heads.digit.weight")]
    assert steps == [64, 80]
    (histogram,) = (event for event in found.Histograms("parameter/heads.digit.weight") if event.step == 80)
    last = checkpoint.load(shown.run / "checkpoints" / "last.pt")["model"]["heads.digit.weight"].double()
    assert histogram.histogram_value.num == last.numel()
    assert histogram.histogram_value.min == pytest.approx(last.min().item())
    assert histogram.histogram_value.sum == pytest.approx(last.sum().item(), rel=1e-5)
    assert "gradient/trunk.conv1.weight" in found.Tags()["histograms"]


def test_they_change_no_bit_of_the_training(shown: Ended, here: Path) -> None:
    without = command("train", *SMALL, "trainer.max_epochs=5", "log.pictures=null")
    assert events(without.run).Tags()["images"] == []
    ours, theirs = (checkpoint.load(run / "checkpoints" / "last.pt") for run in (shown.run, without.run))
    for name, value in ours["model"].items():
        assert torch.equal(value, theirs["model"][name]), name
    assert torch.equal(ours["random"]["torch"], theirs["random"]["torch"])


@pytest.mark.parametrize(
    ("epoch", "every", "since"),
    [(1, 1, 1), (2, 1, 2), (2, 2, 1), (3, 2, 3), (4, 2, 3), (5, 2, 5), (2, 50, 1), (50, 50, 1)],
)
def test_the_mean_is_over_what_was_measured_since(
    epoch: int, every: int, since: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epoch n has the cosine n/100; the epochs are the same where a run ended at any of them before and goes on."""
    measured = [{"cosine/a~b": number / 100} for number in range(1, epoch + 1)]
    readings = Readings([], Faults(None, None, print))  # type: ignore[arg-type]
    readings.measured, readings.measured_in = measured, list(range(1, epoch + 1))
    step = SimpleNamespace(tasks=[SimpleNamespace(name=name) for name in "ab"])
    found: dict[tuple[str, str], float] = {}
    monkeypatch.setattr(pictures, "cosine_matrix", lambda names, cosines: found.update(cosines))
    shows = gallery.Gallery(None, pictures_every=every, histograms_every=None, facts={})
    selection = SimpleNamespace(matrices={})
    shows.pictures(SimpleNamespace(epoch=epoch, step=step, readings=readings, selection=selection))
    assert found == {("a", "b"): pytest.approx(fmean(range(since, epoch + 1)) / 100)}


def test_the_last_epoch_of_a_run_whose_patience_ends_has_pictures(here: Path) -> None:
    arguments = ["trainer.max_epochs=50", "trainer.patience=1", "optimizer.lr=1e-30", "scheduler=none"]
    ended = command("train", *SMALL, *arguments, "log.pictures=50", "log.histograms=50")
    assert ended.code == 0, ended.err
    found = events(ended.run)
    assert [event.step for event in found.Images("prediction/digit")] == [32]
    assert [event.step for event in found.Histograms("parameter/heads.digit.weight")] == [32]


def test_a_run_that_goes_on_shows_nothing_twice(here: Path) -> None:
    arguments = [*SMALL, "trainer.max_epochs=3", "log.pictures=1", "scheduler=none"]
    first = command("train", *arguments)
    again = command(
        "train",
        *arguments[:1],
        *SMALL[1:],
        "trainer.max_epochs=5",
        "log.pictures=1",
        "scheduler=none",
        f"resume={first.run}",
    )
    assert again.code == 0, again.err
    found = events(first.run)
    assert [event.step for event in found.Images("prediction/digit")] == [16, 32, 48, 64, 80]
    assert len(found.Tensors("config/text_summary")) == 1


@pytest.mark.parametrize(
    "task", ["mnist_two_model", "mnist_reconstruct", "mnist_two_source", "mnist_disjoint", "multi_mnist", "burgers"]
)
def test_every_problem_has_its_pictures(here: Path, task: str) -> None:
    ended = command("train", f"task={task}", "trainer.max_epochs=1", *(["data.epoch=3"] if task == "burgers" else []))
    assert ended.code == 0, ended.err
    assert "no more pictures" not in ended.out
    tags = events(ended.run).Tags()["images"]
    names = [name for name in ended.metrics["weight"] if task != "burgers"]
    assert {tag for tag in tags if tag.startswith("prediction/")} == {f"prediction/{name}" for name in names}


def test_what_goes_wrong_is_told_and_ends_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise IndexError("odd data")

    monkeypatch.setattr(gallery, "show", broken)
    ended = command("train", *SMALL, "trainer.max_epochs=2", "log.pictures=1")
    assert ended.code == 0
    assert ended.out.count("warning  no more pictures: IndexError: odd data") == 1


def trainer_of(model: nn.Module, tasks: list[mtl.Task], **more: Any) -> Any:
    """Returns an object with the attributes of a trainer that a gallery uses, in the only epoch of a run."""
    parameters = dict(model.named_parameters())
    step = SimpleNamespace(
        model=model, tasks=tasks, passes=SimpleNamespace(autocast=nullcontext), parameters=parameters
    )
    readings = Readings([], Faults(None, None, print))  # type: ignore[arg-type]
    selection = SimpleNamespace(matrices={})
    shown = {"step": step, "readings": readings, "selection": selection}
    return SimpleNamespace(**shown, epoch=1, global_step=1, goes_on=False, **more)


def test_predictions_are_those_of_evaluation_and_leave_no_trace() -> None:
    """Of a model with batch norm, dropout, spectral norm and a buffer that training replaces."""
    model, tasks = problem(2)
    (batch,) = batches(1, 2)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    draws = torch.get_rng_state()
    found = gallery.predict(model, tasks, batch, nullcontext)
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    model.eval()
    with torch.no_grad():
        for task in tasks:
            assert torch.equal(found[task.name], model.predict(task.name, model.features(batch)))


def test_classes_are_called_what_the_data_call_them_and_objectives_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def objective(*_: object) -> torch.Tensor:
        raise AssertionError("it was asked for")

    model, tasks = problem(1)
    tasks.append(mtl.Task("residual", objective=objective))
    names = ["apple", "pear", "plum", "fig", "date"]
    facts = {"targets": {"y0": {"vocabulary": names}}}
    given = []
    monkeypatch.setattr(gallery, "show", lambda *these: given.append(these))
    (batch,) = batches(1, 1)
    loader = Loader(Fields(batch), batch_size=4)
    gallery.Gallery(loader, pictures_every=1, histograms_every=None, facts=facts).pictures(trainer_of(model, tasks))
    ((task, prediction, shown, image, called),) = given
    assert (task.name, prediction.shape, called) == ("t0", (8, 5), names)
    assert torch.equal(image, shown["x"])


def test_without_images_more_samples_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [mtl.Task("a", head=nn.Linear(3, 1), loss=nn.MSELoss(), target="y")]
    model = mtl.MultiTaskModel(nn.Linear(2, 3), tasks, inputs=["x"])
    given = []
    monkeypatch.setattr(gallery, "show", lambda *these: given.append(these))
    loader = Loader(Fields({"x": torch.randn(1000, 2), "y": torch.randn(1000, 1)}), batch_size=4)
    gallery.Gallery(loader, pictures_every=1, histograms_every=None, facts={}).pictures(trainer_of(model, tasks))
    ((_, prediction, shown, image, _),) = given
    assert (len(prediction), len(shown["y"]), image) == (gallery.COUNTED, gallery.COUNTED, None)


def test_a_gradient_s_histogram_is_of_sums_where_it_is_sparse() -> None:
    """Row 1 was looked up twice: its gradient is 2."""
    model = nn.EmbeddingBag(3, 1, sparse=True, mode="sum")
    model(torch.tensor([[1, 1, 2]])).sum().backward()
    found = {}
    loggers = SimpleNamespace(takes=lambda kind: True, show=lambda kind, tag, step, values: found.update({tag: values}))
    gallery.Gallery(None, pictures_every=None, histograms_every=1, facts={})(trainer_of(model, [], loggers=loggers))
    assert sorted(found["gradient/weight"].flatten().tolist()) == [1.0, 2.0]


def test_no_image_is_loaded_beside_those_that_are_shown() -> None:
    loaded: list[int] = []

    class Data:
        def __init__(self, sample: torch.Tensor) -> None:
            self.sample = sample

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            loaded.append(index)
            return {"x": self.sample, "y0": torch.tensor(0)}

    model, tasks = problem(1, dtype=torch.float32)
    shows = gallery.Gallery(
        Loader(Data(torch.zeros(1, 8, 8)), batch_size=4), pictures_every=1, histograms_every=None, facts={}
    )
    assert set(shows.pictures(trainer_of(model, tasks))) == {"prediction/t0"}
    assert len(loaded) == gallery.SHOWN


def test_samples_are_spread_over_the_data() -> None:
    fields = {"x": torch.arange(100.0), "y": torch.arange(100)}
    in_memory = gallery.some_samples(Loader(Fields(fields), batch_size=7), 5)
    assert in_memory["x"].tolist() == [0.0, 25.0, 50.0, 74.0, 99.0]
    listed = [{"x": x, "y": y} for x, y in zip(fields["x"], fields["y"], strict=True)]
    assert gallery.some_samples(Loader(listed, batch_size=7), 5)["y"].tolist() == [0, 25, 50, 74, 99]
    assert gallery.some_samples(Loader(listed, batch_size=7), 500)["y"].tolist() == list(range(100))
