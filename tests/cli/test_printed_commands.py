"""Every printed command runs unchanged, also if folders have unusual names."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Ended, command, slow_but

from mtl.quoting import override

FAST = ["task=mnist_two_head", "trainer.max_epochs=2", "data.batch_size=2000", "data.eval_batch_size=500"]
EVERYTHING = ", = [x] (y) {z} ' \" # ~ $HOME :x: ; \\ * ? ! & é日 %0A `ls` | < > $(touch owned)"
SHELL = 'show() { printf "%s\\0" "${@:1}"; }; python() { show "$@"; }; tensorboard() { show "$@"; }; '


def words(line: str) -> list[str]:
    """Returns the words of a printed command, as bash passes them to the program."""
    done = subprocess.run(["bash", "-c", SHELL + line], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


def printed(ended: Ended, purpose: str) -> list[str]:
    """Returns the words of the last command that is printed for this purpose."""
    found = re.findall(rf"^{purpose} +((?:python -m|tensorboard) .+)$", ended.out, re.M)
    assert found, ended.out
    return words(found[-1])


def run(typed: list[str]) -> Ended:
    """Runs python with the arguments that bash would pass."""
    assert typed[0] == "-m"
    ended = command(typed[1].removeprefix("mtl."), *typed[2:])
    assert ended.code == 0, (typed, ended.err)
    return ended


def compare_folder(ended: Ended) -> str:
    return printed(ended, "compare")[2]


@pytest.fixture
def stopping(here: Path, name: str) -> list[str]:
    """Arguments for runs in a folder of this name, with code from another such one. The first stops after a step."""
    (here / name).mkdir()
    (here / name / "stops.py").write_text(
        "import os, pathlib, signal\n"
        "class Once:\n"
        "    def __call__(self, trainer, result):\n"
        "        if pathlib.Path('stopped').exists(): return\n"
        "        pathlib.Path('stopped').touch()\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    stop = "+callbacks.stop._target_=stops.Once"
    return [f"--config-dir=./{name}", *FAST, override("output_root", name), stop, override("vars.note", name)]


@pytest.mark.parametrize("name", slow_but([EVERYTHING], [EVERYTHING, "-new\nline\ttab"]))
def test_what_a_run_prints(here: Path, stopping: list[str], name: str) -> None:
    stopped = command("train", *stopping)
    assert stopped.code == 143, stopped.err
    assert printed(stopped, "view")[0] == "--logdir"
    assert Path(printed(stopped, "view")[1]).resolve().parents[1] == here / name
    run(printed(stopped, "evaluate"))
    finished = run(printed(stopped, "resume"))
    assert "resume   from step 1, epoch 1" in finished.out
    (folder,) = (here / name).glob("mnist_two_head/*")
    assert Path(printed(finished, "view")[1]).resolve() == folder
    assert "digit" in run(printed(finished, "evaluate")).out
    assert "tasks: digit\n" in run(printed(finished, "digit alone")).out
    assert not (here / "owned").exists()  # no shell ran what is in a name


@pytest.mark.parametrize("name", [EVERYTHING])
def test_what_a_multirun_prints(here: Path, stopping: list[str], name: str) -> None:
    interrupted = command("train", "-m", *stopping, "seed=0,1", "trainer.max_epochs=1")
    assert interrupted.code == 143, interrupted.err
    resumed = run(printed(interrupted, "resume"))
    assert "2 jobs in" in resumed.out
    assert "tasks: parity\n" in run(printed(resumed, "parity alone")).out
    assert "digit" in run(printed(resumed, "evaluate")).out
    other = command("train", "-m", *stopping, "seed=0,2", override("resume", compare_folder(resumed)))
    told = re.search(r"was started with other arguments: (.+)$", other.err, re.M)[1]
    assert (
        "2 jobs in" in run(["-m", "mtl.train", *words(f"show {told}"), override("resume", compare_folder(resumed))]).out
    )
    compare, look = printed(resumed, "compare"), printed(resumed, "view")
    assert compare[:2] == ["-m", "mtl.report"]
    assert Path(compare[2]).resolve() == Path(look[1]).resolve()
    assert len(list(Path(compare[2]).glob("*/config.yaml"))) == 2


@pytest.mark.parametrize("name", [EVERYTHING])
def test_what_a_run_that_fails_prints(here: Path, name: str) -> None:
    (here / "trunks.py").write_text(
        "import pathlib, torch, mtl\n"
        "class Fails(mtl.trunks.LeNet):\n"
        "    steps = 0\n"
        "    def forward(self, x):\n"
        "        Fails.steps += self.training\n"
        "        if Fails.steps == 3 and not pathlib.Path('failed').exists():\n"
        "            pathlib.Path('failed').touch()\n"
        "            raise torch.OutOfMemoryError('CUDA out of memory')\n"
        "        return super().forward(x)\n"
    )
    typed = [*FAST, "model.trunk._target_=trunks.Fails", override("output_root", name)]
    failed = command("train", *typed)
    assert failed.code == 1
    found = re.search(r"resume with (.+)$", failed.out, re.M)
    assert found, failed.out
    assert "resume   from step 2" in run(["-m", "mtl.train", *typed, *words(f"show {found[1]}")]).out


@pytest.mark.parametrize("name", [EVERYTHING])
def test_what_is_printed_of_a_run_that_has_another_config(here: Path, name: str) -> None:
    """How to allow it, also where a pattern, and not a name, is what differs."""
    groups = "optimizer.groups={{*.bias: {{weight_decay: {}}}, trunk.*: {{lr: 1e-4}}}}"
    typed = [*FAST, "trainer.max_epochs=1", "scheduler=none", override("output_root", name)]
    first = command("train", *typed, groups.format(0), override("vars.note", name))
    assert first.code == 0, first.err
    (folder,) = Path(name).glob("mnist_two_head/*")
    again = [*typed, "trainer.max_epochs=2", groups.format(0.1), "vars.note=x", override("resume", str(folder))]
    refused = command("train", *again)
    assert refused.code == 1
    allow = re.search(r"or allow it: (.+)$", refused.err, re.M)[1]
    assert "*.bias" in allow
    assert "resume   from step" in run(["-m", "mtl.train", *again, *words(f"show {allow}")]).out


@pytest.mark.parametrize("name", [EVERYTHING])
def test_what_graph_prints(here: Path, name: str) -> None:
    ended = command("graph", *FAST, override("output_root", name), "graph.tensorboard=true")
    assert ended.code == 0, ended.err
    assert list(Path(printed(ended, "view")[1]).glob("leaves.csv"))


def test_a_printed_command_in_a_real_shell(here: Path) -> None:
    ended = command("train", *FAST, f"output_root={EVERYTHING}")  # as one types it, without quotes for Hydra
    assert ended.code == 0, ended.err
    line = re.search(r"^evaluate +(.+)$", ended.out, re.M)[1]
    there = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=there)
    assert done.returncode == 0, done.stderr
    (metrics,) = (here / EVERYTHING).glob("*/*/metrics.json")
    assert f"{json.loads(metrics.read_text())['test']['digit']['accuracy']:.4g}" in done.stdout


@pytest.mark.parametrize("what", ["output_root", "--config-dir", "the current folder", "resume"])
def test_a_name_that_hydra_cannot_have(here: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    name = "a${b}"
    (here / name).mkdir()
    (here / name / "config.yaml").touch()
    typed = {"output_root": [override("output_root", name)], "--config-dir": ["--config-dir", name]}
    typed["resume"] = [override("resume", name)]
    if what == "the current folder":
        monkeypatch.chdir(name)
    ended = command("train", *FAST, *typed.get(what, []))
    assert ended.code == 1
    assert ended.err.startswith(f"error: {what}: ")
    assert "contains '${', which Hydra would replace by a value; use another name" in ended.err
