"""What one process has or does and another has not: shares of pictures, few samples, timeouts, devices."""

from datetime import timedelta
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from processes import processes
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics.regression import NormalizedRootMeanSquaredError

import mtl
from mtl.config.device import choose_device
from mtl.data import Drawn, Fields, Loader
from mtl.distributed import collectives
from mtl.distributed.processes import extend
from mtl.distributed.replicas import checksum
from mtl.step import alignment, over_processes
from mtl.step.over_processes import gather
from mtl.training.gallery import some_samples
from mtl.training.metric_states import fill_empty_states
from mtl.training.rehearsal import check_shares


def test_batch_norm_without_running_statistics_is_not_synchronised() -> None:
    """It would communicate in eval mode, in which a process without samples runs no pass."""
    trunk = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False))
    for model in (trunk, trunk[1]):
        with pytest.raises(mtl.UserError, match=r"track_running_stats=True, or model\.sync_batchnorm=false"):
            mtl.distributed.sync_batchnorm(model)


def model_of(kind: str) -> tuple[mtl.MultiTaskModel, list[mtl.Task]]:
    torch.manual_seed(0)
    tasks = [mtl.Task(n, head=nn.Linear(4, 1), loss=nn.MSELoss(), target=n) for n in ("a", "b")]
    model = mtl.MultiTaskModel(nn.Sequential(nn.Linear(3, 4)), tasks, inputs=["x"])
    if kind == "norm":
        model.trunk.append(nn.BatchNorm1d(4))
        mtl.distributed.sync_batchnorm(model)
    mtl.distributed.prepare(model, "fsdp" if kind == "fsdp" else "ddp")
    return model, tasks


def checked(kind: str, count: int, drop_last: bool) -> str:
    model, tasks = model_of(kind)
    fields = {"x": torch.randn(count, 3), "a": torch.randn(count, 1), "b": torch.randn(count, 1)}
    loader = Loader(Fields(fields), batch_size=4, drop_last=drop_last)
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1))
    try:
        check_shares(step, loader)
    except mtl.UserError as error:
        return str(error)
    for batch in loader.batches():
        step(batch)  # would fail
    return ""


@pytest.mark.parametrize("kind", ["fsdp", "norm", "ddp"])
def test_a_last_batch_with_fewer_samples_than_processes_is_refused_at_the_start(kind: str) -> None:
    for message in processes(2)(checked, kind, 9, False):
        parts = ("2 processes, and the last batch of an epoch has 1", "trainer.tail=drop", "data.batch_size")
        assert all(part in message for part in parts) if kind != "ddp" else not message
    assert processes(2)(checked, kind, 9, True) == ["", ""]
    assert processes(2)(checked, kind, 10, False) == ["", ""]


def timeouts() -> list[float]:
    model, _ = model_of("ddp")
    dist.set_timeout(timedelta(seconds=77))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOCAL_WORLD_SIZE", "1")
            mtl.distributed.prepare(model, "hsdp")
        groups = next(iter(model.parameters())).device_mesh.get_all_groups()
        assert [group.size() for group in groups] == [2, 1]
        return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
    finally:
        dist.set_timeout(timedelta(minutes=30))


def test_the_groups_of_hsdp_have_the_timeout_of_the_default_group() -> None:
    assert processes(2)(timeouts) == [[77.0, 77.0]] * 2


def test_nccl_waits_longer_than_gloo() -> None:
    found: dict[torch.device, timedelta] = {}
    backends = SimpleNamespace(
        _get_backend=lambda device: SimpleNamespace(_set_default_timeout=lambda within: found.update({device: within}))
    )
    extend(backends, timedelta(seconds=60))
    assert found == {torch.device("cuda"): timedelta(seconds=180)}


