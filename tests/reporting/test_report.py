"""python -m mtl.report, from the command line to the files."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import command
from made_runs import accuracies, run

from mtl.report import main


def report(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Runs the command in this process, and returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["python -m mtl.report", *arguments])
    try:
        main()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return int(ended.code or 0)
    return 0


def two_methods(folder: Path) -> None:
    for seed in range(3):
        run(folder / f"e{seed}", seed=seed, test=accuracies(a=0.50 + 0.01 * seed, b=0.6))
        run(folder / f"x{seed}", seed=seed, balancer="upgrad", test=accuracies(a=0.51 + 0.02 * seed, b=0.6))
        run(folder / f"a{seed}", seed=seed, tasks=["a"], test=accuracies(a=0.5))
        run(folder / f"b{seed}", seed=seed, tasks=["b"], test=accuracies(b=0.5))


def test_known_numbers_in_every_file(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """a of equal: 0.50, 0.51, 0.52, so 0.51 ± 4.3027 · 0.01 / √3 = 0.025. Its Δm: (2 % + 20 %) / 2 = 11 %."""
    two_methods(here / "runs")
    assert report(monkeypatch, "runs") == 0
    out = capsys.readouterr().out
    markdown = (here / "runs/report/report.md").read_text()
    page = (here / "runs/report/report.html").read_text()
    for text in (out, markdown, page):
        assert "0.510 ± 0.025" in text
    for text in (out, page):
        assert "+11.0 [+8.5, +13.5]" in text  # half of a's interval in percent of 0.5: 2.48
    with (here / "runs/report/report.csv").open() as file:
        lines = list(csv.DictReader(file))
    one = {(line["method"], line["task"], line["figure"]): line for line in lines}
    found = one["equal", "a", "accuracy"]
    assert (found["role"], found["split"], found["n"]) == ("reference", "test", "3")
    assert float(found["mean"]) == pytest.approx(0.51)
    assert float(found["high"]) == pytest.approx(0.51 + 4.30265273 * 0.01 / 3**0.5)
    assert float(one["equal", "", "delta_m"]["mean"]) == pytest.approx(11)
    assert float(one["upgrad", "a", "difference in accuracy"]["mean"]) == pytest.approx(0.02)
    assert one["a alone", "a", "accuracy"]["role"] == "single task"
    assert float(one["upgrad", "", "mean_rank"]["mean"]) == pytest.approx((1 + 1.5) / 2)
    assert "Written to runs/report: report.html, report.md, report.csv" in out


def test_delta_of_named_figures(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """b of both methods gains 20 %; the loss of b falls from 0.5 to 0.4, which is 20 % as well."""
    two_methods(here / "runs")
    assert report(monkeypatch, "runs", "--delta", "b/accuracy", "b/loss") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Over 2 figures, each of which counts once: b accuracy↑ and b loss↓." in out
    with (here / "runs/report/report.csv").open() as file:
        gains = [float(line["mean"]) for line in csv.DictReader(file) if line["figure"] == "delta_m"]
    assert gains == pytest.approx([20, 20])
    assert report(monkeypatch, "runs", "--delta", "b/accurac") == 1
    assert "--delta: there is no figure 'b/accurac'; did you mean 'b/accuracy'?" in capsys.readouterr().err


def test_means_over_the_last_epochs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two_methods(here / "runs")
    assert report(monkeypatch, "runs", "--split", "last") == 1
    assert "--split last: no run has means over its last epochs" in capsys.readouterr().err
    for seed, value in enumerate((0.6, 0.7)):
        more = {"last": accuracies(a=value, b=0.6), "last_epochs": 10}
        run(here / f"means/e{seed}", seed=seed, test=accuracies(a=0.9, b=0.9), **more)
        for task in "ab":
            run(here / f"means/{task}{seed}", seed=seed, tasks=[task], last=accuracies(**{task: 0.5}), last_epochs=10)
    assert report(monkeypatch, "means", "--split", "last") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Figures of the val split of 50 samples, means over the last 10 epochs." in out
    with (here / "means/report/report.csv").open() as file:
        lines = {(line["method"], line["figure"]): line for line in csv.DictReader(file) if line["task"] != "b"}
    assert float(lines["equal", "accuracy"]["mean"]) == pytest.approx(0.65)
    assert float(lines["equal", "delta_m"]["mean"]) == pytest.approx(25)  # of 30 % and 20 %


def test_runs_that_dont_count_are_listed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two_methods(here / "runs")
    run(here / "runs/bad", seed=5, status="failed", error="out of memory at step 3\nand more")
    run(here / "runs/killed", seed=6, status="running")
    assert report(monkeypatch, "runs", "--out", "there") == 0
    text = (here / "there/report.md").read_text()
    assert "| failed | made | runs/bad | out of memory at step 3 |" in text
    assert "| unfinished | made | runs/killed | – |" in text
    assert "equal: 2 of 5 runs didn't finish (failed and unfinished)" in text
    assert "12 finished of 14 runs in runs." in capsys.readouterr().out


def test_a_job_that_really_failed_is_listed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_methods(here / "outputs/made")
    assert command("train", "-m", "task=mnist_two_head", "optimizer.lr=-1,-2").code == 1
    assert report(monkeypatch, "outputs") == 0
    text = (here / "outputs/report/report.md").read_text()
    assert "2 runs don't count, since they aren't finished" in text
    (line,) = [line for line in text.splitlines() if "lr is -2" in line]
    assert line.startswith("| failed | mnist\\_two\\_head | outputs/multirun/")
    assert line.endswith("/1\\_lr--2 | optimizer.lr is -2; it must be a finite number of at least 0, or null |")


def test_a_finished_run_without_its_config_is_listed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_methods(here / "runs")
    (here / "runs/e0/config.yaml").unlink()
    assert report(monkeypatch, "runs") == 0
    text = (here / "runs/report/report.md").read_text()
    assert "| can't be read | made | runs/e0 | its config.yaml is missing, or isn't that of a run |" in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_answered_in_a_sentence(here: Path) -> None:
    run(here / "one")
    with open("/dev/full", "w") as full:
        asked = [sys.executable, "-m", "mtl.report", "one"]
        done = subprocess.run(asked, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: the report can't be printed: No space left on device. Written to one/report: "
    )
    assert done.stderr.count("\n") == 1


def test_a_terminal_that_knows_no_greek(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_methods(here / "runs")
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    assert report(monkeypatch, "runs") == 0
    sys.stdout.flush()
    assert "0.510 ? 0.025" in printed.getvalue().decode("ascii")
    assert "0.510 ± 0.025" in (here / "runs/report/report.md").read_text(encoding="utf-8")


def test_ctrl_c_ends_it_without_a_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folders: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mtl.reporting.reading.find", interrupted)
    assert report(monkeypatch, "runs") == 130


@pytest.mark.parametrize(
    ("missing", "told"),
    [(["moocore", "scipy"], "the packages moocore and scipy"), (["moocore"], "the package moocore")],
)
def test_packages_that_are_not_installed_are_named(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: list[str],
    told: str,
) -> None:
    for package in missing:
        monkeypatch.setitem(sys.modules, package, None)  # importing it raises ModuleNotFoundError
    assert report(monkeypatch, str(here)) == 1
    assert capsys.readouterr().err == f'error: mtl.report needs {told}: pip install "mtl-train[report]"\n'


def test_options(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    two_methods(here / "runs")
    assert report(monkeypatch, "runs", "--reference", "upgrad", "--split", "val", "--pair", "b", "a") == 0
    out = capsys.readouterr().out
    assert "Difference from upgrad, on common seeds" in out
    assert "figures of the validation split" in " ".join(out.split())
    assert "b and a" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 1, "error: 'nowhere' is not a folder"),
        (["empty"], 1, "error: there is no run in empty"),
        (["lost"], 1, "error: no run is finished, so there is nothing to compare:\n  failed      lost/one  boom"),
        (["runs", "--reference", "upgrat"], 1, "did you mean 'upgrad'?"),
        (["runs", "--pair", "a", "z"], 1, "there is no task 'z'"),
        (["runs", "--out", "file/report"], 1, "file/report can't be written"),
        (["runs", "--split", "train"], 2, "invalid choice: 'train'"),
        ([], 2, "the following arguments are required: FOLDER"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    two_methods(here / "runs")
    run(here / "lost/one", status="failed", error="boom")
    (here / "empty").mkdir()
    (here / "file").write_text("")
    assert report(monkeypatch, *arguments) == code
    assert message in capsys.readouterr().err


def test_one_run_alone(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(here / "one")
    assert report(monkeypatch, "one") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "There is one method, so there is nothing to choose." in out
    assert "One seed only: there are no intervals and no tests" in out
    assert "Δm isn't defined: there are no single-task runs." in out


def test_runs_without_what_newer_ones_have(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that was added to metrics.json later is missing; and then all but the status."""
    later = ("problem", "choices", "kinds", "samples", "fingerprints", "memory_per_step")
    for seed in range(2):
        folder = run(here / f"old{seed}", seed=seed, **dict.fromkeys(later, None) | {"arguments": ["task=made"]})
        metrics = json.loads((folder / "metrics.json").read_text())
        del metrics["best"]["mode"]
        metrics.pop("kinds", None)
        (folder / "metrics.json").write_text(json.dumps(metrics))
    (run(here / "bare") / "metrics.json").write_text('{"status": "finished"}')
    assert report(monkeypatch, ".") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Whether higher or lower is better isn't known for a accuracy and b accuracy" in out
    assert "No run has figures of the val split." in out


