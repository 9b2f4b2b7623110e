"""Trunk and heads compiled by `torch.compile`, inside of steps only."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import nn

from mtl.errors import UserError
from mtl.gradients.compiled import reusable_graphs
from mtl.model import MultiTaskModel

BACKEND: Any = "inductor"
F = TypeVar("F", bound=Callable[..., Any])


class Compiled:
    """The modules of a model that a step runs compiled.

    Outside of `running`, the modules run eagerly: in validation, in evaluation, in copies of the model and in pictures
    of its graph. The names of parameters and the states of modules don't change.

    Each shape of the inputs is compiled by itself, so that the numbers don't depend on the shapes that came before, and
    a resumed run computes what an undisturbed run computes. Compiled modules draw the random numbers of eager ones.

    Args:
        model: The model.
        which: Names of modules, with the wildcards `*` and `?`, such as `trunk.layer*`; a list or dict of modules, such
            as `heads`, stands for all modules in it. True stands for trunk and heads, False for no modules.

    Attributes:
        names: The names of the compiled modules.

    Raises:
        UserError: If no module matches a pattern.
    """

    def __init__(self, model: MultiTaskModel, which: bool | Sequence[str]) -> None:
        modules = choose(model, which)
        self.names = list(modules)
        self._calls = {module: _compile(module) for module in modules.values()}
        if modules:  # torch.compile examines inputs that aren't leaves
            warnings.filterwarnings("ignore", message=r"The \.grad attribute", module=r"torch\.")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Runs the modules compiled in the context, so that each graph allows several backward passes."""
        with reusable_graphs(), _calling(self._calls):
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Runs the modules eagerly in the context."""
        with _calling(dict.fromkeys(self._calls)):
            yield


def runs_compiled(method: F) -> F:
    """Decorates a method of an object with an attribute `compiled`, whose modules run compiled in the method."""

    @wraps(method)
    def running(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.compiled.running():
            return method(self, *args, **kwargs)

    return cast(F, running)


@contextmanager
def _calling(calls: Mapping[nn.Module, Callable[..., Any] | None]) -> Iterator[None]:
    """Replaces what the modules call in the context, as `torch.nn.Module.compile` does; None for an eager call."""
    before = {module: module._compiled_call_impl for module in calls}
    try:
        for module, call in calls.items():
            module._compiled_call_impl = call
        yield
    finally:
        for module, call in before.items():
            module._compiled_call_impl = call


def choose(model: MultiTaskModel, which: bool | Sequence[str]) -> dict[str, nn.Module]:
    """Returns the modules that `which` selects, by name, without modules inside of other selected ones.

    Raises:
        UserError: If no module matches a pattern.
    """
    if not which:
        return {}
    modules = {name: module for name, module in model.named_modules() if name}
    patterns = [name for name, _ in model.named_children() if name != "losses"] if which is True else which
    matched: dict[str, nn.Module] = {}
    for pattern in patterns:
        hits = {name: module for name, module in modules.items() if fnmatchcase(name, pattern)}
        if not hits:
            raise UserError(f"model.compile: no module matches '{pattern}'; the modules are: {', '.join(modules)}")
        for name, module in hits.items():
            matched |= _callable(name, module)
    inner = {m for module in matched.values() for m in module.modules() if m is not module}
    return {name: module for name, module in matched.items() if module not in inner}


def _callable(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """Returns the module by name; if it is a list or dict of modules, which has no forward pass, the modules in it."""
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return {name: module}
    modules: dict[str, nn.Module] = {}
    for key, each in module.named_children():
        modules |= _callable(f"{name}.{key}", each)
    return modules


def _compile(module: nn.Module) -> Callable[..., Any]:
    options: dict[str, Any] = {"backend": BACKEND, "dynamic": False}
    if BACKEND == "inductor":
        options["options"] = {"fallback_random": True}
    # Otherwise all modules share the number of shapes after which torch.compile gives up, as they share `_call_impl`.
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    compiled: Callable[..., Any] = torch.compile(module._call_impl, **options)
    return compiled
