"""Multiruns: what they sweep, how jobs are named, how they end, and how they are resumed."""

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Ended, command, slow_but
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from test_readme import HANGS, environment

from mtl import cli
from mtl.cli import search, sweep
from mtl.cli.launch import register_resolvers
from mtl.runs.resume import locked
from mtl.training import checkpoint

SMALL = ["task=mnist_two_head", "trainer.max_epochs=1", "data.batch_size=500", "logger=[csv]"]


def jobs_of(ended: Ended) -> dict[str, dict]:
    """Returns each job's metrics.json, by job."""
    assert ended.run is not None
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(ended.run.parent.glob("*/metrics.json"))}


def differing(run: Path) -> list[str]:
    """Returns the options that are swept according to the run's HParams."""
    events = EventAccumulator(str(run))
    events.Reload()
    content = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/experiment"])
    return [each.name for each in content.experiment.hparam_infos if each.differs]


def config_of(*overrides: str) -> OmegaConf:
    with initialize_config_dir(cli.CONFIG_DIR, version_base=None):
        return compose("train", list(overrides))


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 9, 10, 40])
def test_sets_of_weights_sum_to_the_number_of_tasks(count: int) -> None:
    names = [f"t{index}" for index in range(count)]
    config = OmegaConf.create({"tasks": dict.fromkeys(names, 0), "hydra": {"overrides": {"task": []}}})
    points = [
        [each["weight"] for each in point.values()]
        for point in OmegaConf.to_container(OmegaConf.create(f"[{search.weight_grid(config)}]".replace(":", ": ")))
    ]
    assert [1.0] * count in points
    assert 9 <= len({tuple(point) for point in points}) == len(points) <= search.MOST_POINTS + 1
    for point in points:
        assert sum(point) == pytest.approx(count, rel=1e-4)
        assert min(point) > 0
    unequal = [point for point in points if point != [1.0] * count]
    assert all(len(set(point)) > 2 for point in unequal) or count <= 4
    assert len({max(range(count), key=point.__getitem__) for point in unequal}) > 1  # not one task alone is raised


def test_two_tasks_have_tenths() -> None:
    config = OmegaConf.create({"tasks": {"a": 0, "b": 0}, "hydra": {"overrides": {"task": []}}})
    assert search.weight_grid(config).split("},{")[:2] == [
        "{a:{weight:0.2},b:{weight:1.8}",
        "a:{weight:0.4},b:{weight:1.6}",
    ]


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["task=x", "optimizer.lr=0.001", "seed=0"], "7_lr-0.001_seed-0"),
        (["balancer=upgrad", "seed=2"], "7_balancer-upgrad_seed-2"),
        (["++tasks={digit:{weight:0.2},parity:{weight:1.8}}"], "7_digit-0.2_parity-1.8"),
        (["optimizer.lr=0.0037509772", "++tasks.parity.weight=6.07499"], "7_lr-0.003751_parity-6.075"),
        (["model.freeze=[trunk.conv1,trunk.conv2]"], "7_freeze-trunk.conv1-trunk.conv2"),
        (["task=x"], "7"),
        (["+trainer.monitor={sign/loss: min}"], "7_sign-loss-min"),
        (["seed=10001", "fill=-1", "optimizer.lr=1e5"], "7_seed-10001_fill--1_lr-1e05"),
        (["optimizer.lr=-0.0000123456", "model.name=a/b"], "7_lr--1.235e-05_name-a-b"),
    ],
)
def test_names_are_short_and_have_only_what_is_swept(overrides: list[str], name: str) -> None:
    assert sweep.Sweep(["task=x", "-m"], "new", fixed=["task=x"]).job_name(7, overrides) == name


