"""Trunk and heads that are compiled inside of a step, and compared with eager ones in the first step."""

import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import batches, problem
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config as inductor

import mtl
from mtl.recompute import recompute
from mtl.step import compiling
from mtl.step.compiled_check import CompiledCheck

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiles without Inductor, which takes long, and without what other tests have compiled."""
    torch.compiler.reset()
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    yield
    torch.compiler.reset()


def trained(
    compile: bool | list[str],
    balancer: str = "MGDA",
    passes: str = "joint",
    source: str = "auto",
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> list[torch.Tensor]:
    model, tasks = problem(dtype=dtype)
    recompute(model, settings.pop("checkpoint", []))
    for name, until in settings.pop("freeze_until", {}).items():
        model.freeze([name], until=until)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = mtl.Gradients(source)
    balancing = getattr(mtl.balancers, balancer)()
    step = mtl.Step(
        model, tasks, optimizer, balancer=balancing, passes=passes, gradients=gradients, compile=compile, **settings
    )
    results = [step(batch, measure=number == 1) for number, batch in enumerate(batches(3, dtype=dtype))]
    figures = [value for result in results for value in (*result.losses.values(), *(result.grad_norms or {}).values())]
    return [*figures, *model.state_dict().values(), torch.random.get_rng_state()]


@pytest.mark.parametrize(
    ("balancer", "passes", "source", "settings"),
    [
        ("Equal", "joint", "auto", {}),
        pytest.param("Equal", "sequential", "auto", {"checkpoint": ["trunk.conv", "heads.t1"]}, marks=pytest.mark.slow),
        ("MGDA", "joint", "rows", {"checkpoint": ["trunk.norm", "trunk.conv"]}),
        ("MGDA", "sequential", "rows", {"num_micro_batches": 2}),
        pytest.param("MGDA", "shared", "layerwise", {}, marks=pytest.mark.slow),
        pytest.param("MGDA", "shared", "representation", {}, marks=pytest.mark.slow),
        pytest.param("GradDrop", "shared", "auto", {"on_nonfinite": "skip_task"}, marks=pytest.mark.slow),
        ("UW", "shared", "auto", {"num_micro_batches": 2, "freeze_until": {"trunk.conv": 1}}),
        pytest.param("FAMO", "sequential", "auto", {}, marks=pytest.mark.slow),
    ],
)
def test_the_numbers_are_those_of_eager_modules(balancer: str, passes: str, source: str, settings: Any) -> None:
    eager = trained(False, balancer, passes, source, **copy.deepcopy(settings))
    compiled = trained(True, balancer, passes, source, **copy.deepcopy(settings))
    torch.testing.assert_close(compiled, eager, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_bf16() -> None:
    eager = trained(False, "UPGrad", "shared", dtype=torch.float32, precision="bf16")
    torch.testing.assert_close(
        trained(True, "UPGrad", "shared", dtype=torch.float32, precision="bf16"), eager, rtol=0.02, atol=0.01
    )


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_machine_code_computes_the_numbers_of_eager_modules(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    options: dict[str, Any] = {"dtype": dtype, "checkpoint": ["trunk.norm"]}
    compiled = trained(["trunk", "heads.t0"], **copy.deepcopy(options))
    torch.testing.assert_close(compiled, trained(False, **options), rtol=tolerance, atol=tolerance)


def step_of(compile: bool | list[str] = True, **settings: Any) -> mtl.Step:
    model, tasks = problem()
    return mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), compile=compile, **settings)


def test_only_the_named_modules_are_compiled_and_only_inside_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        compiled.append(1)
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", counting)
    step = step_of(["trunk", "heads.t[01]", "trunk.conv"])
    assert step.compiled.names == ["trunk", "heads.t0", "heads.t1"]
    assert step_of(["heads"]).compiled.names == ["heads.t0", "heads.t1", "heads.t2"]
    assert step_of(True).compiled.names == ["trunk", "heads.t0", "heads.t1", "heads.t2"]
    names = list(step.model.state_dict())
    (batch,) = batches(1)
    step.model(batch)
    assert not compiled
    step(batch)
    assert len(compiled) >= 3
    count = len(compiled)
    step.model.eval()(batch)
    copy.deepcopy(step.model)(batch)
    assert len(compiled) == count
    assert list(step.model.state_dict()) == names
    assert all(module._compiled_call_impl is None for module in step.model.modules())


def test_more_heads_than_shapes_that_torch_compiles_of_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        compiled.append(1)
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", counting)
    tasks = [mtl.Task(f"t{i}", head=nn.Linear(4, i + 2), loss=nn.CrossEntropyLoss(), target="y") for i in range(12)]
    model = mtl.MultiTaskModel(nn.Linear(3, 4), tasks, inputs=["x"])
    mtl.Step(model, tasks, compile=["heads"]).backward({"x": torch.randn(5, 3), "y": torch.randint(0, 2, (5,))})
    assert len(compiled) == 12


def test_each_task_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[list[str]] = []
    original = CompiledCheck._compare

    def noting(self: CompiledCheck, tasks: Any, batch: Any) -> None:
        compared.append([task.name for task in tasks])
        original(self, tasks, batch)

    monkeypatch.setattr(CompiledCheck, "_compare", noting)
    step = step_of(num_micro_batches=2)
    first, second, third = batches(3)
    step({**first, "y1": torch.full((8,), -100)})
    for batch in (second, third):
        step(batch)
    assert compared == [["t0", "t2"], ["t1"]]


def wrong_forward(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    return lambda *args: [1.001 * output for output in graph(*args)]


def wrong_backward(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    def backward(*args: Any) -> Any:
        return [None if output is None else 1.001 * output for output in graph(*args)]

    return backward


def wrong_second(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    """Overwrites what the forward pass saved for the backward pass, as compiled code does that owns these tensors."""

    def backward(*args: Any) -> Any:
        outputs = graph(*args)
        for saved in args[:-1]:
            if isinstance(saved, torch.Tensor) and saved.is_floating_point() and not saved.requires_grad:
                saved.data.zero_()
        return outputs

    return backward


def autograd(backward: Any) -> Any:
    return aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        bw_compiler=lambda graph, inputs: make_boxed_func(backward(graph, inputs)),
    )


@pytest.mark.parametrize(
    ("wrong", "passes", "message"),
    [
        (wrong_forward, "shared", r"differ from eager ones: the loss of task 't0' is off by 9"),
        (
            autograd(wrong_backward),
            "sequential",
            r"the gradient of task 't0' with respect to '[\w.]+' is off by 0\.001 relative to its norm, "
            r"[\d.e-]+ in eager mode and [\d.e-]+ in compiled mode; the tolerance is 1e-08\. The compiled modules are trunk",
        ),
        (autograd(wrong_second), "joint", "'t[012]'.* is off by"),
    ],
    ids=["forward", "backward", "second"],
)
def test_wrong_code_is_found_before_the_first_update(
    monkeypatch: pytest.MonkeyPatch, wrong: Any, message: str, passes: str
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", wrong)
    step = step_of(["trunk"], passes=passes)
    before = copy.deepcopy(step.model.state_dict()), torch.get_rng_state()
    with pytest.raises(mtl.UserError, match=message):
        step(batches(1)[0])
    torch.testing.assert_close(dict(step.model.state_dict()), dict(before[0]), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before[1])
    assert all(parameter.grad is None for parameter in step.model.parameters())


def test_a_buffer_that_moves_twice_is_found() -> None:
    """A compiled module can't restore a buffer that it has replaced, if it computes its activations again."""
    with pytest.raises(mtl.UserError, match=r"the buffer 'trunk\.average' is off by 0\.9 relative"):
        trained(["trunk"], checkpoint=["trunk"])


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x), self.b(x)


