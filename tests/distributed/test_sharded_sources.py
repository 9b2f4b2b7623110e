"""Tasks with data of their own in several processes, with and without sharded parameters, after 20 steps."""

import pytest
import torch
from processes import processes
from test_kinds_of_steps import SOURCES, fields, model_of

import mtl
from mtl.data import Fields, Loader, Mix
from mtl.distributed.sharding import whole

STEPS = 20
SIZES = {"one": (46, 9), "two": (25, 6)}  # samples and batch size; a last batch would be too small for 4 processes


def on_sources(how: str, sampling: str, balancer: str, dtype_name: str, micro: dict[str, int]) -> list[list[float]]:
    """Takes 20 steps, and returns the numbers of each; the last ones are the parameters."""
    dtype = getattr(torch, dtype_name)
    model, tasks = model_of(dtype)
    mtl.distributed.prepare(model, how)
    loaders = {}
    for name, (count, size) in SIZES.items():
        data = {k: v.to(dtype) if v.is_floating_point() else v for k, v in fields(count, 7).items()}
        loaders[name] = Loader(Fields(data), batch_size=size, shuffle=True, drop_last=True, **micro)
    mix = Mix(loaders, SOURCES, sampling=sampling, epoch=STEPS, seed=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step = mtl.Step(model, tasks, optimizer, balancer=getattr(mtl.balancers, balancer)(), **micro)
    numbers = []
    for batch in mix.batches(1):
        result = step(batch, measure=True)
        kinds = (result.losses, result.weights, result.grad_norms or {}, result.cosines or {})
        numbers.append([float(value) for kind in kinds for value in kind.values()])
    assert len(numbers) == STEPS
    return [*numbers, [x for p in model.parameters() for x in whole(p.detach()).flatten().tolist()]]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("micro", [{}, {"micro_batch_size": 2}], ids=str)
@pytest.mark.parametrize("balancer", ["UPGrad", "Equal", "FAMO", "GradDrop"])
@pytest.mark.parametrize("sampling", ["all", "proportional"])
@pytest.mark.parametrize(("world", "how"), [(3, "fsdp"), (2, "fsdp"), (4, "fsdp"), (4, "ddp")])
def test_tasks_with_data_of_their_own(
    world: int, how: str, sampling: str, balancer: str, micro: dict[str, int], dtype: str
) -> None:
    alone = on_sources("ddp", sampling, balancer, dtype, micro)
    together = processes(world)(on_sources, how, sampling, balancer, dtype, micro)
    for others in together[1:]:
        assert repr(others) == repr(together[0])
    tolerance = 1e-12 if dtype == "float64" else 1e-6
    for ours, theirs in zip(together[0], alone, strict=True):
        one, other = (torch.tensor(each, dtype=torch.float64) for each in (ours, theirs))
        assert torch.equal(one.isnan(), other.isnan())
        largest = float(other.nan_to_num().abs().max())
        assert float((one - other).nan_to_num().abs().max()) <= tolerance * largest
