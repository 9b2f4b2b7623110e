"""Every command and snippet of the README, run in order in one folder."""

import os
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Ended, command

from mtl import graph, schema, train

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
HANGS = 1800  # seconds after which a command is taken to hang; nothing is right or wrong for the time it takes
FILE = re.compile(r"(?:# @package _global_\n)?# (mine/\S+)\n")


def environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def starts_tensorboard(command: str, folder: Path) -> None:
    """It runs until it is stopped, so it is stopped when it says where it listens."""
    process = subprocess.Popen(
        [*command.split(), "--port", "0"], cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        assert any("http://" in line for line in process.stderr)
    finally:
        process.terminate()
        process.communicate(timeout=HANGS)


def test_first_block_is_the_two_commands() -> None:
    assert BLOCKS[0] == (
        "bash",
        'pip install -e . && python -m mtl.train task=mnist_two_head\npip install -e ".[test]" && python -m pytest\n',
    )


def test_config_that_is_explained_is_the_one_that_is_used() -> None:
    (shown,) = [text for kind, text in BLOCKS if kind == "yaml" and not FILE.match(text)]
    assert shown == (ROOT / "configs" / "task" / "mnist_two_head.yaml").read_text()


def test_lengths_that_are_promised() -> None:
    snippets = [text for kind, text in BLOCKS if kind == "python"]
    (loop,) = [text for text in snippets if "step(batch)" in text]
    assert len(loop.split("import mtl\n")[1].strip().splitlines()) <= 10
    (module,) = [text for text in snippets if "class Digits" in text]
    body = module.split("class Digits")[1].split("\n\n\n")[0]
    assert len([line for line in body.splitlines() if line.strip()]) <= 15
    (callback,) = [text for text in snippets if "class Watch" in text]
    assert len([line for line in callback.splitlines()[1:] if line.strip()]) == 6


def test_the_five_cases_are_short() -> None:
    """Config and code together; what they build on is shown before."""
    section = README.split("### The five commonest cases")[1].split("\n## ")[0]
    cases = re.split(r"^(?=\*\*)", section, flags=re.M)
    cases = [case for case in cases if case.startswith("**")]
    assert len(cases) == 5
    for case in cases:
        blocks = re.findall(r"^```(?:python|yaml)\n(.*?)^```$", case, re.M | re.S)
        lines = [line for block in blocks for line in block.splitlines() if line.strip()]
        assert 5 < len(lines) <= 30, case[:40]


def data_of_ones_own(folder: Path) -> None:
    """The files that the README's cases speak of."""
    from PIL import Image

    draws = random.Random(0)
    rows = ["area,year,district,price,rooms,kind"]
    for _ in range(300):
        area, year, district = (
            draws.uniform(30, 200),
            draws.randint(1900, 2020),
            draws.choice(["north", "south", "east"]),
        )
        price = round(area * 3 + (year - 1900) + 100 * (district == "south"), 1)
        kind = "villa" if area > 150 else "house" if area > 80 else "flat"
        cells = [f"{area:.1f}", str(year), district, str(price), str(round(area / 25)), kind]
        rows.append(",".join("" if draws.random() < 0.1 else cell for cell in cells))
    (folder / "houses.csv").write_text("\n".join(rows) + "\n")
    (folder / "pictures").mkdir()
    labels = ["file,fruit,weight"]
    for number in range(40):
        fruit = draws.choice(["apple", "banana"])
        Image.new("RGB", (32, 32), (200, 30 if fruit == "apple" else 200, 30)).save(folder / f"pictures/{number}.png")
        labels.append(f"{number}.png,{fruit},{draws.uniform(1, 2):.2f}")
    (folder / "labels.csv").write_text("\n".join(labels) + "\n")


def write_files(folder: Path) -> None:
    """The data and the files that the README's commands are about."""
    data_of_ones_own(folder)
    for _, text in BLOCKS[1:]:
        if named := FILE.match(text):
            path = folder / named[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def test_every_training_composes_to_a_config_that_is_right(
    here: Path, trained: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each job of each command, by Hydra; that they train as well is for the slow test."""
    write_files(here)
    checked: list[object] = []
    monkeypatch.setattr(train, "train", lambda composed: checked.append(schema.check(composed)))
    monkeypatch.setattr(graph, "graph", lambda composed: checked.append(schema.check_graph(composed)))
    lines = [line for kind, text in BLOCKS[1:] if kind == "bash" for line in text.splitlines()]
    words = [shlex.split(line.replace("$RUN", str(trained.run))) for line in lines]
    commands = [each[2:] for each in words if each[:2] == ["python", "-m"] and each[2] in ("mtl.train", "mtl.graph")]
    assert len(commands) > 20
    for module, *arguments in commands:
        if any(argument.startswith("+sweep=") for argument in arguments):  # in this process, and not three times each
            left_out = ("hydra/launcher=", "seed=")
            arguments = [*(a for a in arguments if not a.startswith(left_out)), "seed=0"]
        ended = command(module.removeprefix("mtl."), *arguments)
        assert ended.code == 0, (arguments, ended.err)
    assert len(checked) > len(commands) + 10  # a multirun has several


def test_the_loop_without_hydra_runs(tmp_path: Path) -> None:
    snippets = [text for kind, text in BLOCKS if kind == "python"]
    for text in snippets:
        compile(text, "README.md", "exec")
    (loop,) = [text for text in snippets if "step(batch)" in text]
    run([sys.executable, "-c", loop], tmp_path)


@pytest.mark.slow
def test_every_command_and_snippet_runs(tmp_path: Path) -> None:
    """As they stand there, but that the sweeps train for one epoch instead of five."""
    write_files(tmp_path)
    run([sys.executable, "-m", "mtl.train", "task=mnist_two_head", "trainer.max_epochs=2"], tmp_path)
    ran = 0
    script = "set -euo pipefail\n"
    for kind, text in BLOCKS[1:]:
        if FILE.match(text):
            continue
        if kind == "python":
            run([sys.executable, "-c", text], tmp_path)
            ran += 1
        elif kind == "bash":
            for line in text.splitlines():
                if line.startswith("tensorboard"):
                    starts_tensorboard(line, tmp_path)
                elif line.startswith("RUN="):
                    script += line + "\n"
                else:
                    short = re.sub(r"max_epochs=5 (?=\+sweep)", "max_epochs=1 ", line)
                    run(["bash", "-c", script + short], tmp_path)
                ran += 1
    assert ran >= 14


def test_help_of_the_command(tmp_path: Path) -> None:
    assert "train a problem" in run([sys.executable, "-m", "mtl", "--help"], tmp_path)
    assert "mnist_two_head, mnist_two_model" in run([sys.executable, "-m", "mtl", "train", "--help"], tmp_path)
    wrong = subprocess.run(
        [sys.executable, "-m", "mtl", "trian"], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert wrong.returncode == 1
    assert "did you mean 'train'?" in wrong.stderr


@pytest.mark.parametrize("name", re.findall(r"[(\"](docs/[^)\"#]+)[^)\"]*[)\"]", README))
def test_pictures_and_pages_are_there(name: str) -> None:
    assert (ROOT / name).stat().st_size > (10_000 if name.endswith(".png") else 1_000)
