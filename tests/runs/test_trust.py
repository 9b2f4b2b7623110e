"""Runs of somebody else: the code that their configs may name, and that no other code is run or imported."""

import copy
import importlib.util
import inspect
import os
import subprocess
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, command
from torch import nn

import mtl
from mtl.runs.listed import listed
from mtl.runs.trust import Own, check
from mtl.training import checkpoint

PACKAGES = ("mtl", "torch", "torchvision", "torchmetrics")
CONFIG: dict[str, Any] = {
    "threads": 1,
    "init_from": None,
    "device": "cpu",
    "trainer": {},
    "data": {"_target_": "mtl.data.mnist"},
    "model": {
        "_target_": "mtl.MultiTaskModel",
        "trunk": {"_target_": "mtl.trunks.MLP", "in_features": 3, "widths": [4]},
        "inputs": ["x"],
    },
    "tasks": {
        "a": {
            "target": "a",
            "head": {"_target_": "mtl.heads.Linear", "in_features": 4, "out_features": 2},
            "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
            "metrics": {"accuracy": {"_target_": "torchmetrics.classification.MulticlassAccuracy", "num_classes": 2}},
            "weight": 1.0,
        }
    },
}
MINE = """
import functools, os, subprocess, torch
from subprocess import run as execute
with open({canary!r}, "a") as file:
    file.write("imported ")
system = os.system
later = functools.partial(os.system)
class Head(torch.nn.Linear):
    pass
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder; modules that are imported from it are forgotten afterwards."""
    before = set(sys.modules)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    yield tmp_path / "project"
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__path__", getattr(sys.modules[name], "__file__", ""))):
            del sys.modules[name]


def written(run: Path, config: Any = CONFIG, **more: Any) -> Path:
    """Writes a run's folder with a checkpoint of this config; the parameters are those of CONFIG's model."""
    model = mtl.MultiTaskModel(
        mtl.trunks.MLP(3, widths=[4]),
        [mtl.Task("a", head=mtl.heads.Linear(4, 2), loss=nn.CrossEntropyLoss(), target="a")],
        inputs=["x"],
    )
    state = {"config": config, "code_folders": [], "model": model.state_dict(), "facts": {}, "versions": {"threads": 1}}
    run.mkdir(parents=True, exist_ok=True)
    checkpoint.save(run / "checkpoints" / "best.pt", state | more)
    return run


