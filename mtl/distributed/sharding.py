"""Models whose parameters are divided over the processes by FSDP2, `torch.distributed.fsdp.fully_shard`.

Each process stores a part of each parameter. A module gathers its parameters before it runs forward or backward, and
each backward pass leaves in `.grad` this process's part of the gradient, summed over all processes. Since gathering and
summing are collective operations, all processes have to run the same passes in the same order.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtl.distributed.collectives import world_size
from mtl.errors import UserError, describe_error

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # modules that are never called


def shard(model: nn.Module, how: str) -> None:
    """Divides the parameters of a model over the processes.

    The trunk, the heads and the other children of the model are sharded, and in each of these the members of its
    outermost `nn.Sequential` or `nn.ModuleList`, such as the layers of a transformer. Each gathers its own parameters
    before `forward`, and before the methods that its attribute `forward_methods` names, if it has one.

    Args:
        model: The model, on the device of this process. It is changed; an optimizer has to be made afterwards.
        how: `fsdp` divides the parameters over all processes. `hsdp` divides them over the processes of each machine,
            as torchrun started them; the machines have equal parts.

    Raises:
        UserError: If the processes aren't the same number on each machine, if two modules share a parameter, or
            if `fully_shard` doesn't support one, such as a scalar.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    device = next(model.parameters()).device.type
    if how == "fsdp":
        mesh = init_device_mesh(device, (world_size(),), mesh_dim_names=("shard",))
    else:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
        if not local or world_size() % local:
            raise UserError(
                f"distributed: hsdp needs the same number of processes on each machine, and there are {world_size()} "
                f"in all and {local or 'an unknown number'} on this one; take fsdp, or start them by torchrun"
            )
        mesh = init_device_mesh(device, (world_size() // local, local), mesh_dim_names=("replicate", "shard"))
    for group in mesh.get_all_groups():  # torch gives new groups a default timeout, not that of the default group
        _copy_timeout(group)
    units = list(_units(model))
    _check_untied(model, units)
    for name, unit in units:
        try:
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"distributed: '{name}' can't be sharded: {describe_error(error)}. Or take ddp") from error
        for method in getattr(unit, "forward_methods", ()):
            if not callable(getattr(unit, method, None)):
                raise UserError(
                    f"{type(unit).__name__}.forward_methods names '{method}', which is no method of '{name}'"
                )
            register_fsdp_forward_method(unit, method)


def _copy_timeout(group: Any) -> None:
    """Gives a process group the timeout of the default group, for each device."""
    default: Any = dist.group.WORLD
    for device in group._device_types:
        options = getattr(default._get_backend(device), "options", None)
        if options is not None:
            group._get_backend(device)._set_default_timeout(options._timeout)


def _units(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Returns names and modules that gather their own parameters; the inner ones come before those around them."""
    for name, child in module.named_children():
        if not any(True for _ in child.parameters()):
            continue
        if isinstance(child, CONTAINERS):
            yield from _units(child, f"{prefix}{name}.")
            continue
        yield from _members(child, f"{prefix}{name}.")
        yield f"{prefix}{name}", child


def _members(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Returns the members of the outermost sequences in a module that have parameters."""
    is_sequence = isinstance(module, nn.Sequential | nn.ModuleList)
    for name, child in module.named_children():
        if is_sequence and not isinstance(child, CONTAINERS):
            if any(True for _ in child.parameters()):
                yield f"{prefix}{name}", child
        else:
            yield from _members(child, f"{prefix}{name}.")


def _check_untied(model: nn.Module, units: Iterable[tuple[str, nn.Module]]) -> None:
    owner: dict[Tensor, str] = {}
    for name, unit in units:  # the innermost unit comes first
        mine = [p for p in unit.parameters() if owner.setdefault(p, name) != name]
        for parameter in mine:
            inner = owner[parameter]
            if not inner.startswith(f"{name}.") or _times(unit, parameter) > 1:
                raise UserError(
                    f"distributed: '{inner}' and '{name}' share a parameter, which fully_shard can't divide; take ddp"
                )
    lost = [name for name, parameter in model.named_parameters() if parameter not in owner]
    if lost:
        raise UserError(
            f"distributed: '{lost[0]}' belongs to the model itself and not to a module that is called, so that it "
            "can't be gathered; put it into a module, or take ddp"
        )


def _times(module: nn.Module, parameter: Tensor) -> int:
    return sum(p is parameter for _, p in module.named_parameters(remove_duplicate=False))


def is_sharded(parameter: Tensor) -> bool:
    """Returns whether a parameter is divided over the processes."""
    tensors: Any = sys.modules.get("torch.distributed.tensor")  # a model with such parameters has imported it
    return tensors is not None and isinstance(parameter, tensors.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Returns this process's part of a tensor that is divided over the processes; other tensors are returned as such.

    The part shares its memory with the tensor.
    """
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def as_sharded(part: Tensor, like: Tensor) -> Tensor:
    """Returns a tensor that is divided as `like` is, and of which this process has the part `part`."""
    from torch.distributed.tensor import DTensor

    parameter: Any = like
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def gathered(part: Tensor, like: Tensor) -> Tensor:
    """Returns the whole tensor that is divided as `like` is, and of which each process has a part."""
    whole: Tensor = as_sharded(part, like).full_tensor()  # type: ignore[attr-defined]
    return whole


def whole(tensor: Tensor) -> Tensor:
    """Returns the whole of a tensor that is divided over the processes; another tensor is returned as such."""
    return gathered(local(tensor), tensor) if is_sharded(tensor) else tensor


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Returns this process's part of a tensor that all processes have, divided as `like` is."""
    mesh: Any = like.device_mesh  # type: ignore[attr-defined]
    parts = torch.chunk(whole, mesh.size(mesh.ndim - 1), dim=0)
    number = mesh.get_local_rank(mesh.ndim - 1)
    return parts[number].clone() if number < len(parts) else whole.new_empty((0, *whole.shape[1:]))


def num_replicas(parameters: Iterable[Tensor]) -> int:
    """Returns how many processes have the same part of each parameter; 1 if the parameters aren't sharded."""
    first: Any = next(iter(parameters))
    if not is_sharded(first) or first.device_mesh.ndim == 1:
        return 1
    count: int = first.device_mesh.size(0)
    return count


def number_of_part(parameter: Tensor) -> int:
    """Returns the number of the part of a parameter that this process has; 0 if the parameter isn't divided."""
    if not is_sharded(parameter):
        return 0
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    number: int = mesh.get_local_rank(mesh.ndim - 1)
    return number


def begin(model: nn.Module) -> bool:
    """Prepares a sharded model for steps, and returns whether the model is sharded. All processes have to call it.

    The gradients are then sums over the processes instead of means, each module frees its gathered parameters after a
    forward pass, since they would be out of date once the parameters were changed, and `source_of` knows them.

    Raises:
        UserError: If only some parameters are sharded, or if they are divided in a way that a step doesn't support.
    """
    units: list[Any] = [module for module in model.modules() if gathers(module)]
    for unit in units:
        unit.reshard()
    if not check_sharded(model):
        return False
    names = {parameter: name for name, parameter in model.named_parameters()}
    sharded = dict(model.named_parameters())
    for unit in units:
        unit.set_reshard_after_forward(True, recurse=False)
        unit.set_reduce_scatter_divide_factor(1.0)
        if hasattr(unit, "set_force_sum_reduction_for_comms"):  # gloo has no operation that divides as well
            unit.set_force_sum_reduction_for_comms(True)
        before = {key: names[p] for key, p in unit.named_parameters(remove_duplicate=False)}
        unit.unshard()
        for key, parameter in unit.named_parameters(remove_duplicate=False):
            if not is_sharded(parameter):
                parameter.source = sharded[before[key]]
        unit.reshard()
    return True


def source_of(leaf: Tensor) -> Tensor:
    """Returns the model's parameter from which a leaf tensor of a graph was gathered; another leaf is returned as such.

    A sharded module computes with gathered parameters, which are the same tensors in each pass.
    """
    source: Tensor = getattr(leaf, "source", leaf)
    return source


def check_sharded(model: nn.Module) -> bool:
    """Returns whether the parameters of a model are sharded.

    Raises:
        UserError: If only some parameters are, or if they are divided in a way that a step doesn't support.
    """
    named = dict(model.named_parameters())
    sharded = [name for name, parameter in named.items() if is_sharded(parameter)]
    if not sharded:
        return False
    way = "mtl.distributed.prepare(model, 'fsdp') shards a model as a step needs it"
    plain = [name for name in named if name not in set(sharded)]
    if plain:
        raise UserError(f"'{sharded[0]}' of the model is sharded and '{plain[0]}' is not; {way}")
    if gathers(model):
        raise UserError(f"the model as a whole is sharded, and a step calls its trunk and heads one by one; {way}")
    managed = {p for module in model.modules() if gathers(module) for p in module.parameters()}
    for name, parameter in named.items():
        tensor: Any = parameter
        *replicas, last = tensor.placements
        divided = last.is_shard(0) and all(each.is_replicate() for each in replicas) and len(replicas) < 2
        if parameter not in managed or not divided or tensor.device_mesh.size() != world_size():
            raise UserError(
                f"'{name}' of the model is divided as {tuple(tensor.placements)} over {tensor.device_mesh.size()} "
                f"processes, which isn't what fully_shard does with its first dimension over all {world_size()}; {way}"
            )
    return True


def gathers(module: nn.Module) -> bool:
    """Returns whether a module is sharded and gathers its own parameters when it runs."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