@pytest.mark.parametrize(
    ("monitor", "way"),
    [
        ("null", "maximize"),
        ("{digit/accuracy: max}", "maximize"),
        ("{digit/loss: min, parity/loss: min}", "minimize"),
        ("{digit/loss: {mode: min, scale: 1.0}, parity/loss: {mode: min, scale: 2.0}}", "maximize"),
        ("{digit/loss: {mode: min, scale: 1.0}}", "minimize"),
    ],
)
def test_optuna_goes_the_way_of_the_monitor(monitor: str, way: str) -> None:
    config = OmegaConf.create(f"{{trainer: {{monitor: {monitor}}}, tasks: {{digit: 0, parity: 0}}}}")
    assert search.direction(config) == way


def test_only_trains_these_tasks(here: Path) -> None:
    ended = command("train", *SMALL, "only=parity", "trainer.monitor={digit/loss: min, parity/loss: min}")
    assert ended.code == 0, ended.err
    assert list(ended.metrics["test"]) == ["parity"]
    assert ended.metrics["best"]["monitor"] == "parity/loss (min)"
    same = command("train", *SMALL, "~tasks.digit", "trainer.monitor={parity/loss: min}")
    assert same.metrics["test"] == ended.metrics["test"]
    wrong = command("train", *SMALL, "only=partiy")
    assert wrong.code == 1
    assert "only: there is no task 'partiy'; did you mean 'parity'?" in wrong.err


def test_only_takes_up_again(here: Path) -> None:
    ended = command("train", *SMALL, "only=[parity]")
    (ended.run / "metrics.json").unlink()
    again = command("train", *SMALL, "only=[parity]", "resume=auto")
    assert again.code == 0, again.err
    assert "resume   from step 8" in again.out


def test_each_task_alone(here: Path) -> None:
    ended = command("train", *SMALL, "+sweep=single_task", "seed=0,1")
    assert ended.code == 0, ended.err
    found = {name: list(metrics["test"]) for name, metrics in jobs_of(ended).items()}
    assert found == {
        "0_only-digit_seed-0": ["digit"],
        "1_only-digit_seed-1": ["digit"],
        "2_only-parity_seed-0": ["parity"],
        "3_only-parity_seed-1": ["parity"],
    }
    alone = command("train", *SMALL, "only=parity", "seed=1")  # a job equals the same run by itself
    assert alone.metrics["test"] == jobs_of(ended)["3_only-parity_seed-1"]["test"]
    assert "+sweep" not in " ".join(jobs_of(ended)["0_only-digit_seed-0"]["arguments"])


def test_each_of_some_tasks_alone(here: Path) -> None:
    ended = command("train", *SMALL, "+sweep=single_task", "seed=0", "only=[parity, digit]")
    assert ended.code == 0, ended.err
    found = {name: list(metrics["test"]) for name, metrics in jobs_of(ended).items()}
    assert found == {"0_only-parity": ["parity"], "1_only-digit": ["digit"]}


def params_of(name: str, task: str) -> dict[str, str]:
    with initialize_config_dir(cli.CONFIG_DIR, version_base=None):
        register_resolvers(sweep.Sweep([], "new"))
        composed = compose("train", [f"task={task}", f"+sweep={name}"], return_hydra_config=True)
        assert composed.hydra.mode.name == "MULTIRUN"
        return dict(composed.hydra.sweeper.params)


@pytest.mark.parametrize("task", [path.stem for path in Path(cli.CONFIG_DIR, "task").glob("*.yaml")])
def test_sweeps_of_every_problem(task: str) -> None:
    names = list(config_of(f"task={task}").tasks)
    assert params_of("single_task", task) == {"only": ",".join(names), "seed": "0,1,2"}
    sets = params_of("weights", task)["++tasks"].count("{") / (len(names) + 1)
    assert sets.is_integer()
    assert sets >= 9


def test_weights_reach_the_tasks(here: Path) -> None:
    point = "{digit:{weight:0.2},parity:{weight:1.8}}"
    ended = command("train", "-m", *SMALL, f"++tasks={point},{{digit:{{weight:1}},parity:{{weight:1}}}}")
    assert ended.code == 0, ended.err
    first, second = [m["weight"] for m in jobs_of(ended).values()]
    assert first == pytest.approx({"digit": 0.2, "parity": 1.8})
    assert second == {"digit": 1.0, "parity": 1.0}