class Part(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.linear = index, nn.Linear(4, 1)

    def forward(self, features: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.linear(features[self.index])


def test_a_module_whose_outputs_hide_what_a_task_reaches_is_refused() -> None:
    """Otherwise parameters of one task would be balanced as shared ones."""
    tasks = [mtl.Task(name, head=Part(i), loss=nn.MSELoss(), target="y") for i, name in enumerate("ab")]
    model = mtl.MultiTaskModel(Two(), tasks, inputs=["x"])
    batch = {"x": torch.randn(5, 3), "y": torch.randn(5, 1)}
    message = (
        r"task 'a' does not reach 'trunk\.b\.\w+' in eager mode, and does in compiled mode, .* compile the modules"
    )
    with pytest.raises(mtl.UserError, match=message):
        mtl.Step(model, tasks, compile=True).backward(batch)
    mtl.Step(model, tasks, compile=["trunk.*", "heads"]).backward(batch)


def test_second_derivatives_are_refused() -> None:
    def penalty(model: mtl.MultiTaskModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = batch["x"].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model.features({"x": x}).sum(), x, create_graph=True)
        return gradient.square().mean()

    tasks = [
        mtl.Task("a", head=nn.Linear(4, 1), loss=nn.MSELoss(), target="y"),
        mtl.Task("smooth", objective=penalty),
    ]
    trunk = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    batch = {"x": torch.randn(5, 3), "y": torch.randn(5, 1)}
    message = r"differentiates the gradient .* \(create_graph=True\).* are trunk, heads\.a.*; leave out"
    with pytest.raises(mtl.UserError, match=message):
        mtl.Step(model, tasks, compile=True).backward(batch)
    mtl.Step(model, tasks, compile=["heads.a"]).backward(batch)


def test_sparse_gradients_stay_sparse() -> None:
    gradients = []
    for compile in (False, True):
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Flatten())
        tasks = [mtl.Task("a", head=nn.Linear(8, 1), loss=nn.MSELoss(), target="y")]
        batch = {"x": torch.randint(0, 20, (5, 2)), "y": torch.randn(5, 1)}
        mtl.Step(mtl.MultiTaskModel(trunk, tasks, inputs=["x"]), tasks, compile=compile).backward(batch)
        gradients.append(trunk[0].weight.grad)
    assert gradients[1].is_sparse
    torch.testing.assert_close(gradients[1].coalesce(), gradients[0].coalesce())


def test_failing_compilers() -> None:
    def failing(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        raise RuntimeError("no such operation")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "BACKEND", failing)
        message = r"compiled modules fail where eager ones don't: .*no such operation.*leave out the one that fails"
        with pytest.raises(mtl.UserError, match=message):
            step_of(["trunk"])(batches(1)[0])
        patch.setattr(compiling, "BACKEND", "inductor")
        message = r"model\.compile needs a C\+\+ compiler .* install g\+\+, .* CXX"
        with inductor.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(mtl.UserError, match=message):
            step_of(["trunk"])(batches(1)[0])
    with pytest.raises(
        mtl.UserError, match=r"model\.compile: no module matches 'trunk.layer\*'; the modules are: trunk"
    ):
        step_of(["trunk.layer*"])