def chosen(gpus: list[list[str]]) -> str:
    """Returns the device that `auto` is, in a process that sees these GPUs."""
    rank = mtl.distributed.rank()
    names = gpus[rank]
    number = rank % len(names)  # the local rank, as in process_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: len(names))
        patch.setattr(torch.cuda, "current_device", lambda: number)
        patch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=names[number]))
        try:
            return str(choose_device("auto"))
        except mtl.UserError as error:
            return str(error)


def test_two_processes_on_one_gpu_are_refused() -> None:
    for message in processes(3)(chosen, [["a", "b"]] * 3):
        assert "the processes of rank 0 and 2 would use the same GPU, and each needs its own; 2 GPUs" in message
    assert processes(3)(chosen, [["a", "b", "c"]] * 3) == ["cuda:0", "cuda:1", "cuda:2"]
    assert processes(3)(chosen, [["a"], ["b"], ["c"]]) == ["cuda:0"] * 3  # each sees its own only


def shown(kind: str) -> list[float]:
    numbers = torch.arange(40.0)
    of_kind: dict[str, Any] = {
        "fields": Fields({"x": numbers}),
        "list": [{"x": number} for number in numbers],
        "drawn": Drawn(lambda generator, count: {"x": torch.rand(count, generator=generator)}, num_samples=40),
    }
    values: list[float] = some_samples(Loader(of_kind[kind], batch_size=8), 5)["x"].tolist()
    return values


@pytest.mark.parametrize("kind", ["fields", "list", "drawn"])
def test_pictures_show_the_samples_of_one_process(kind: str) -> None:
    alone = shown(kind)
    assert len(alone) == 5
    assert processes(2)(shown, kind) == [alone] * 2
    assert processes(3)(shown, kind) == [alone] * 3


class Pair(NamedTuple):
    """A prediction of two parts."""

    left: Tensor
    right: Tensor


def sample(kind: str, count: int, rank: int) -> tuple[Any, dict[str, Any]]:
    """A prediction and labels of `count` samples, in which each number is unique."""
    torch.manual_seed(rank)
    x = torch.randn(count, 3, dtype=torch.float64)
    predictions: dict[str, Any] = {
        "tensor": x,
        "nested": {"pair": Pair(x.bfloat16(), x[:, 0].half())},
        "empty": {"x": x, "none": torch.empty(count, 0)},
        "complex": torch.view_as_complex(torch.randn(count, 2, 2).transpose(0, 1).contiguous().transpose(0, 1)),
        "texts": {"x": x, "text": [f"{rank}-{n}" for n in range(count)]},
        "other types": x.float() if rank else x,
        "wider": torch.randn(count, 3 + rank),
    }
    labels = {"y": torch.randint(9, (count,)), "known": torch.rand(count, 2) < 0.5}
    return predictions[kind], labels


def joined(kind: str, counts: list[int]) -> tuple[Any, ...]:
    rank = mtl.distributed.rank()
    pickled = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(over_processes, "gather_objects", lambda v: pickled.append(v) or collectives.gather_objects(v))
        whole = gather(*sample(kind, counts[rank], rank), range(counts[rank]), torch.device("cpu"))
    return whole.prediction, whole.batch, whole.ours, whole.is_first, bool(pickled)


