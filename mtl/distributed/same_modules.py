"""The sharded modules that run in a step, which have to be the same in all processes."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any

from torch import nn

from mtl.distributed.collectives import gather_numbers, gather_objects, mark
from mtl.distributed.sharding import gathers
from mtl.errors import UserError, text_of

UNEQUAL = re.compile(r"gloo.*preamble", re.DOTALL)  # in gloo's message if two processes send different sizes
WAY_OUT = (
    "With sharded parameters, a module runs in all processes or in none; where the samples decide which modules run, "
    "as with experts, take distributed=ddp"
)


class SameModules:
    """Records which sharded modules run in a step, and compares the records of all processes.

    A module gathers its parameters from all processes when it runs. If another module runs in one of them, the
    processes mix the parts of different parameters, without an error if these have the same size.

    Args:
        model: The model, whose sharded modules get a hook.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names: list[str] = []
        for name, module in model.named_modules():
            if gathers(module):
                module.register_forward_pre_hook(partial(self._note, name), prepend=True)  # before it gathers

    def _note(self, name: str, module: nn.Module, inputs: Any) -> None:
        self._names.append(name)

    @contextmanager
    def compared(self) -> Iterator[None]:
        """Compares the modules that run within the block.

        Raises:
            UserError: If the processes have run different modules, or the same ones in another order.
        """
        self._names.clear()
        try:
            yield
            marks = gather_numbers([mark(self._names)])
        except RuntimeError as error:
            if not UNEQUAL.search(text_of(error)):
                raise
            last = f", when '{self._names[-1]}' ran in this one" if self._names else ""
            raise UserError(f"the processes ran different modules{last}. {WAY_OUT}") from error
        if all(each == marks[0] for each in marks):
            return
        everyone = gather_objects(self._names)
        rank = next(number for number, names in enumerate(everyone) if names != everyone[0])
        pairs = zip_longest(everyone[0], everyone[rank], fillvalue="")
        ours, theirs = next((f"'{a}'" if a else "none", f"'{b}'" if b else "none") for a, b in pairs if a != b)
        raise UserError(
            f"the processes of rank 0 and {rank} ran different modules in this step: {ours} and {theirs}. {WAY_OUT}"
        )