@pytest.mark.slow
def test_the_weights_of_a_sweep_reach_the_tasks_and_no_others_do(here: Path) -> None:
    ended = command("train", *SMALL, "+sweep=weights", "seed=0", "only=[digit,parity]")
    assert ended.code == 0, ended.err
    for path in here.glob("outputs/multirun/*/*/config.yaml"):
        tasks = OmegaConf.load(path).tasks
        weights = [tasks.digit.weight, tasks.parity.weight]
        assert path.parent.name.split("_", 1)[1] == f"digit-{weights[0]:g}_parity-{weights[1]:g}"
        assert sum(weights) == pytest.approx(2)
    assert len(jobs_of(ended)) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+sweep=weights", "tasks.digit.weight=2"], "sets the tasks' weights itself; leave tasks.digit.weight=2 out"),
        (["+sweep=weights", "tasks={digit: {weight: 3}}"], "sets the tasks' weights itself; leave tasks="),
        (["+sweep=weights", "tasks.digit={weight: 3}"], "sets the tasks' weights itself; leave tasks.digit="),
        (["model={büro: 1}"], "can't be read: quote values that aren't ASCII, as in 'model.inputs=[\"größe\"]'"),
        (["a=[1,"], "'a=[1,' can't be read: no viable alternative at input '[1,'; values are written key=value"),
        (["+sweep=weights", "only=digit"], "digit is the only task"),
        (["+sweep=weights", "only=nope"], "only: there is no task 'nope'"),
        (["+sweep=single_task", "only=[]"], "only is empty"),
        (["+sweep=single_task", "only=digits"], "did you mean 'digit'?"),
        (["sweep=weights"], "a sweep is added with a plus: +sweep=weights"),
        (["+sweep=balancer"], "sweep: there is no 'balancer'; did you mean 'balancers'?"),
        (["balancer=upgard"], "balancer: there is no 'upgard'; did you mean 'upgrad'?"),
        (["-m", "balancer=equal,upgard"], "balancer: there is no 'upgard'; did you mean 'upgrad'?"),
        (["-m", "seed=0,1", "hydra.sweep.dir=mine"], "hydra.sweep.dir: a multirun chooses its folders itself"),
        (["resume=nope", "-m", "seed=0,1"], "resume: 'nope' is not the folder of a multirun"),
        (["resume=nope"], "resume: 'nope' is not the folder of a run"),
    ],
)
def test_slips_are_told_in_a_sentence_before_any_job(here: Path, arguments: list[str], message: str) -> None:
    ended = command("train", *SMALL, *arguments)
    assert ended.code == 1
    assert message in ended.err
    assert len(ended.err.strip().splitlines()) == 2, ended.err
    assert "Launching" not in ended.out
    assert not list(here.glob("outputs/multirun/*"))


