"""Which code a run's checkpoint may name, since the run may be somebody else's."""

import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mtl.errors import UserError
from mtl.targets import find

Trusted = bool | str | Sequence[str]

# Everything that is listed either builds modules, optimizers and data, or computes with tensors. None of it runs code
# that is given as text, unpickles a file, writes one, or imports a module by name.
_BASES = (nn.Module, Optimizer, LRScheduler)  # torchmetrics.Metric and the transforms of torchvision are modules
_CLASSES = (
    *("torch.nn", "torch.optim", "torch.optim.lr_scheduler"),
    *("torchvision.models", "torchvision.ops", "torchvision.transforms", "torchvision.transforms.v2"),
    *("torchmetrics", "torchmetrics.aggregation", "torchmetrics.classification", "torchmetrics.clustering"),
    *("torchmetrics.detection", "torchmetrics.nominal", "torchmetrics.regression", "torchmetrics.retrieval"),
    *("torchmetrics.segmentation", "torchmetrics.wrappers"),
)
_FUNCTIONS = {  # from a module to where its functions are defined; others have been imported into it
    "torch.nn.functional": ("torch", "torch.nn.functional", "torch._C._nn"),
    "torchvision.models": ("torchvision.models.",),
    "torchvision.ops": ("torchvision.ops.",),
    "mtl.problems.burgers": ("mtl.problems.burgers",),
}
_NAMES = {
    "mtl": ("MultiTaskModel", "Schedule"),
    "torch": ("relu", "sigmoid", "softmax", "tanh", "tensor"),
    "torchvision.transforms": ("Compose", "PILToTensor", "ToTensor"),
}
_EXPORTED = tuple(  # all that these modules export
    f"mtl.{name}" for name in ("architectures", "balancers", "data", "heads", "losses", "trunks")
)
_DEFINED = ("mtl.model", "mtl.optimizers", "mtl.problems.burgers", "mtl.schedule", "mtl.schedulers")
LISTED = "mtl, torch.nn, torch.optim, torchvision and torchmetrics"  # for messages


@cache
def listed(package: str) -> dict[str, Any]:
    """All that a run may name of the package `mtl`, `torch`, `torchvision` or `torchmetrics`, by dotted name.

    Of these packages it is classes of modules, optimizers, schedulers and metrics, the functions of
    `torch.nn.functional`, `torchvision.models` and `torchvision.ops`, and what mtl exports for configs. What loads
    files or other packages' pretrained networks isn't in it.
    """
    found: dict[str, Any] = {}

    def add(module: str, names: Sequence[str] | None, wanted: Callable[[Any], bool] = lambda _: True) -> None:
        if module.split(".")[0] == package:
            there = import_module(module)
            names = [name for name in dir(there) if not name.startswith("_")] if names is None else names
            found.update({f"{module}.{name}": value for name in names if wanted(value := getattr(there, name))})

    for module in _CLASSES:
        add(module, None, lambda value: isinstance(value, type) and issubclass(value, _BASES))
    for module, places in _FUNCTIONS.items():
        add(module, None, partial(_is_function_of, places))
    for module, names in _NAMES.items():
        add(module, names)
    for module in _EXPORTED if package == "mtl" else ():
        add(module, import_module(module).__all__)
    for module in _DEFINED:
        add(module, None, lambda value, module=module: getattr(value, "__module__", None) == module)  # type: ignore[misc]
    return found


def check(config: Mapping[str, Any], *, run: Path, trust: Trusted, folders: Sequence[Path]) -> None:
    """Looks over each `_target_` in the config of a run before any of them is built.

    Args:
        config: of the run's checkpoint, as far as it is to be built.
        run: the run's folder.
        trust: modules, or names in modules, that may be used besides those that are listed; true for everything.
        folders: of the user's own code; all in them may be used, but for what lies with the run.

    Raises:
        UserError: for names that are neither listed nor trusted, with the way to trust them.
    """
    if trust is True:
        return
    names = trusted_names(trust)
    refused: dict[str, str] = {}
    for where, text in _texts(config):
        if "${" in text:
            raise UserError(
                f"the config of the run '{run}' has {text!r} in {where}: runs write values, and no interpolations"
            )
    for where, target in _targets(config):
        if not _is_allowed(target, where, names, run, folders):
            refused.setdefault(str(target), where)
    if refused:
        lines = "".join(f"\n  {where}: {target}" for target, where in refused.items())
        raise UserError(
            f"the config of the run '{run}' names code that isn't trusted:{lines}\nWithout being asked, a run uses "
            f"modules of {LISTED}, and code in the current folder or in that of --config-dir that doesn't lie beside "
            f"the run. If you know this code, allow it by trust=[{','.join(refused)}]; trust=true allows whatever the "
            "run names"
        )


def trusted_names(trust: Trusted) -> tuple[str, ...]:
    """The names that `trust` has.

    Raises:
        UserError: where it is neither true or false nor names.
    """
    if isinstance(trust, bool):
        return ()
    names = (trust,) if isinstance(trust, str) else tuple(trust)
    for name in names:
        if not isinstance(name, str) or not _is_plain(name):
            raise UserError(f"trust: {name!r} is not the name of a module; write trust=[mine.models] or trust=true")
    return names


