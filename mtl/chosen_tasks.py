"""The tasks that a config trains, which may be some of those that it defines."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mtl.errors import UserError, suggest


def narrowed(plain: dict[str, Any]) -> dict[str, Any]:
    """Reduces the config to the tasks that its key `only` names, also in `trainer.monitor` and `model.chain`.

    Raises:
        UserError: If a task doesn't exist.
    """
    if plain.get("only") is None or not isinstance(plain.get("tasks"), Mapping):
        return plain
    names = trained(plain["only"], plain["tasks"])
    trainer = dict(plain["trainer"])
    if isinstance(trainer.get("monitor"), Mapping):
        of_them = {name: term for name, term in trainer["monitor"].items() if str(name).split("/")[0] in names}
        schedule = plain.get("scheduler")
        follows = isinstance(schedule, Mapping) and str(schedule.get("_target_")).endswith("ReduceLROnPlateau")
        if len(of_them) == 1 and not follows:  # a scale only matters beside other terms, or beside a threshold
            of_them = {n: term.get("mode") if isinstance(term, Mapping) else term for n, term in of_them.items()}
        trainer["monitor"] = of_them or None
    model = plain.get("model")
    if isinstance(model, Mapping) and isinstance(model.get("chain"), list):
        chain = [name for name in model["chain"] if name in names or name not in plain["tasks"]]
        plain = {**plain, "model": {**model, "chain": chain}}
    return {**plain, "trainer": trainer, "tasks": {name: plain["tasks"][name] for name in names}}


def trained(only: str | Sequence[str] | None, tasks: Iterable[Any]) -> list[str]:
    """Returns the names of the trained tasks, in the order of the config.

    Raises:
        UserError: If a task doesn't exist, or if the config's list `only`, which selects the tasks to train, is empty.
    """
    names = [str(name) for name in tasks]
    wanted = [only] if isinstance(only, str) else only
    for name in wanted or ():
        if name not in names:
            raise UserError(f"only: there is no task '{name}'" + suggest(str(name), names))
    if wanted is not None and not wanted:
        raise UserError("only is empty; name a task, or leave the key out")
    return [name for name in names if wanted is None or name in wanted]