def test_all_balancers_are_swept(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names, from what the jobs are called; what each trains is tested elsewhere."""
    from hydra._internal.core_plugins import basic_launcher, basic_sweeper

    seen: list[list[str]] = []
    monkeypatch.setattr(basic_sweeper.BasicSweeper, "validate_batch_is_legal", lambda self, batch: seen.extend(batch))
    monkeypatch.setattr(basic_launcher.BasicLauncher, "launch", lambda *_, **__: [])
    command("train", *SMALL, "+sweep=balancers")
    swept = [{part.split("=")[0]: part.split("=")[1] for part in job} for job in seen]
    there = {path.stem for path in Path(cli.CONFIG_DIR, "balancer").glob("*.yaml")} - {"fixed", "torchjd"}
    assert {(job["balancer"], job["seed"]) for job in swept} == set(itertools.product(there, "012"))
    assert len(swept) == 3 * len(there)


def failing(folder: Path) -> list[str]:
    """Writes a callback that fails in the jobs of seed 1 unless a file exists; returns the arguments for it."""
    (folder / "fails.py").write_text(
        "import torch\nfrom pathlib import Path\n\nclass Fails:\n    def __call__(self, trainer, result):\n"
        "        if torch.initial_seed() == 1 and trainer.global_step == 3 and not Path('mended').exists():\n"
        "            raise RuntimeError('broken')\n"
    )
    return ["+callbacks.fails._target_=fails.Fails", "checkpoint.every_steps=2"]


@pytest.mark.parametrize("launcher", slow_but(["basic"], ["basic", "joblib"]))
def test_a_job_that_fails_stops_no_other_and_is_tried_again(here: Path, launcher: str) -> None:
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    arguments = ["-m", *SMALL, "seed=0,1,2", f"hydra/launcher={launcher}", *failing(here)]
    first = command("train", *arguments)
    assert first.code == 1
    states = [(m["status"], m.get("error")) for m in jobs_of(first).values()]
    assert [status for status, _ in states] == ["finished", "failed", "finished"]
    assert "callback Fails failed at step 3" in states[1][1]
    assert "1_seed-1                                 failed" in first.out
    before = jobs_of(first)

    (here / "mended").touch()
    again = command("train", *arguments, "resume=auto")
    assert again.code == 0, again.err
    assert len(list(here.glob("outputs/multirun/*/sweep.json"))) == 1
    after = {path.parent.name: json.loads(path.read_text()) for path in here.glob("outputs/multirun/*/*/metrics.json")}
    assert all(after[name] == before[name] for name in ("0_seed-0", "2_seed-2"))
    assert after["1_seed-1"]["status"] == "finished"
    alone = command("train", *SMALL, "seed=1")
    assert after["1_seed-1"]["test"] == alone.metrics["test"]  # it went on from step 3, with the same numbers
    if launcher == "basic":
        assert "resume   from step 3" in again.out
        assert again.out.count("is finished") == 2


@pytest.mark.slow
def test_names_and_options_are_of_what_is_swept_however_the_rest_is_spelt(here: Path) -> None:
    """Hydra spells values its own way: 1e-3 as 0.001, a space with a backslash; and mappings are replaced in three."""
    fixed = ["optimizer.lr=1e-3", "output_root=my runs", "trainer.monitor={digit/accuracy: max}"]
    ended = command("train", "-m", *SMALL[:-1], *fixed, "seed=range(0,2)", "trainer.clip_norm=null,1")
    assert ended.code == 0, ended.err
    (multirun,) = here.glob("my runs/multirun/*")
    names = ["0_seed-0_clip_norm-null", "1_seed-0_clip_norm-1", "2_seed-1_clip_norm-null", "3_seed-1_clip_norm-1"]
    assert sorted(path.parent.name for path in multirun.glob("*/metrics.json")) == names
    assert differing(multirun / names[1]) == ["seed", "trainer.clip_norm"]
    again = command(
        "train", "-m", *SMALL[:-1], *fixed, "seed=range(0,2)", "trainer.clip_norm=null,1", f"resume={multirun}"
    )
    assert again.code == 0, again.err
    assert again.out.count("is finished") == 4
    groups = ["optimizer.groups={trunk: {lr: 1e-4}},{trunk: {lr: 1e-3}}"]
    ended = command("train", "-m", *SMALL, *groups)
    assert list(jobs_of(ended)) == ["0_lr-0.0001", "1_lr-0.001"]


def test_a_job_whose_process_is_killed_stops_no_other(here: Path) -> None:
    """It has failed once it was killed by itself; the one that was under way beside it goes on."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (here / "dies.py").write_text(
        "import os, signal, time, torch\n"
        "from pathlib import Path\n\n"
        "def until(event):\n"
        "    while not event(): time.sleep(0.05)\n\n"
        "class Dies:\n"
        "    def __call__(self, trainer, result):\n"
        "        seed, waits = torch.initial_seed(), Path('waits')\n"
        "        if seed == 0 and trainer.global_step == 6 and not waits.exists():\n"
        "            until(lambda: list(Path('outputs').glob('**/0_seed-0/checkpoints/last.pt')))\n"
        "            waits.touch()\n"
        "            until(lambda: False)  # it is killed here, with the process of seed 1\n"
        "        if seed == 1 and trainer.global_step == 3:\n"
        "            until(waits.exists)\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    arguments = ["-m", *SMALL, "seed=0,1,2", "checkpoint.every_steps=2", "+callbacks.dies._target_=dies.Dies"]
    line = [sys.executable, "-m", "mtl.train", *arguments, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    ended = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=HANGS)
    assert ended.returncode == 1, ended.stderr
    found = {path.parent.name: json.loads(path.read_text()) for path in here.glob("outputs/multirun/*/*/metrics.json")}
    assert {name: metrics["status"] for name, metrics in found.items()} == {
        **{"0_seed-0": "finished", "1_seed-1": "failed", "2_seed-2": "finished"}
    }
    assert found["1_seed-1"]["error"] == "its process was killed; it may have run out of memory"
    assert "these jobs run again, one at a time: 0_seed-0, 1_seed-1" in ended.stdout
    assert "1_seed-1                                 failed" in ended.stdout
    assert found["0_seed-0"]["test"] == command("train", *SMALL, "seed=0").metrics["test"]


@pytest.mark.slow
def test_a_multirun_whose_folder_is_lost_has_failed(here: Path) -> None:
    """Its jobs are in other processes, and how they ended was noted there."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (here / "lost.py").write_text(
        "import shutil\n"
        "class Lost:\n"
        "    def __call__(self, trainer, result):\n"
        "        shutil.rmtree(trainer.writer.folder.parents[1], ignore_errors=True)\n"
    )
    arguments = ["-m", *SMALL, "seed=0,1", "+callbacks.lost._target_=lost.Lost", "hydra/launcher=joblib"]
    line = [sys.executable, "-m", "mtl.train", *arguments]
    ended = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=HANGS)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "no longer exists: it was deleted or moved while the run trained" in ended.stderr
    assert re.search(r"error: outputs/multirun/\S+ no longer exists, so how the jobs ended is unknown", ended.stderr)


def test_a_line_of_the_journal_that_was_cut_off_costs_only_itself(tmp_path: Path) -> None:
    multirun = sweep.Sweep([], "new")
    (tmp_path / "sweep").mkdir()
    multirun.note(tmp_path / "sweep/0_a", "done", 0.5)
    journal = tmp_path / "sweep/jobs.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"by": "new", "job": "1_b", "outc')  # the disk was full
    multirun.note(tmp_path / "sweep/2_c", "failed")
    multirun.note(tmp_path / "sweep/3_d", "done", 0.25)
    noted = multirun.noted(tmp_path / "sweep")
    assert {name: each["outcome"] for name, each in noted.items()} == {"0_a": "done", "2_c": "failed", "3_d": "done"}
    assert len(journal.read_text().splitlines()) == 4


RACE = """
import sys
from pathlib import Path
from mtl.cli import sweep
while not Path(sys.argv[1], "go").exists():
    pass
for number in range(300):
    (Path(sys.argv[1]) / sweep.ABOUT).unlink(missing_ok=True)
    sweep.Sweep(["a=1"], "new").begin(Path(sys.argv[1]) / "job")
"""


def test_jobs_that_begin_at_once_leave_each_other_in_peace(tmp_path: Path) -> None:
    """Whoever comes first writes what they all have in common."""
    line = [sys.executable, "-c", RACE, str(tmp_path)]
    racing = [subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    (tmp_path / "go").touch()
    for process in racing:
        _, errors = process.communicate(timeout=HANGS)
        assert process.returncode == 0, errors
    assert sweep.arguments(tmp_path) == ["a=1"]


def test_other_arguments_are_another_sweep(here: Path) -> None:
    first = command("train", "-m", *SMALL, "seed=0,1")
    other = command("train", "-m", *SMALL, "seed=0,1", "optimizer.lr=1e-3", "resume=auto")
    assert first.run.parent != other.run.parent
    named = command("train", "-m", *SMALL, "seed=0,1", "optimizer.lr=1e-3", f"resume={first.run.parent}")
    assert named.code == 1
    assert "was started with other arguments" in named.err
    wrong = command("train", "-m", *SMALL, "seed=0,1", "resume=outputs")
    assert "is not the folder of a multirun" in wrong.err
    same = command("train", "-m", *SMALL, "seed=0,1", f"resume={first.run.parent}", "log.every=7")
    assert same.code == 0, same.err
    assert same.out.count("is finished") == 2


def test_a_sweep_whose_config_has_changed_is_refused(here: Path) -> None:
    experiment = ["--config-dir", "mine", "experiment=lr"]
    own = here / "mine" / "experiment"
    own.mkdir(parents=True)
    (own / "lr.yaml").write_text("# @package _global_\noptimizer: {lr: 1e-3}\n")
    command("train", "-m", *experiment, *SMALL, "seed=0,1")
    (own / "lr.yaml").write_text("# @package _global_\noptimizer: {lr: 2e-3}\n")
    changed = command("train", "-m", *experiment, *SMALL, "seed=0,1", "resume=auto")
    assert changed.code == 1
    assert "optimizer.lr: was 0.001, is 0.002" in changed.err


@pytest.mark.slow
@pytest.mark.parametrize("ends", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_jobs_in_other_processes_stop_when_the_multirun_is_ended(here: Path, ends: signal.Signals) -> None:
    """Ctrl-C reaches them too, and SIGTERM to a group; whoever is killed tells nobody, and they notice."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    arguments = [
        "-m",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        *SMALL,
        "trainer.max_epochs=1000000",
        "seed=0,1",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "mtl.train", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while len(list(here.glob("outputs/multirun/*/*/checkpoints/last.pt"))) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    if ends == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, ends)
    out, _ = process.communicate(timeout=HANGS)
    states: list[str] = []
    end = time.monotonic() + HANGS
    while states != ["stopped", "stopped"] and time.monotonic() < end:  # whoever is killed doesn't wait for them
        time.sleep(0.2)
        states = [json.loads(path.read_text())["status"] for path in here.glob("outputs/multirun/*/*/metrics.json")]
    assert states == ["stopped", "stopped"]
    if ends != signal.SIGKILL:
        assert process.returncode == 128 + ends
        (multirun,) = here.glob("outputs/multirun/*")
        _, stopping, *mine = [line for line in out.splitlines() if "[HYDRA]" not in line]
        assert stopping.startswith("stopping")
        both = [["0_seed-0", "stopped"], ["1_seed-1", "stopped"]]
        assert sorted(line.split()[:2] for line in mine[:2]) == both
        assert [line.split()[:2] for line in mine[4:6]] == both
        again = f"resume    python -m mtl.train {shlex.join(arguments)} resume={multirun.relative_to(here)}"
        assert mine[6:] == ["", again]
        assert {path.name for path in multirun.iterdir()} == {
            *("0_seed-0", "1_seed-1", "jobs.jsonl", "multirun.yaml", "sweep.json")
        }