def own_folders(
    run: Path, folders: Sequence[str | Path], *, named: Sequence[str] = (), trust: Trusted = ()
) -> list[Path]:
    """The folders that modules of the user's own are looked for in.

    Args:
        run: the run's folder.
        folders: the current one, and those that the user names.
        named: those that the run's checkpoint names: taken where they lie in the first of `folders` and not beside the
            run, or where `trust` is true.
        trust: see `check`.
    """
    own = [Path(folder).resolve() for folder in folders]
    hints = [Path(folder).resolve() for folder in named if isinstance(folder, str)]
    if trust is not True:
        hints = [h for h in hints if h.is_dir() and h.is_relative_to(own[0]) and not _beside(run, h, own[0])]
    return list(dict.fromkeys([*own, *hints]))


def _is_allowed(target: Any, where: str, names: Sequence[str], run: Path, folders: Sequence[Path]) -> bool:
    if not isinstance(target, str) or not _is_plain(target):
        return False
    package = target.split(".")[0]
    if any(_is_below(target, name) for name in names):
        found = find(target, where)
        home = f"{_home(found)}.{getattr(found, '__qualname__', '')}"
        return target in names or _is_listed(found) or any(_is_below(home, name) for name in names)
    if package in ("mtl", "torch", "torchvision", "torchmetrics"):
        return _may_be_walked(target) and _is_listed(find(target, where))
    return _is_own(target, where, run, folders)


def _is_plain(name: str) -> bool:
    """Whether it is a dotted name, without the attributes by which Python reaches from one module into others."""
    return all(part.isidentifier() and not part.startswith("__") for part in name.split("."))


def _is_below(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _may_be_walked(target: str) -> bool:
    """Whether the modules on the way to the target may be imported."""
    modules = {"torch.nn", "torch.optim", "torchvision", "torchmetrics", *_EXPORTED, *_DEFINED, "mtl.problems"}
    module, _, name = target.rpartition(".")
    return any(_is_below(module, each) for each in modules) or name in _NAMES.get(module, ())


def _is_listed(found: Any) -> bool:
    package = _home(found).split(".")[0]
    return package in ("mtl", "torch", "torchvision", "torchmetrics") and any(
        found is each for each in listed(package).values()
    )


def _is_own(target: str, where: str, run: Path, folders: Sequence[Path]) -> bool:
    """Whether the target is defined in a file of the user's own; nothing else is imported to find out."""
    parts = target.split(".")
    before = set(sys.modules)
    for depth in range(1, len(parts) + 1):
        module = ".".join(parts[:depth])
        try:
            spec = sys.modules[module].__spec__ if module in sys.modules else find_spec(module)
        except Exception:  # the user's own code fails, or the name is not one of a module
            break
        if spec is None and depth == 1 and module not in sys.modules:
            find(target, where)  # which says that there is no such module
        if spec is None:
            break
        if spec.origin is None and spec.submodule_search_locations is not None:
            continue  # a folder without a file of its own: importing it runs nothing
        if not spec.has_location or not _owns(spec.origin, run, folders, imported=module in before):
            return False
    found = find(target, where)
    home = _home(found)
    file = getattr(sys.modules.get(home), "__file__", None)
    return _is_listed(found) or _owns(file, run, folders, imported=home in before)


def _owns(file: str | None, run: Path, folders: Sequence[Path], *, imported: bool) -> bool:
    """Whether the file of a module is the user's own code.

    It is where it lies in a folder of the user's, or where the program has imported it before it loads the run; but not
    where it lies beside the run or among the installed packages.
    """
    if file is None:
        return False
    path = Path(file).resolve()
    if any(path.is_relative_to(folder) for folder in _installed()):
        return False
    project, *named = folders
    if any(path.is_relative_to(folder) for folder in named):
        return True
    return (imported or path.is_relative_to(project)) and not _beside(run, path, project)


def _beside(run: Path, path: Path, project: Path) -> bool:
    """Whether the path lies in that folder of the project that the run lies in, or the project in the run's folder.

    A run that was downloaded may have come with more files, which lie around it.
    """
    run = run.resolve()
    if project.is_relative_to(run):
        return True
    if not run.is_relative_to(project):
        return False
    return path.is_relative_to(project / run.relative_to(project).parts[0])


@cache
def _installed() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    return tuple(Path(paths[name]).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def _home(found: Any) -> str:
    """The module that defines the class, the function, or what a partial calls."""
    while isinstance(found, partial):
        found = found.func
    home = getattr(found, "__module__", None) or getattr(getattr(found, "__self__", None), "__name__", None)
    return home if isinstance(home, str) else str(type(found).__module__)


def _is_function_of(places: Sequence[str], value: Any) -> bool:
    home = getattr(value, "__module__", None)
    return (
        inspect.isroutine(value)
        and isinstance(home, str)
        and any(home == place or (place.endswith(".") and home.startswith(place)) for place in places)
        and not home.startswith("torchvision.models._")
    )


def _targets(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in _children(node):
        inner = f"{where}.{key}" if where and isinstance(node, Mapping) else f"{where}[{key}]" if where else str(key)
        if key == "_target_" and isinstance(node, Mapping):
            yield where or "config", value
        else:
            yield from _targets(value, inner)


def _texts(node: Any, where: str = "config") -> Iterator[tuple[str, str]]:
    for key, value in _children(node):
        yield from ((where, text) for text in (key, value) if isinstance(text, str))
        yield from _texts(value, f"{where}.{key}")


def _children(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, Mapping):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, list | tuple) else []
