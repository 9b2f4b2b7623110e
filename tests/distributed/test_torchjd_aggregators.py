"""Aggregators of TorchJD in several processes: the numbers of one process, or the same draws in all."""

from functools import partial
from typing import Any

import pytest
import test_same_numbers
from processes import processes
from test_same_numbers import DEFAULT, assert_close, train

import mtl

pytest.importorskip("torchjd")
DRAWS = {"GradDrop", "GradVac", "PCGrad", "Random"}  # from the global generator


def aggregated(aggregator: str, setting: dict[str, Any]) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        made = partial(mtl.balancers.TorchJD, aggregator=aggregator)
        patch.setitem(test_same_numbers.BALANCERS, aggregator, made)
        return train(DEFAULT | setting | {"balancer": aggregator, "count": 3})


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "aggregator", ["UPGrad", "MGDA", "ConFIG", "IMTLG", "DualProj", "AlignedMTL", "ExcessMTL", *sorted(DRAWS)]
)
def test_aggregators(aggregator: str, how: str) -> None:
    setting = {"how": how, "sizes": [12, 7]}
    together = processes(3)(aggregated, aggregator, setting)
    for other in together[1:]:
        assert repr(other) == repr(together[0])  # bit-equal, and NaN where an aggregator has no weights
    if aggregator not in DRAWS:
        assert_close(together[0], aggregated(aggregator, setting))
