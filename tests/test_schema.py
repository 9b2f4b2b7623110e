"""Messages about wrong configs, before torch is imported."""

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import mtl
from mtl import schema

TASKS = sorted(path.stem for path in (ROOT / "configs" / "task").glob("*.yaml"))


def composed(*overrides: str):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_composes(task: str) -> None:
    config = schema.check(composed(f"task={task}"))
    assert config["tasks"]


@pytest.mark.parametrize("group", ["optimizer", "scheduler", "logger", "trainer", "balancer"])
def test_every_option_of_every_group_composes(group: str) -> None:
    for path in sorted((ROOT / "configs" / group).glob("*.yaml")):
        schema.check(composed("task=mnist_two_head", f"{group}={path.stem}"))


NEEDED = {  # what has no value that would do for every problem
    "torchvision": ["model.trunk.name=resnet18"],
    "cnn": ["model.trunk.in_channels=1"],
    "mlp": ["model.trunk.in_features=784"],
    "transformer": ["model.trunk.max_length=28", "model.trunk.in_features=28"],
    "picked": ["model.trunk.module._target_=a.B", "model.trunk.output=0", "model.trunk.num_features=1"],
    "custom": ["model.trunk._target_=a.B"],
    "reconstruction": ["tasks.new.head.channels=1", "tasks.new.head.size=28"],
    "segmentation": ["tasks.new.num_outputs=2", "+data.size=28"],
    "dense_regression": ["+data.size=28"],
    **dict.fromkeys(("normals", "depth", "edges"), ["+data.size=28"]),
    "classification": ["tasks.new.num_outputs=2"],
    "multilabel": ["tasks.new.num_outputs=2"],
}


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs" / "model" / "trunk").glob("*.yaml")))
def test_every_trunk_composes(name: str) -> None:
    schema.check(composed("task=mnist_two_head", f"model/trunk={name}", *NEEDED.get(name, [])))


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs" / "objective").glob("*.yaml")))
def test_every_objective_composes(name: str) -> None:
    new = [f"+objective@tasks.new={name}", "tasks.new.target=image", *NEEDED.get(name, [])]
    task = schema.check(composed("task=mnist_two_head", *new))["tasks"]["new"]
    assert {"target", "weight", "head", "loss", "metrics"} <= set(task)


def test_a_variable_goes_below_vars() -> None:
    config = composed("task=mnist_two_head")
    OmegaConf.update(config, "fold", 0, force_add=True)
    with pytest.raises(
        mtl.UserError, match=r"fold: there is no such key .*; your own variables belong below vars: vars\.fold"
    ):
        schema.check(config)
    checked = schema.check(composed("task=mnist_two_head", "+vars.fold=3", "+vars.deep.rate=0.5", "seed=${vars.fold}"))
    assert checked["vars"] == {"fold": 3, "deep": {"rate": 0.5}}
    assert checked["seed"] == 3


def test_documented_forms() -> None:
    config = schema.check(
        composed(
            "task=mnist_two_head",
            "optimizer.groups={trunk: {lr: 1e-4}}",
            'model.freeze=["trunk.conv1.*"]',
            "trainer.monitor={digit/accuracy: max, parity/accuracy: max}",
        )
    )
    assert config["optimizer"]["groups"] == {"trunk": {"lr": 1e-4}}
    assert config["model"]["freeze"] == ["trunk.conv1.*"]
    assert config["trainer"]["monitor"] == {"digit/accuracy": "max", "parity/accuracy": "max"}
    assert list(config["tasks"]) == ["digit", "parity"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainer.max_epoch", 3, "trainer.max_epoch: there is no such key; did you mean 'max_epochs'? (possible: "),
        ("sead", 1, "sead: there is no such key; did you mean 'seed'?"),
        ("vars", 3, "vars is 3; it must be a mapping"),
        (
            "model.trunk",
            "lenet",
            "model.trunk is 'lenet'; it must be a mapping with a _target_; an option is chosen with model/trunk=lenet",
        ),
        ("seed", -1, "seed is -1; it must be a whole number of at least 0"),
        ("seed", True, "seed is True; it must be a whole number"),
        ("precision", "fp8", "precision is 'fp8'; it must be one of fp32, bf16, fp16"),
        ("passes", "both", "passes is 'both'; it must be one of joint, sequential, shared, auto"),
        ("device", "gpu", "device is 'gpu'; it must be auto, cpu, cuda or cuda:N"),
        ("trainer.clip_norm", 0, "trainer.clip_norm is 0; it must be a finite number above 0, or null"),
        ("trainer.max_epochs", 1.5, "trainer.max_epochs is 1.5"),
        ("trainer", 3, "trainer is 3; it must be a mapping"),
        ("data.batch_size", 0, "data.batch_size is 0; it must be a whole number of at least 1"),
        ("data", None, "data: the task has none"),
        ("model.inputs", "image", "model.inputs is 'image'; it must be a list of texts"),
        ("tasks", {}, "tasks: the config has none; a problem needs at least one"),
        ("tasks", None, "tasks is None; it must be a mapping"),
        ("tasks.digit.weight", -1, "tasks.digit.weight is -1; it must be a finite number of at least 0"),
        ("tasks.digit.weight", float("nan"), "tasks.digit.weight is nan"),
        ("tasks.digit.waight", 1, "tasks.digit.waight: there is no such key; did you mean 'weight'?"),
        ("tasks.digit", None, "tasks.digit is None; it must be a mapping with target"),
        ("tasks.a b", {}, "tasks.a b: use letters a to z, digits and _"),
        ("tasks.new", {"target": "digit"}, "tasks.new.head: a value is required"),
        ("tasks.digit.target", "???", "tasks.digit.target: a value is required"),
        ("log.every", "${nowhere}", "log.every: Interpolation key 'nowhere' not found"),
        (
            "callbacks.x",
            {"a": 1},
            "callbacks is {'x': {'a': 1}}; it must be names, each with a mapping that has a _target_",
        ),
    ],
)
def test_messages(key: str, value: object, message: str) -> None:
    config = composed("task=mnist_two_head")
    OmegaConf.update(config, key, value, merge=False, force_add=True)
    with pytest.raises(mtl.UserError) as error:
        schema.check(config)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("key", "known"),
    [
        *((key, True) for key in schema.SCHEMA if "." in key),
        *((f"tasks.digit.{key}", True) for key in schema.TASK),
        ("vars.fold", True),
        *(("tasks.digit.waight", False), ("tasks.digit.head.bias", False), ("fold", False), ("balancer.lr", False)),
        ("seed", False),  # it is in every config
    ],
)
def test_keys_that_need_no_plus(key: str, known: bool) -> None:
    assert schema.is_known(key) is known