@pytest.mark.parametrize("kind", ["tensor", "nested", "complex", "empty", "texts"])
@pytest.mark.parametrize("counts", [[3, 2, 2], [1, 1, 1], [1, 1, 0]])
def test_gathered_predictions_are_in_the_order_of_the_batch(kind: str, counts: list[int]) -> None:
    """Sample n of the batch is sample n // 3 of process n % 3."""
    order = [(n % 3, n // 3) for n in range(sum(counts))]
    parts = [sample(kind, count, rank) for rank, count in enumerate(counts)]
    for rank, (prediction, labels, ours, is_first, pickled) in enumerate(processes(3)(joined, kind, counts)):
        assert pickled == (kind in ("empty", "texts") or 0 in counts)
        assert (ours, is_first) == ([n for n, (owner, _) in enumerate(order) if owner == rank], rank == 0)
        flat = [leaf for leaf in tree_leaves((prediction, labels)) if isinstance(leaf, Tensor)]
        for place, leaf in enumerate(flat):
            for n, (owner, index) in enumerate(order):
                theirs = [each for each in tree_leaves(parts[owner]) if isinstance(each, Tensor)]
                assert leaf.dtype == theirs[place].dtype
                assert torch.equal(leaf[n], theirs[place][index])
        if kind == "texts":
            assert prediction["text"] == [f"{owner}-{index}" for owner, index in order]
        if kind == "nested":
            assert isinstance(prediction["pair"], Pair)


def test_predictions_of_other_types_are_joined_as_well() -> None:
    for prediction, _, _, _, pickled in processes(2)(joined, "other types", [2, 2]):
        assert pickled
        assert prediction.dtype == torch.float64
    with pytest.raises(RuntimeError, match="pad them to one width"):
        processes(2)(joined, "wider", [2, 2])


def aligned(sizes: list[dict[tuple[int, ...], int]]) -> tuple[Any, ...]:
    ours = sizes[mtl.distributed.rank()]
    members = [list(group) for group, count in ours.items() for _ in range(count)]
    pickled = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "gather_objects", lambda v: pickled.append(v) or collectives.gather_objects(v))
        batches, tasks, repeated = alignment.align([{"n": n} for n in range(len(members))], members)
    return [batch["n"] for batch in batches], tasks, repeated, bool(pickled)


def test_numbers_of_micro_batches_are_pickled_only_where_they_differ() -> None:
    equal = {(0, 1): 2, (2,): 1}
    expected = ([0, 1, 2], [[0, 1], [0, 1], [2]], [False] * 3, False)
    assert processes(2)(aligned, [equal, equal]) == [expected] * 2
    other = {(2,): 2, (0, 1): 1}
    first, second = processes(2)(aligned, [equal, other])
    assert first == ([0, 1, 2, 2], [[0, 1], [0, 1], [2], [2]], [False, False, False, True], True)
    assert second == ([2, 2, 0, 1], [[0, 1], [0, 1], [2], [2]], [False, True, False, False], True)


def test_the_checksum_of_a_parameter_depends_on_values_and_order_and_needs_no_copy_of_64_bits() -> None:
    """The sum of the bits as integers, each times its place modulo 8191, plus 1."""
    values = torch.randn(3, 1_000_003)
    bits = values.flatten().view(torch.int32).long()
    assert int(checksum(values)) == int((bits * (torch.arange(len(bits)) % 8191 + 1)).sum())
    swapped = values.flatten().clone()
    swapped[[5, 2_500_000]] = swapped[[2_500_000, 5]]
    assert int(checksum(swapped)) != int(checksum(values))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        checksum(values)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 2 * 8 * 2**20  # a chunk has 8 million bytes, and a whole copy 24 million


def normalised(normalization: str, outputs: int, counts: list[int]) -> list[float]:
    torch.manual_seed(0)
    count = sum(counts)
    prediction, target = torch.rand(2, count, outputs, dtype=torch.float64)
    rank, world = mtl.distributed.rank(), mtl.distributed.world_size()
    ours = slice(sum(counts[:rank]), sum(counts[: rank + 1])) if world > 1 else slice(count)
    metric = NormalizedRootMeanSquaredError(normalization, outputs).set_dtype(torch.float64)
    for _ in range(2):
        if len(prediction[ours]):
            metric.update(prediction[ours], target[ours])
        fill_empty_states(metric)
        values: list[float] = metric.compute().flatten().tolist()
        metric.reset()
    return values


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("normalization", ["mean", "range", "std", "l2"])
def test_the_normalised_error_over_processes(normalization: str, outputs: int) -> None:
    for counts in ([7, 4, 1], [5, 6, 0]):
        alone = normalised(normalization, outputs, counts)
        for values in processes(3)(normalised, normalization, outputs, counts):
            assert values == pytest.approx(alone, rel=1e-12)
