"""The arguments that were typed, and those that Hydra gets."""

import pytest

from mtl.cli.overrides import fixed, flags_first, for_hydra, gives


def test_flags_come_first() -> None:
    typed = ["task=x", "-m", "seed=0,1", "--config-dir", "mine", "a=b", "--cfg=job"]
    assert flags_first(typed) == ["-m", "--config-dir", "mine", "--cfg=job", "task=x", "seed=0,1", "a=b"]


@pytest.mark.parametrize(
    ("typed", "given"),
    [
        (["optimizer.lr=1", "a=[b,c]"], ["optimizer.lr=1", "a=[b,c]"]),
        (
            ["trainer.monitor={a/b: max}", "seed=0"],
            ["seed=0", "++trainer.monitor={x:0}", "~trainer.monitor", "+trainer.monitor={a/b: max}"],
        ),
        (["trainer.monitor=null"], ["trainer.monitor=null"]),
        (["+sweep=single_task", "only=[a, b]"], ["+sweep=single_task", "only=a, b"]),
        (["+sweep=single_task", "only=[]"], ["+sweep=single_task", "only=[]"]),
        (["+sweep=weights", "only=[a,b]"], ["+sweep=weights", "only=[a,b]"]),
    ],
)
def test_what_hydra_is_given(typed: list[str], given: list[str]) -> None:
    assert for_hydra(typed) == given


@pytest.mark.parametrize(
    ("argument", "spelt"),
    [
        ("optimizer.lr=1e-4", "optimizer.lr=0.0001"),
        ("output_root=my runs", r"output_root=my\ runs"),
        ("x=true", "x=True"),
        ("~trainer.monitor", "~trainer.monitor=null"),
        ("+trainer.monitor={a/b: max}", "+trainer.monitor={a/b:max}"),
        ("model.freeze=[ a , b ]", "model.freeze=[a,b]"),
    ],
)
def test_fixed_overrides_are_spelt_as_in_a_job(argument: str, spelt: str) -> None:
    assert fixed(["-m", argument]) == [spelt]


@pytest.mark.parametrize("argument", ["seed=0,1", "seed=range(0,3)", "balancer=glob(*)", "--config-dir", "broken=["])
def test_what_is_swept_or_no_override_is_not_fixed(argument: str) -> None:
    assert fixed([argument]) == []


def test_whether_a_key_is_given() -> None:
    assert gives(["+sweep=x", "~tasks.a"], "sweep")
    assert gives(["~tasks.a"], "tasks.a")
    assert not gives(["sweeper=x"], "sweep")