def test_many_tasks(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A table for each task; no pair is drawn unless asked for."""
    tasks = [f"t{index}" for index in range(20)]
    for seed in range(2):
        for name in ("equal", "upgrad"):
            figures = accuracies(**{task: 0.5 + 0.01 * seed + 0.001 * index for index, task in enumerate(tasks)})
            run(here / f"{name}{seed}", balancer=name, seed=seed, tasks=tasks, test=figures)
    assert report(monkeypatch, ".") == 0
    out = capsys.readouterr().out
    assert "Figures on test: t19" in out
    assert "--pair A B plots a pair" in " ".join(out.split())
    assert "The first 12 of 20 tasks." in (here / "report/report.md").read_text()


def test_a_hundred_runs(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(5):
        for number in range(20):
            name = "equal" if number == 0 else f"m{number}"
            curves = {f"loss/a/{split}": {step: 1 / step for step in range(1, 200)} for split in ("train", "val")}
            figures = accuracies(a=0.5 + 0.01 * seed + 0.002 * number, b=0.5 + 0.001 * seed * number)
            run(here / f"{name}-{seed}", balancer=name, seed=seed, test=figures, curves=curves)
    assert report(monkeypatch, ".") == 0
    assert "100 finished of 100 runs in .." in capsys.readouterr().out


def test_through_the_command_mtl(here: Path) -> None:
    run(here / "one")
    done = subprocess.run([sys.executable, "-m", "mtl", "report", "one"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    helped = subprocess.run([sys.executable, "-m", "mtl", "report", "-h"], capture_output=True, text=True, check=False)
    assert helped.stdout.startswith("usage: mtl report")


@pytest.mark.slow
def test_real_runs(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two methods and both tasks alone, trained; the numbers are those of the runs' own files."""
    short = ["task=mnist_two_head", "trainer.max_epochs=1", "log.every=20", "seed=0,1"]
    assert command("train", "-m", *short, "balancer=equal,upgrad").code == 0
    assert command("train", "-m", *short, "only=digit,parity").code == 0
    assert report(monkeypatch, "outputs") == 0
    with (here / "outputs/report/report.csv").open() as file:
        lines = {(line["method"], line["task"], line["figure"]): line for line in csv.DictReader(file)}
    told: dict[str, list[float]] = {}
    for path in here.glob("outputs/multirun/*/*/metrics.json"):
        metrics = json.loads(path.read_text())
        if len(metrics["test"]) == 2:
            told.setdefault(metrics["choices"]["balancer"], []).append(metrics["test"]["digit"]["accuracy"])
    assert set(told) == {"equal", "upgrad"}
    for name, values in told.items():
        assert float(lines[name, "digit", "accuracy"]["mean"]) == pytest.approx(sum(values) / 2)
        assert lines[name, "", "delta_m"]["n"] == "2"
    assert lines["equal", "digit~parity", "cosine"]["n"] == "2"
    assert "one seed" not in capsys.readouterr().out