def test_a_job_that_another_process_is_at_is_not_called_failed(here: Path) -> None:
    first = command("train", "-m", *SMALL, "seed=0,1")
    assert first.run is not None
    (multirun,) = here.glob("outputs/multirun/*")
    (multirun / "0_seed-0" / "metrics.json").unlink()
    with locked(multirun / "0_seed-0") as free:
        assert free
        ended = command("train", "-m", *SMALL, "seed=0,1", "resume=auto")
    assert ended.code == 1
    assert "0_seed-0                                 busy" in ended.out
    assert "1_seed-1                                 done" in ended.out
    assert ended.out.count("0_seed-0 ") == 1  # and what the first process noted isn't listed again


@pytest.mark.parametrize("ends", slow_but([signal.SIGKILL], [signal.SIGTERM, signal.SIGKILL]))
def test_an_interrupted_multirun_is_taken_up(here: Path, ends: signal.Signals) -> None:
    """The first job finished, the second is killed within; afterwards all is as if nothing had been."""
    (here / "slow.py").write_text(
        "import time\nfrom pathlib import Path\n\n"
        "class Slow:\n"
        "    def __call__(self, trainer, result):\n"
        "        if trainer.global_step == 5 and Path('outputs/half').exists():\n"
        "            while not trainer._agree.stop.signal and not Path('outputs/interrupted').exists():\n"
        "                time.sleep(0.05)\n"
        "        if trainer.global_step == 5:\n"
        "            Path('outputs/half').touch()\n"
    )
    arguments = ["-m", *SMALL, "seed=0,1,2", "checkpoint.every_steps=2", "+callbacks.slow._target_=slow.Slow"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mtl.train", *arguments], env=environment(), stdout=subprocess.PIPE, text=True
    )
    while not list(here.glob("outputs/multirun/*/1_seed-1/checkpoints/last.pt")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(ends)
    out, _ = process.communicate(timeout=HANGS)
    (here / "outputs/interrupted").touch()
    (multirun,) = here.glob("outputs/multirun/*")
    assert not (multirun / "2_seed-2").exists()
    if ends == signal.SIGTERM:
        assert process.returncode == 143
        assert (
            f"resume    python -m mtl.train {' '.join(arguments)} resume={multirun.relative_to(here)}"
            in out.replace("'", "")
        )
    again = command("train", *arguments, "resume=auto")
    assert again.code == 0, again.err
    assert again.out.count("is finished") == 1
    assert "resume   from step" in again.out
    after = {path.parent.name: json.loads(path.read_text()) for path in sorted(multirun.glob("*/metrics.json"))}
    assert list(after) == ["0_seed-0", "1_seed-1", "2_seed-2"]
    whole = jobs_of(command("train", "-m", *SMALL, "seed=0,1,2"))
    assert {name: m["test"] for name, m in after.items()} == {name: m["test"] for name, m in whole.items()}


@pytest.mark.slow
def test_optuna_searches_and_goes_on(here: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    arguments = [*SMALL, "+sweep=optuna", "hydra.sweeper.n_trials=3"]
    first = command("train", *arguments)
    assert first.code == 0, first.err
    names = list(jobs_of(first))
    rates = [float(metrics["arguments"][0].split("=")[1]) for metrics in jobs_of(first).values()]
    assert all(5e-4 <= rate <= 5e-2 for rate in rates)
    assert len(set(rates)) == 3
    best = OmegaConf.load(first.run.parent / "optimization_results.yaml")
    values = [metrics["best"]["value"] for metrics in jobs_of(first).values()]
    assert best.best_value == max(values)
    assert best.best_params["optimizer.lr"] == rates[values.index(max(values))]

    (first.run.parent / names[1] / "metrics.json").unlink()  # as if it had been killed at its end
    again = command("train", *arguments, "resume=auto")
    assert again.code == 0, again.err
    assert list(jobs_of(first)) == names  # the same trials
    assert again.out.count("is finished") == 2


def test_a_trial_that_fails_stops_no_other(here: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    arguments = [*SMALL, "+sweep=optuna", "hydra.sweeper.n_trials=4", "optimizer.lr=choice(-1,0.001)"]
    ended = command("train", *arguments)
    states = [m["status"] for m in jobs_of(ended).values()]
    assert set(states) == {"finished", "failed"}
    assert len(states) == 4
    assert OmegaConf.load(ended.run.parent / "optimization_results.yaml").best_params["optimizer.lr"] == 0.001
    assert ended.code == 1


def test_optuna_and_a_monitor_that_goes_down(here: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    small = [a for a in SMALL if "task" not in a]
    wrong = command(
        "train",
        "task=mnist_reconstruct",
        *small,
        "trainer.monitor=null",
        "only=redrawn",
        "+sweep=optuna",
        "hydra.sweeper.n_trials=2",
    )
    assert wrong.code == 1
    assert "hydra.sweeper.direction=minimize" in wrong.err


LAUNCHERS = {
    "basic": ["threads=2,1"],
    "joblib": ["threads=2,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit": ["threads=2,1", "hydra/launcher=submitit_local"],
    "ray": ["threads=2,1", "hydra/launcher=ray"],
    "optuna": ["threads=2", "+sweep=optuna", "hydra.sweeper.n_trials=2"],
}


@pytest.mark.parametrize("launcher", slow_but(["basic", "joblib"], LAUNCHERS))
def test_a_job_has_the_bits_of_the_same_run_alone(here: Path, launcher: str) -> None:
    """Sums that are split among threads are others; a launcher gives its jobs threads of its own choice."""
    kind = "sweeper" if launcher == "optuna" else "launcher"
    if launcher != "basic":
        pytest.importorskip(f"hydra_plugins.hydra_{launcher}_{kind}")
    free = {key: value for key, value in environment().items() if key != "OMP_NUM_THREADS"}
    line = [sys.executable, "-m", "mtl.train", "-m", *SMALL, *LAUNCHERS[launcher]]
    done = subprocess.run(line, env=free, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    assert "2 jobs in outputs/multirun/" in done.stdout
    jobs = sorted(here.glob("outputs/multirun/*/*/metrics.json"))
    assert len(jobs) == 2
    before = torch.get_num_threads()
    for path in jobs:
        metrics = json.loads(path.read_text())
        alone = command("train", *metrics["arguments"])
        assert torch.get_num_threads() == before
        assert alone.metrics["test"] == metrics["test"]
        mine, other = (checkpoint.load(run / "checkpoints/best.pt") for run in (path.parent, alone.run))
        assert mine["versions"]["threads"] == other["versions"]["threads"] == mine["config"]["threads"]
        assert all(torch.equal(value, other["model"][name]) for name, value in mine["model"].items())
    assert [OmegaConf.load(path.parent / "config.yaml").threads for path in jobs] == (
        [2, 2] if launcher == "optuna" else [2, 1]
    )


@pytest.mark.parametrize("name", ["joblib", "ray", "submitit_slurm", "submitit_local"])
def test_launchers_compose(name: str) -> None:
    plugin = name.split("_")[0]
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    with initialize_config_dir(cli.CONFIG_DIR, version_base=None):
        register_resolvers(sweep.Sweep([], "new"))
        composed = compose(
            "train", ["task=mnist_two_head", "+sweep=balancers", f"hydra/launcher={name}"], return_hydra_config=True
        )
    assert plugin in composed.hydra.launcher._target_


def test_a_plugin_that_is_missing(here: Path) -> None:
    """Plugins are looked for where python looks for modules, and this one finds none."""
    look = (
        "import sys; sys.modules['hydra_plugins'] = type(sys)('hydra_plugins'); sys.modules['hydra_plugins'].__path__ = []\n"
        "import runpy; runpy.run_module('mtl.train', run_name='__main__')"
    )
    for wanted, extra in [
        ("hydra/launcher=joblib", "joblib"),
        ("hydra/launcher=submitit_slurm", "slurm"),
        ("+sweep=optuna", "optuna"),
    ]:
        line = [sys.executable, "-c", look, "-m", *SMALL, "seed=0,1", wanted]
        done = subprocess.run(line, env=environment(), capture_output=True, text=True)
        assert done.returncode == 1
        assert f'pip install "mtl-train[{extra}]"' in done.stderr
        assert "Traceback" not in done.stderr