def changed(where: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    *path, last = where.split(".")
    node = config
    for key in path:
        node = node[key]
    node[last] = value
    return config


# What is listed.


FUNCTIONS_OF_MTL = {
    *(f"mtl.data.{name}" for name in ("celeba", "cifar100", "datasets", "image_table", "made_ctr", "mnist", "table")),
    *("mtl.data.aliccp", "mtl.data.movielens"),
    *(f"mtl.data.{name}" for name in ("cityscapes", "dense", "multi_mnist", "nyuv2", "office_domain", "pets")),
    *("mtl.data.collate_graphs", "mtl.data.qm9", "mtl.data.taskonomy"),
    *(f"mtl.problems.burgers.{name}" for name in ("boundary", "exact", "initial", "residual")),
    *(f"mtl.problems.burgers.{name}_points" for name in ("boundary", "initial", "interior")),
    *("mtl.model.match", "mtl.schedulers.warmup", "mtl.schedulers.warmup_cosine", "mtl.schedulers.warmup_linear"),
}


def test_what_is_listed_is_of_the_packages_and_builds_or_computes() -> None:
    counts = {package: len(listed(package)) for package in PACKAGES}
    assert counts["mtl"] > 60
    assert min(counts["torch"], counts["torchvision"], counts["torchmetrics"]) > 150
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Dataset

    from mtl.balancers import Balancer

    for package in PACKAGES:
        for name, value in listed(package).items():
            assert name.startswith(f"{package}.")
            home = value.__module__ or ""
            assert home.split(".")[0] in PACKAGES, name
            if package == "mtl":
                what = (
                    nn.Module
                    | Optimizer
                    | Balancer
                    | Dataset
                    | LRScheduler
                    | mtl.Schedule
                    | mtl.data.Splits
                    | mtl.data.Sources
                )
                loaders = (mtl.data.Loader, mtl.data.Mix)
                is_class = isinstance(value, type) and (issubclass(value, what) or value in loaders)
                assert is_class or name in FUNCTIONS_OF_MTL, name
                continue
            if name in ("torchvision.transforms.Compose", "torchvision.transforms.PILToTensor"):
                continue
            if isinstance(value, type):
                assert issubclass(value, nn.Module | Optimizer | LRScheduler) or name.endswith("ToTensor"), name
            else:
                assert inspect.isroutine(value), name
                assert name.startswith(("torch.nn.functional.", "torchvision.models.", "torchvision.ops.")) or name in {
                    *("torch.relu", "torch.sigmoid", "torch.softmax", "torch.tanh", "torch.tensor")
                }


def test_the_configs_name_only_what_is_listed() -> None:
    """All that mtl's own problems are made of can be loaded without being asked, what the loggers write left out."""
    names = set()
    for path in (ROOT / "configs").glob("**/*.yaml"):
        if path.parent.name != "logger":
            words = path.read_text().replace(",", " ").replace("}", " ").split()
            names |= {word for before, word in zip(words, words[1:], strict=False) if before.endswith("_target_:")}
    names = {name for name in names if name.split(".")[0] in PACKAGES}
    assert len(names) > 80
    everything = {name for package in PACKAGES for name in listed(package)}
    assert names - everything == set()


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
watched: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if watched is None:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
    if writes or event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class"):
        watched.append(f"{event} {arguments}")
    if event.startswith(
        ("ctypes.", "socket.", "shutil.", "os.remove", "os.rename", "os.mkdir", "os.symlink", "urllib")
    ):
        watched.append(f"{event} {arguments}")


def test_nothing_that_is_listed_runs_or_writes_what_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is called with code, with files and with small numbers in all places; Python's audit events tell."""
    global watched
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    code = f"__import__('os').system('touch {canary}')"
    torch.save({"x": torch.zeros(1)}, tmp_path / "state.pt")
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    everything = [(name, value) for package in PACKAGES for name, value in listed(package).items()]
    for name, value in everything:  # what they import when they are called first, compiled files too
        importlib.import_module(value.__module__ or name.rpartition(".")[0])
    sys.addaudithook(_audit)
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    builds_networks = ("torchvision.models.", "mtl.data.")
    calls = 0
    watched = []
    try:
        for name, value in everything:
            if name.startswith(builds_networks) and not isinstance(value, type):
                continue  # below
            for given in ([code], [str(canary)], [code, code], [2, code], [str(tmp_path)], [[code], {code: code}]):
                calls += 1
                built = [None]
                fails(lambda value, *given, built=built: built.__setitem__(0, value(*given)), value, *given)
                if callable(built[0]):
                    fails(built[0], code)
                    fails(built[0], torch.zeros(2, 2))
        for name in ("torchvision.models.resnet18", "torchvision.models.squeezenet1_0"):
            for word in ("weights", "norm_layer"):
                assert fails(listed("torchvision")[name], **{word: code})
        for name in [name for name in listed("mtl") if name.startswith("mtl.data.") and "root" in _parameters(name)]:
            options = {"download": False} if "download" in _parameters(name) else {}
            options |= {"source": "torchvision"} if "source" in _parameters(name) else {}
            options |= {"domain": "x"} if "domain" in _parameters(name) else {}
            assert fails(listed("mtl")[name], root=str(tmp_path), **options)
        events = list(watched)
    finally:
        watched = None
    assert calls > 4000
    assert events == []
    assert sorted(tmp_path.iterdir()) == before


def fails(call: Callable[..., Any], *given: Any, **named: Any) -> bool:
    try:
        call(*given, **named)
    except Exception:
        return True
    return False


def _parameters(name: str) -> set[str]:
    return set(inspect.signature(listed("mtl")[name]).parameters)


# What is refused.

DANGEROUS = (
    *("builtins.eval", "builtins.exec", "builtins.open", "builtins.__import__", "builtins.getattr", "builtins.slice"),
    *("os.system", "os.remove", "posix.system", "nt.system", "subprocess.run", "subprocess.Popen", "shutil.rmtree"),
    *("importlib.import_module", "runpy.run_path", "code.interact", "pdb.run", "timeit.timeit", "webbrowser.open"),
    *("functools.partial", "functools.reduce", "operator.methodcaller", "operator.attrgetter", "types.FunctionType"),
    *("pickle.loads", "pickle.load", "marshal.loads", "shelve.open", "numpy.load", "pandas.read_pickle", "joblib.load"),
    *("torch.load", "torch.save", "torch.hub.load", "torch.compile", "torch.jit.load", "torch.serialization.load"),
    *("torch.utils.cpp_extension.load", "torch.utils.cpp_extension.load_inline", "torch.ops.load_library"),
    *("torch.utils.data.DataLoader", "torch.package.PackageImporter", "torch.classes.load_library", "torch._inductor"),
    *("torch._dynamo.optimize", "torch.export.load", "torch.onnx.export", "torch.distributed.run.main", "torch.fx"),
    *("torch.os.system", "torch.nn.modules.module.torch.hub.load", "torch.nn.functional.importlib.import_module"),
    *("torch.nn.functional.torch.load", "torch.nn.modules.module.functools.partial", "torch.optim.optimizer.os.system"),
    *("torch.nn.Module.__init__.__globals__.get", "torch.nn.Linear.__class__", "torch.nn.Module.__subclasses__"),
    *("torch.nn.Module.load_state_dict", "torch.nn.Module.apply", "torch.nn.Linear.mro", "torch.nn.init.torch.load"),
    *(
        "torch.nn.functional.boolean_dispatch",
        "torch.nn.functional.handle_torch_function",
        "torch.nn.utils.parametrize",
    ),
    *("torchvision.io.write_file", "torchvision.utils.save_image", "torchvision.datasets.utils.extract_archive"),
    *(
        "torchvision.datasets.utils.download_url",
        "torchvision.datasets.CIFAR10",
        "torchvision.datasets.folder.os.remove",
    ),
    *("torchvision.models.get_model", "torchvision.models.get_weight", "torchvision.models._api.inspect.os.system"),
    *("torchvision.os.remove", "torchvision.extension.ctypes.CDLL", "torchvision.set_image_backend"),
    *("torchmetrics.text.BERTScore", "torchmetrics.image.FrechetInceptionDistance", "torchmetrics.audio.os.system"),
    *("torchmetrics.multimodal.CLIPScore", "torchmetrics.metric.functools.partial", "torchmetrics.metric.torch.load"),
    *(
        "mtl.load",
        "mtl.config.targets.make",
        "mtl.config.targets.find",
        "mtl.runs.loading.load",
        "mtl.training.checkpoint.save",
        "mtl.train.train",
    ),
    *(
        "mtl.runs.trust.check",
        "mtl.cli.record.sys.exit",
        "mtl.files.write_whole",
        "mtl.runs.resume.os.remove",
        "mtl.report.report",
    ),
    *("mtl.trunks.torch.load", "mtl.trunks.weights.torch.load", "mtl.data.mnist.os.system", "mtl.data.cells.Path"),
    *("mtl.data.cifar100.pickle.load", "mtl.loggers.CsvLogger", "mtl.Task.__init__", "mtl.__main__", "mtl.cli.launch"),
    *("transformers.AutoModel.from_pretrained", "datasets.load_dataset", "torchjd.aggregation.UPGrad", "hydra.main"),
    *("antigravity.x", "this.s", "__main__.__init__", "numpy.ndarray", "yaml.unsafe_load", "rich.print"),
)


@pytest.mark.parametrize("target", DANGEROUS)
def test_other_names_are_refused_without_being_imported(here: Path, target: str) -> None:
    before = set(sys.modules)
    with pytest.raises(mtl.UserError) as error:
        check({"tasks": {"a": {"_target_": target}}}, own=Own(here / "outputs" / "run", [here]), trust=False)
    package = target.split(".")[0]
    assert package in PACKAGES or not {name for name in set(sys.modules) - before if name.split(".")[0] == package}
    installed = package in sys.modules or importlib.util.find_spec(package) is not None
    assert (f"tasks.a: {target}" if installed else f"there is no module '{package}'") in str(error.value)


@pytest.mark.parametrize(
    "target", ["", ".", "a..b", "torch.nn.Linear ", "torch.nn.Linear()", 3, None, ["os.system"], {"a": 1}]
)
def test_what_is_no_name_is_refused(here: Path, target: Any) -> None:
    with pytest.raises(mtl.UserError, match=r"isn't trusted"):
        check({"a": {"_target_": target}}, own=Own(here, [here]), trust=["torch"])


PLACES = {
    "an argument of a head": "tasks.a.head.in_features",
    "a head": "tasks.a.head",
    "a loss": "tasks.a.loss",
    "an objective": "tasks.a.objective",
    "a weight": "tasks.a.weight",
    "a count": "tasks.a.count",
    "a metric": "tasks.a.metrics.accuracy",
    "a metric's argument": "tasks.a.metrics.accuracy.num_classes",
    "a key of no meaning": "tasks.a.head.nothing",
    "a trunk": "model.trunk",
    "an argument of a trunk": "model.trunk.widths",
    "a key of the model": "model.more",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "shape",
    [lambda n: n, lambda n: [n], lambda n: {"x": [{"y": n}]}, lambda n: {"_target_": "torch.nn.ReLU", "_args_": [n]}],
)
def test_no_place_of_a_run_runs_code(here: Path, place: str, shape: Callable[[Any], Any]) -> None:
    canary = here / "canary"
    call = {"_target_": "builtins.eval", "_args_": [f"open({str(canary)!r}, 'w').close() or 4"]}
    run = written(here / "outputs" / "run", changed(PLACES[place], shape(call)))
    with pytest.raises(mtl.UserError) as error:
        mtl.load(run)
    assert not canary.exists()
    if "config.model.trunk" in str(error.value):
        return  # it is no trunk at all
    assert "builtins.eval" in str(error.value)
    assert "trust=[" not in str(error.value)
    assert "doesn't need Python's standard library" in str(error.value)
    assert PLACES[place] in str(error.value)
    assert not canary.exists()


def test_a_partial_call_and_an_interpolation_run_nothing(here: Path) -> None:
    canary = here / "canary"
    code = f"open({str(canary)!r}, 'w').close() or 4"
    for value in (
        {"_target_": "builtins.eval", "_args_": [code], "_partial_": True},
        {"_target_": "functools.partial", "_args_": [{"_target_": "builtins.eval", "_partial_": True}, code]},
        {"_target_": "torchvision.transforms.Lambda", "lambd": {"_target_": "builtins.eval", "_partial_": True}},
        "${oc.create:{_target_:builtins.eval}}",
        "${oc.env:HOME}",
    ):
        run = written(here / "outputs" / "run", changed("tasks.a.head.in_features", value))
        with pytest.raises(mtl.UserError, match=r"isn't trusted|no interpolations"):
            mtl.load(run)
    assert not canary.exists()


# Whose files may be imported.


def evil(folder: Path, canary: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evil_code.py").write_text(MINE.format(canary=str(canary)))
    (folder / "evil_package").mkdir()
    (folder / "evil_package" / "__init__.py").write_text(MINE.format(canary=str(canary)))
    return folder


HEAD = {"in_features": 4, "out_features": 2}


@pytest.mark.parametrize("target", ["evil_code.Head", "evil_package.Head"])
@pytest.mark.parametrize("named", ["the run", "beside the run", "relative", "elsewhere"])
def test_folders_that_a_checkpoint_names_are_not_searched(here: Path, target: str, named: str) -> None:
    canary = here.parent / "canary"
    run = here / "downloads" / "paper" / "run"
    folder = {"the run": run, "relative": run, "beside the run": run.parent, "elsewhere": here.parent / "lib"}[named]
    evil(folder, canary)
    written(
        run,
        changed("tasks.a.head", {"_target_": target, **HEAD}),
        code_folders=[os.path.relpath(folder) if named == "relative" else str(folder)],
    )
    with pytest.raises(mtl.UserError, match=r"there is no module 'evil"):
        mtl.load(run)
    evaluated = command("evaluate", f"run={run}")
    assert evaluated.code == 1
    assert "there is no module 'evil" in evaluated.err
    assert not canary.exists()


@pytest.mark.parametrize(
    "target",
    [
        *("downloads.paper.run.evil_code.Head", "downloads.paper.run.evil_package.Head"),
        *("downloads.paper.evil_code.Head", "downloads.paper.evil_code", "downloads.paper.evil_package"),
        "downloads.paper.evil_package.evil_code.Head",
    ],
)
def test_what_lies_beside_a_run_in_the_project_is_not_imported(here: Path, target: str) -> None:
    canary = here.parent / "canary"
    run = here / "downloads" / "paper" / "run"
    for folder in (run, run.parent):
        evil(folder, canary)
    written(run, changed("tasks.a.head", {"_target_": target, **HEAD}))
    with pytest.raises(mtl.UserError, match=r"isn't trusted"):
        mtl.load(run)
    assert not canary.exists()


def test_in_a_folder_of_the_run_nothing_there_is_ones_own(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = here.parent / "canary"
    run = written(here / "run", changed("tasks.a.head", {"_target_": "evil_code.Head", **HEAD}))
    evil(run / "inner", canary)
    evil(run, canary)
    for folder in (run, run / "inner"):
        monkeypatch.chdir(folder)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            with pytest.raises(mtl.UserError, match=r"isn't trusted"):
                mtl.load(run)
    assert not canary.exists()


def test_ones_own_code_is_used_as_before(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = here.parent / "canary"
    evil(here, canary)
    evil(here / "mine" / "inner", canary)
    sample = {"x": torch.ones(2, 3)}
    for target, folders in {
        "evil_code.Head": [],
        "evil_package.Head": [str(here)],
        "mine.inner.evil_code.Head": [],
    }.items():
        run = written(
            here / "outputs" / "own" / "run",
            changed("tasks.a.head", {"_target_": target, **HEAD}),
            code_folders=folders,
        )
        assert mtl.load(run)(sample)["a"].shape == (2, 2)
    assert canary.read_text() == "imported imported imported "
    (here / "mine" / "lone.py").write_text(MINE.format(canary=str(canary)))
    run = written(run, changed("tasks.a.head", {"_target_": "lone.Head", **HEAD}), code_folders=[str(here / "mine")])
    assert mtl.load(run)(sample)["a"].shape == (2, 2)  # --config-dir mine of the training, in the current folder


@pytest.mark.parametrize(
    "name",
    ["os.system", "subprocess.run", "execute", "system", "later", "torch.load", "functools.partial", "torch.os.system"],
)
def test_ones_own_module_is_no_way_into_another(here: Path, name: str) -> None:
    evil(here, here.parent / "canary")
    run = written(
        here / "outputs" / "run", changed("tasks.a.head", {"_target_": f"evil_code.{name}", "_args_": ["true"]})
    )
    with pytest.raises(mtl.UserError, match=r"isn't trusted"):
        mtl.load(run)


def test_installed_packages_in_the_project_are_not_ones_own(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(sys.prefix))  # a virtual environment that lies in the project
    assert "yaml" in sys.modules
    for folder in (".venv/lib/python3/site-packages", "lib/dist-packages", ".tox/lib"):
        (here / folder).mkdir(parents=True)
        (here / folder / "dill_like.py").write_text("def loads(text):\n    exec(text)\n")
    for target in ("yaml.unsafe_load", "dill_like.loads"):
        for project in (Path.cwd(), here):
            own = Own(here / "outputs" / "run", [project])
            hints = [
                str(here / ".venv/lib/python3/site-packages"),
                str(here / "lib/dist-packages"),
                str(here / ".tox/lib"),
            ]
            assert own.hints(hints) == []
            with pytest.raises(mtl.UserError, match=r"isn't trusted|there is no module 'dill_like'"):
                check({"a": {"_target_": target}}, own=own, trust=())
    sys.path.append(str(here / "lib/dist-packages"))
    with pytest.raises(mtl.UserError, match=r"isn't trusted"):
        check({"a": {"_target_": "dill_like.loads"}}, own=Own(here / "outputs" / "run", [here]), trust=())


# What trust allows.


def test_trust(here: Path) -> None:
    lib = evil(here.parent / "lib", here.parent / "canary")
    config = changed("tasks.a.head", {"_target_": "evil_code.Head", **HEAD})
    config["tasks"]["a"]["weight"] = {"_target_": "builtins.float", "_args_": ["2"]}
    run = written(here / "outputs" / "run", config, code_folders=[str(lib)])
    sample = {"x": torch.ones(2, 3)}
    assert mtl.load(run, trust=True)(sample)["a"].shape == (2, 2)
    sys.path.append(str(lib))
    del sys.modules["evil_code"]
    for trust in (["evil_code", "builtins"], ["evil_code.Head", "builtins.float"], ("builtins", "evil_code")):
        assert mtl.load(run, trust=trust)(sample)["a"].shape == (2, 2)
    for trust, missing in {
        ("evil_code",): "builtins.float",
        ("evil_code", "builtins.floa"): "builtins.float",
        ("evil_code", "float"): "builtins.float",
    }.items():
        with pytest.raises(mtl.UserError, match=rf"weight: {missing}"):
            mtl.load(run, trust=trust)
    with pytest.raises(mtl.UserError, match=r"trust=\[evil_code.Head\]"):
        mtl.load(run, trust=["builtins"])
    assert mtl.load(run, trust=["evil_code.Head", "builtins"])
    for wrong in (["evil code"], [3], ["__main__"], ["a..b"], "no-name"):
        with pytest.raises(mtl.UserError, match="is not the name of a module"):
            mtl.load(run, trust=wrong)


def test_where_the_code_of_a_run_was_is_told_and_how_to_name_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is given a run, and its code elsewhere, reads what to do; each piece of the advice works."""
    theirs = here.parent / "their code, [1]"
    theirs.mkdir()
    (theirs / "given.py").write_text("import torch\nclass Head(torch.nn.Linear): pass\n")
    config = changed("tasks.a.head", {"_target_": "given.Head", **HEAD})
    run = written(here / "outputs" / "run", config, code_folders=[str(theirs), 3, str(here)])
    for trust in ((), ["given"]):
        with pytest.raises(mtl.UserError, match="there is no module 'given'") as error:
            mtl.load(run, trust=trust)
        assert f"The run's own code was in {str(theirs)!r}. Name the folder of its code with" in str(error.value)
    assert f"own code was in {str(theirs)!r}" in command("evaluate", f"run={run}").err
    lost = written(here / "outputs" / "lost", config, code_folders=[])
    with pytest.raises(mtl.UserError, match="there is no module 'given'") as error:
        mtl.load(lost, trust=True)
    assert "own code was in" not in str(error.value)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(theirs)])
        assert type(mtl.load(run, trust=["given"]).heads["a"]).__name__ == "Head"
    del sys.modules["given"]
    assert type(mtl.load(run, trust=True).heads["a"]).__name__ == "Head"


def test_a_trusted_module_is_no_way_into_another(here: Path) -> None:
    evil(here.parent / "lib", here.parent / "canary")
    sys.path.append(str(here.parent / "lib"))
    for name in ("os.system", "execute", "system", "later"):
        with pytest.raises(mtl.UserError, match=r"isn't trusted"):
            check({"a": {"_target_": f"evil_code.{name}"}}, own=Own(here / "outputs/run", [here]), trust=["evil_code"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ended = command("train", "task=mnist_two_head", "trainer.max_epochs=1", "data.batch_size=500")
    assert ended.run is not None, ended.err
    return folder / ended.run


def tampered(trained: Path, run: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    state = torch.load(trained / "checkpoints" / "best.pt", weights_only=True)
    change(state["config"])
    (run / "checkpoints").mkdir(parents=True)
    torch.save(state, run / "checkpoints" / "best.pt")
    torch.save(state, run / "checkpoints" / "last.pt")
    (run / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    return run


def test_evaluation_runs_no_code_of_the_run(here: Path, trained: Path) -> None:
    canary = here.parent / "canary"
    code = f"open({str(canary)!r}, 'w').close() or 0"

    def change(config: dict[str, Any]) -> None:
        config["data"]["root"] = {"_target_": "builtins.eval", "_args_": [code]}

    run = tampered(trained, here / "outputs" / "run", change)
    refused = command("evaluate", f"run={run}")
    assert refused.code == 1
    assert "data.root: builtins.eval" in refused.err
    assert not canary.exists()
    other = command("evaluate", f"run={run}", "data=mnist")  # the user's own data: the run's aren't built
    assert other.code == 0, other.err
    command("evaluate", f"run={run}", "trust=[builtins]")
    assert canary.exists()
    wrong = command("evaluate", f"run={run}", "trust=3")
    assert (wrong.code, "trust" in wrong.err) == (1, True)


def test_starting_from_a_run_and_going_on_with_one_build_nothing_that_it_names(here: Path, trained: Path) -> None:
    canary = here.parent / "canary"
    code = f"open({str(canary)!r}, 'w').close() or 20"

    def change(config: dict[str, Any]) -> None:
        for node in (config["tasks"]["digit"]["head"], config["model"]["trunk"], config["data"], config["optimizer"]):
            node["more"] = {"_target_": "builtins.eval", "_args_": [code]}
        config["callbacks"] = {"x": {"_target_": "builtins.eval", "_args_": [code]}}

    run = tampered(trained, here / "outputs" / "run", change)
    fast = ["task=mnist_two_head", "trainer.max_epochs=1", "data.batch_size=500"]
    begun = command("train", *fast, f"init_from={run}")
    assert begun.code == 0, begun.err
    command("train", *fast, f"resume={run}", "trainer.max_epochs=2")
    assert not canary.exists()


def test_evaluation_of_a_strangers_run_downloads_nothing(here: Path, trained: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["data"] |= {"source": "torchvision", "root": str(here.parent / "outside")}

    run = tampered(trained, here / "outputs" / "run", change)
    refused = command("evaluate", f"run={run}")
    assert refused.code == 1
    assert "data.download is false" in refused.err
    assert not (here.parent / "outside").exists()


def test_the_documentation_lists_what_is_allowed() -> None:
    from mtl.runs import listed as lists

    text = (ROOT / "docs" / "safety.md").read_text()
    for module in (*lists._CLASSES, *lists._FUNCTIONS, *lists._EXPORTED, *lists._DEFINED):
        assert f"`{module}`" in text, module
    for module, names in lists._NAMES.items():
        for name in names:
            assert f"`{module}.{name}`" in text


def test_loading_in_a_process_of_its_own_runs_no_file_of_the_run(here: Path) -> None:
    canary = here.parent / "canary"
    run = here / "downloads" / "run"
    evil(run, canary)
    written(run, changed("tasks.a.head", {"_target_": "evil_code.Head", **HEAD}), code_folders=[str(run)])
    (run / "sitecustomize.py").write_text(f"open({str(canary)!r}, 'w')")
    ended = subprocess.run(
        [sys.executable, "-m", "mtl.evaluate", f"run={run}"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "there is no module 'evil_code'" in ended.stderr
    assert not canary.exists()


# What a reading of the code by somebody hostile found.


def library(path: Path, canary: Path) -> Path:
    """A shared object that leaves a file behind when it is loaded."""
    source = path.with_name("evil.c")
    source.write_text(
        "#include <stdio.h>\n__attribute__((constructor)) static void f(void) "
        f'{{ FILE *g = fopen("{canary}", "w"); if (g) fclose(g); }}\n'
    )
    done = subprocess.run(["cc", "-shared", "-fPIC", "-o", str(path), str(source)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("there is no C compiler")
    return path


class Items:
    """Pickled as an OrderedDict whose items method is another: a call that is hidden from whoever asks for it."""

    def __init__(self, **items: Any) -> None:
        self.items = items

    def __reduce__(self) -> Any:
        return OrderedDict, ([[key, value] for key, value in self.items.items()],), {"items": OrderedDict}


def test_a_dict_that_hides_its_items(here: Path) -> None:
    canary = here / "canary"
    hidden = Items(_target_="builtins.eval", _args_=[f"open({str(canary)!r}, 'w').close()"])
    for place in ("model.trunk._args_", "tasks.a.head._args_"):
        config = changed(place.rpartition(".")[0], {"_target_": "torch.nn.Sequential", "_args_": [hidden]})
        run = written(here / "outputs" / "run", config)
        with pytest.raises(mtl.UserError, match=r"builtins\.eval"):
            mtl.load(run)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.zeros(1), r"names numpy"), (Counter("aab"), r"names collections\.Counter")],
)
def test_other_types_than_a_run_writes_are_refused(here: Path, value: Any, message: str) -> None:
    run = written(here / "outputs" / "run", changed("tasks.a.more", value))
    with pytest.raises(mtl.UserError, match=message):
        mtl.load(run)


def test_picked_leads_to_no_module(here: Path) -> None:
    canary = here.parent / "canary"
    run = here / "downloads" / "run"
    run.mkdir(parents=True)
    library(run / "evilso", canary)
    for way in ("__reduce_ex__.__globals__.torch.ctypes.cdll", "forward.__globals__.torch.sys.modules.ctypes.cdll"):
        picked = {
            "_target_": "mtl.trunks.Picked",
            "num_features": 4,
            "module": {"_target_": "torch.nn.Identity"},
            "output": f"{way}.downloads/run/evilso",
        }
        model = mtl.load(
            written(
                run,
                changed("model.trunk", picked),
                model={"heads.a.weight": torch.zeros(2, 4), "heads.a.bias": torch.zeros(2)},
            )
        )
        with pytest.raises(mtl.UserError, match="has no"):
            model({"x": torch.ones(2, 4)})
    assert not canary.exists()


def test_names_are_not_walked_into_other_libraries(here: Path) -> None:
    canary = here.parent / "canary"
    run = here / "downloads" / "run"
    run.mkdir(parents=True)
    library(run / "evilso", canary)
    library(here / "evilso", canary)
    (here / "mine.py").write_text("import torch\n")
    for target in (
        *("mtl.data.loader.torch.ctypes.cdll.evilso", "torch.nn.functional.torch.ctypes.cdll.evilso"),
        *("mine.torch.ctypes.cdll.evilso", "mtl.data.loader.torch.ctypes.cdll.downloads/run/evilso"),
    ):
        with pytest.raises(mtl.UserError, match=r"isn't trusted"):
            mtl.load(written(run, changed("tasks.a.head", {"_target_": target, "a": 1})))
    assert not canary.exists()


def hostile(trained: Path, run: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """As `tampered`, but with a change of the whole state."""
    state = torch.load(trained / "checkpoints" / "best.pt", weights_only=True)
    change(state)
    (run / "checkpoints").mkdir(parents=True)
    torch.save(state, run / "checkpoints" / "best.pt")
    return run


EVAL = {"_target_": "builtins.eval"}


def test_facts_are_not_built(here: Path, people: Path) -> None:
    canary = here.parent / "canary"

    def change(state: dict[str, Any]) -> None:
        state["facts"]["columns"]["zz"] = {
            "_target_": "builtins.eval",
            "_args_": [f"open({str(canary)!r}, 'w').close()"],
        }

    run = hostile(people, here / "outputs" / "run", change)
    (here / "new.csv").write_bytes((people.parents[2] / "people.csv").read_bytes())
    evaluated = command("evaluate", f"run={run}", f"data.path={here / 'new.csv'}")
    assert (evaluated.code, "columns.zz was" in evaluated.err) == (1, True)  # no such column is in the data
    assert not canary.exists()


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provides a run on a table."""
    folder = tmp_path_factory.mktemp("people")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("people.csv").write_text("age,income\n" + "".join(f"{age},{age * 9 + age % 7}\n" for age in range(20, 60)))
        Path("mine/task").mkdir(parents=True)
        Path("mine/task/people.yaml").write_text(
            "# @package _global_\ndefaults:\n  - /objective@tasks.income: regression\n  - _self_\n"
            "  - override /data: table\n  - override /model: hard_sharing\n  - override /model/trunk: table\n"
            "model: {inputs: '${data.inputs}'}\ntasks: {income: {target: income}}\n"
            "data: {path: people.csv, inputs: [age], targets: [income], batch_size: 16}\n"
            "trainer: {max_epochs: 1, monitor: {income/mae: min}}\n"
        )
        ended = command("train", "--config-dir", "mine", "task=people")
    assert ended.run is not None, ended.err
    return folder / ended.run


@pytest.mark.parametrize(
    "value", [{**EVAL, "_args_": ["open('canary', 'w').close()"]}, "${oc.create:{_target_:builtins.eval}}"]
)
@pytest.mark.parametrize("key", ["output_root", "balancer", "optimizer", "callbacks"])
def test_the_users_own_data_take_no_code_over_by_interpolation(here: Path, trained: Path, key: str, value: Any) -> None:
    (here / "mine" / "data").mkdir(parents=True)
    (here / "mine" / "data" / "other.yaml").write_text(
        f"_target_: mtl.data.mnist\nroot: ${{{key}}}\nbatch_size: 9\neval_batch_size: 9\nnum_workers: 0\n"
    )
    run = hostile(trained, here / "outputs" / "run", lambda state: state["config"].update({key: value}))
    evaluated = command("evaluate", f"run={run}", "--config-dir", "mine", "data=other")
    assert evaluated.code == 1
    assert "Traceback" not in evaluated.err
    assert not (here / "canary").exists()


@pytest.mark.parametrize("case", ["run in the folder", "link to the run", "the root", "link above the run"])
def test_what_counts_as_beside_the_run(here: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    canary = here.parent / "canary"
    target, run = "downloads.paper.evil_code.Head", here / "downloads" / "paper" / "run"
    if case == "run in the folder":
        target, run = "evil_code.Head", here / "run"
        evil(here, canary)
    if case == "the root":
        evil(here / "published", canary)
        target = ".".join([*here.parts[1:], "published", "evil_code", "Head"])
        if not all(part.isidentifier() for part in here.parts[1:]):
            target = "etc.evil_code.Head"
        monkeypatch.chdir("/")
    if case.startswith("link"):
        evil(here / "downloads" / "paper", canary)
        real = here.parent / "elsewhere" / "run" if case == "link to the run" else here / "paper_data" / "run"
        real.mkdir(parents=True)
        run.symlink_to(real)
    written(run, changed("tasks.a.head", {"_target_": target, **HEAD}))
    with pytest.raises(mtl.UserError, match=r"isn't trusted|there is no module"):
        mtl.load(run)
    assert not canary.exists()


@pytest.mark.parametrize("place", ["tasks.a.head.in_features", "model.more"])
def test_loading_downloads_and_writes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr("socket.socket.connect", connect)
    outside = here.parent / "outside"
    for node in (
        {"_target_": "mtl.data.mnist", "source": "torchvision", "root": str(outside)},
        {"_target_": "mtl.data.cifar100", "download": True, "root": str(outside)},
        {"_target_": "mtl.data.pets", "download": True, "root": str(outside)},
        {"_target_": "torchvision.models.alexnet", "weights": "no such weights"},
    ):
        run = written(here / "outputs" / "run", changed(place, node))
        with pytest.raises(mtl.UserError):
            mtl.load(run)
    assert not outside.exists()
    (here / "mine.py").write_text("from torchvision.models import alexnet\n")
    for target in ("torchmetrics.functional.image.dists.vgg16", "torchvision.models.vgg.vgg16"):
        with pytest.raises(mtl.UserError, match=r"isn't trusted"):
            mtl.load(written(here / "outputs" / "run", changed(place, {"_target_": target, "weights": "DEFAULT"})))
    node = {"_target_": "mine.alexnet", "weights": "DEFAULT", "num_classes": 2}
    model = mtl.load(written(here / "outputs" / "run", changed("tasks.a.count", node)))
    assert model({"x": torch.ones(1, 3)})["a"].shape == (1, 2)


def tensor(value: Any) -> dict[str, Any]:
    return {"_target_": "torch.tensor", "data": value}


BEYOND = {  # what of the tensors these functions take for granted leads beyond the memory: Python ends by a signal
    "torchvision.ops.roi_align": {"input": tensor([[[[1.0]]]]), "boxes": tensor([[1e8, 0, 0, 1, 1]]), "output_size": 1},
    "torch.nn.functional.ctc_loss": {
        **{"log_probs": tensor([[[0.0, 0.0]]]), "targets": tensor([10**9])},
        **{"input_lengths": tensor([1]), "target_lengths": tensor([1])},
    },
}


@pytest.mark.parametrize("name", [*BEYOND, "mine.roi_align"])
def test_functions_of_tensors_are_not_called_with_those_of_a_run(here: Path, name: str) -> None:
    (here / "mine.py").write_text("from torchvision.ops import roi_align\n")
    given = BEYOND.get(name, BEYOND["torchvision.ops.roi_align"])
    called = {"_target_": name, **given}
    partly = {**called, "_partial_": True}
    by_another = {
        "_target_": "torchvision.ops.MLP",
        "in_channels": 1,
        "hidden_channels": [1],
        "activation_layer": partly,
    }
    for node in (called, partly, {**called, "_partial_": 1}, by_another):
        with pytest.raises(mtl.UserError, match=rf"isn't trusted:\n  tasks.a.count.*: {name}"):
            mtl.load(written(here / "outputs" / "run", changed("tasks.a.count", node)))
    mtl.load(written(here / "outputs" / "run", changed("tasks.a.count", {"_target_": name, "_partial_": True})))


def test_nothing_is_downloaded_for_what_is_in_a_tuple(
    here: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data's config becomes lists, and is built, whatever the checkpoint had."""
    asked = []
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda *_, **__: asked.append(1))
    model = {"_target_": "torchvision.models.squeezenet1_0", "weights": "DEFAULT"}
    run = tampered(trained, here / "outputs" / "run", lambda config: config["data"].update(more=(model,)))
    ended = command("evaluate", f"run={run}")
    assert "more" in ended.err  # it has been built, and mtl.data.mnist doesn't take it
    assert asked == []


def test_a_run_does_not_say_how_many_processes_there_are(trained: Path) -> None:
    from mtl.evaluate import _measured

    config = torch.load(trained / "checkpoints" / "best.pt", weights_only=True)["config"]
    config["data"]["num_workers"] = 100_000
    assert _measured(config, {"device": None})["data"]["num_workers"] == os.cpu_count()


def test_the_folder_of_a_program_is_ones_own(here: Path) -> None:
    evil(here / "code", here.parent / "canary")
    run = written(here.parent / "runs" / "run", changed("tasks.a.head", {"_target_": "evil_code.Head", **HEAD}))
    (here / "code" / "program.py").write_text(f"import mtl\nprint(type(mtl.load({str(run)!r}).heads['a']))")
    for cwd in (here, here.parent):
        ended = subprocess.run(
            [sys.executable, str(here / "code" / "program.py")], capture_output=True, text=True, check=False, cwd=cwd
        )
        assert "evil_code.Head" in ended.stdout, ended.stderr
