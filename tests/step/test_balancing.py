"""Every balancer in the step and in the whole trainer."""

import csv
import io
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Ended, batches, command, problem, slow_but
from omegaconf import OmegaConf
from torch import nn

import mtl
from mtl.choices import PASSES

# Fixed is Equal. With two tasks UPGrad is half of PCGrad, Nash-MTL is FairGrad with another length and IMTL-G is ConFIG
# with another length, which AdamW doesn't see but for rounding. TorchJD's default here is UPGrad.
ALIKE = [{"torchjd", "upgrad", "pcgrad"}, {"nash_mtl", "fairgrad"}, {"imtl_g", "conflict_free"}]
NAMES = sorted(path.stem for path in (ROOT / "configs/balancer").glob("*.yaml"))
STEERED = ["uw", "imtl_l", "uw_so", "gls", "si", "stch", "db_mtl"]


def made(name: str) -> mtl.balancers.Balancer:
    """Returns the balancer that its config describes."""
    node = OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/balancer/{name}.yaml"), resolve=False)
    kind = getattr(mtl.balancers, node.pop("_target_").rsplit(".", 1)[1])
    return kind(**{key: 7 if value == "${seed}" else value for key, value in node.items()})


def stepping(name: str, **options):
    model, tasks = problem(3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return mtl.Step(model, tasks, optimizer, balancer=made(name), **options)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_are_ten_and_a_reload_and_ten(name: str) -> None:
    """Into a fresh balancer, optimizer and step, through a file that holds plain data alone; with epochs between."""
    ends = []
    data = batches(20)
    for stop in (False, True):
        step = stepping(name)
        torch.manual_seed(5)
        for number, batch in enumerate(data):
            if stop and number == 10:
                file = io.BytesIO()
                torch.save({"step": step.state_dict(), "model": step.model.state_dict()}, file)
                file.seek(0)
                draws = torch.get_rng_state()
                state = torch.load(file, weights_only=True)
                step = stepping(name)
                step.model.load_state_dict(state["model"])
                step.load_state_dict(state["step"])
                torch.set_rng_state(draws)
            step(batch)
            if number % 3 == 2:
                step.epoch_end()
        ends.append(flat(step.model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", NAMES)
def test_all_kinds_of_passes_move_alike(name: str) -> None:
    """With dropout, batch norm and all: what the balancer sees and what becomes of it doesn't depend on the passes."""
    found = {}
    for kind in PASSES:
        model, tasks = problem(3)
        step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.01), balancer=made(name), passes=kind)
        torch.manual_seed(5)
        for batch in batches(4):
            result = step(batch)
        found[kind] = flat(model), model.state_dict()["trunk.norm.running_mean"], torch.get_rng_state(), result
    for kind in ("sequential", "shared"):
        for mine, theirs in zip(found[kind][:2], found["joint"][:2], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
        assert torch.equal(found[kind][2], found["joint"][2])


@pytest.mark.parametrize("name", NAMES)
def test_one_task_alone_is_plain_training(name: str) -> None:
    ends = []
    for balancer in (made(name), None):
        model, tasks = problem(1, weights=[0.7])
        step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), balancer=balancer)
        torch.manual_seed(5)
        for batch in batches(3, 1):
            step(batch)
            step.epoch_end()
        ends.append(flat(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", [name for name in NAMES if made(name).preference != "none"])
def test_tasks_own_weights_make_a_difference(name: str) -> None:
    ends = []
    for weights in ([1.0, 1.0, 1.0], [1.0, 3.0, 1.0]):
        model, tasks = problem(3, weights=weights)
        step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), balancer=made(name))
        torch.manual_seed(5)
        for batch in batches(3):
            step(batch)
            step.epoch_end()
        ends.append(torch.cat([p.detach().flatten() for p in model.trunk.parameters()]))
    assert (ends[0] - ends[1]).abs().max() > 1e-6


def test_famo_refuses_tasks_weights() -> None:
    model, tasks = problem(2, weights=[1.0, 2.0])
    with pytest.raises(mtl.UserError, match=r"FAMO doesn't support task weights \(t0 1, t1 2\)"):
        mtl.Step(model, tasks, balancer=made("famo"))


class Spy(mtl.balancers.Balancer):
    """A balancer that records its arguments."""

    needs_losses_after = True

    def __init__(self, needs: str, preference: str = "scale", scope: str = "shared") -> None:
        self.needs, self.preference, self.scope = needs, preference, scope
        self.seen: list[torch.Tensor] = []
        self.told: list[tuple[torch.Tensor, torch.Tensor]] = []

    def weights(self, losses, gramian):
        self.seen.append(losses)
        return torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)

    def after(self, losses, again):
        self.told.append((losses, again))


@pytest.mark.parametrize("kind", list(PASSES))
@pytest.mark.parametrize("needs", ["past", "losses", "gramian"])
@pytest.mark.parametrize("preference", ["scale", "steer"])
def test_what_a_balancer_is_given_and_what_its_weights_multiply(kind: str, needs: str, preference: str) -> None:
    own = [1.0, 3.0, 0.5]
    spy = Spy(needs, preference, scope="all")
    model, tasks = problem(3, weights=own)
    (batch,) = batches(1)
    torch.manual_seed(3)
    result = mtl.Step(model, tasks, balancer=spy, passes=kind).backward(batch)
    losses = torch.stack(list(result.losses.values()))
    factor = torch.tensor(own, dtype=torch.float64) if preference == "scale" else torch.ones(3, dtype=torch.float64)
    if needs == "past":
        assert spy.seen[0].isnan().all()
    else:
        torch.testing.assert_close(spy.seen[0], losses * factor, rtol=1e-12, atol=0)
    expected = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64) * factor
    applied = torch.stack(list(result.weights.values())).double()
    torch.testing.assert_close(applied, expected)
    other, other_tasks = problem(3, weights=[1.0] * 3)
    torch.manual_seed(3)
    features = other.trunk(batch["x"])
    total = sum(
        w * task.loss(task.head(features), batch[task.target]) for w, task in zip(expected, other_tasks, strict=True)
    )
    total.backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", list(PASSES))
def test_the_second_look_sees_the_moved_parameters_and_touches_nothing_else(kind: str) -> None:
    ends = []
    for looks in (True, False):
        model, tasks = problem(3)
        spy = Spy("losses")
        spy.needs_losses_after = looks
        step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.5), balancer=spy, passes=kind)
        torch.manual_seed(4)
        for batch in batches(3):
            result = step(batch)
        ends.append((flat(model), model.state_dict()["trunk.norm.running_mean"], torch.get_rng_state()))
        losses, again = spy.told[-1]
        assert torch.equal(losses, torch.stack(list(result.losses.values())))  # the log has the step's, not the look's
        assert (again is not None) == looks
    assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))
    assert int(model.state_dict()["trunk.norm.num_batches_tracked"]) == 3


def test_the_second_look_has_the_steps_draws() -> None:
    """With a learning rate of zero nothing moves, so with the same dropout the losses are the same."""
    model, tasks = problem(3)
    spy = Spy("losses")
    step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.0), balancer=spy)
    for batch in batches(3):
        # Spectral norm's own iteration goes on in every forward pass, so the losses agree but for that.
        step(batch)
        losses, again = spy.told[-1]
        torch.testing.assert_close(losses, again, rtol=0.05, atol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if made(name).needs in ("losses", "gramian", "rows")])
def test_a_task_that_is_learned_to_the_last_bit_stops_nothing(name: str) -> None:
    """Its gradient is 1e-39 and its loss 1e-38, in float32: a weight that evens this out would overflow."""
    model, tasks = problem(3, dtype=torch.float32, weights=[1.0] * 3)
    tasks[1].loss = lambda prediction, target: 1e-38 * prediction.square().mean()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step = mtl.Step(model, tasks, optimizer, balancer=made(name))
    before = flat(model)
    for batch in batches(3, dtype=torch.float32):
        step(batch)
    assert flat(model).isfinite().all()
    assert not torch.equal(flat(model), before)


def test_losses_that_have_no_weights_are_named() -> None:
    model, tasks = problem(2)
    tasks[1].loss = lambda prediction, target: -prediction.square().mean()
    with pytest.raises(mtl.UserError, match="balancer SI has no finite weights for these losses: t0 .*, t1 -"):
        mtl.Step(model, tasks, balancer=made("si")).backward(batches(1, 2)[0])
    with pytest.raises(mtl.UserError, match="balancer DBMTL: the logarithm needs losses of at least 0"):
        mtl.Step(model, tasks, balancer=made("db_mtl")).backward(batches(1, 2)[0])


class Cliff(nn.Module):
    """A loss with a finite value and an infinite gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 16)

    def forward(self, x):
        x = self.linear(x.flatten(1))
        return (x * 0).sqrt() + x


@pytest.mark.parametrize("kind", list(PASSES))
@pytest.mark.parametrize("name", [name for name in NAMES if made(name).needs in ("gramian", "rows")])
def test_a_gradient_that_turns_infinite_in_the_trunk_is_named(name: str, kind: str) -> None:
    torch.manual_seed(0)
    tasks = [mtl.Task(f"t{i}", head=nn.Linear(16, 5), loss=nn.CrossEntropyLoss(), target=f"y{i}") for i in range(2)]
    model = mtl.MultiTaskModel(Cliff(), tasks, inputs=["x"]).double()
    with pytest.raises(
        mtl.UserError, match="task 't0': its gradient is not finite; task 't1': its gradient is not finite"
    ):
        mtl.Step(model, tasks, balancer=made(name), passes=kind).backward(batches(1, 2)[0])


@pytest.mark.parametrize("name", ["moco", "db_mtl", "excess_mtl", "gradnorm", "gradvac"])
def test_an_overflow_in_the_trunk_alone_moves_no_state(name: str) -> None:
    model, tasks = problem(2, dtype=torch.float32, dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    step = mtl.Step(model, tasks, optimizer, balancer=made(name), precision="fp16")
    good, bad, last = batches(3, 2, dtype=torch.float32)
    assert step(good).taken
    before = repr(step.balancing.balancer.state_dict())
    handle = model.trunk.linear.register_full_backward_hook(lambda *given: (given[1][0] * float("inf"),))
    assert not step(bad).taken
    handle.remove()
    assert repr(step.balancing.balancer.state_dict()) == before
    assert step(last).taken


class Answers(mtl.balancers.Balancer):
    def __init__(self, answer) -> None:
        self.answer = answer

    def weights(self, losses, gramian):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, 1.0], "its weights are a list; they must be a tensor of shape"),
        (torch.ones(3), r"its weights are of shape \(3,\); they must be a tensor of shape \(2,\)"),
        (torch.ones(2, 1), r"of shape \(2, 1\)"),
        (torch.tensor([1.0, torch.nan]), "has no finite weights for these losses: t0 "),
    ],
)
def test_what_a_balancer_of_ones_own_gets_wrong(answer, message: str) -> None:
    model, tasks = problem(2)
    with pytest.raises(mtl.UserError, match=f"balancer Answers.* ?{message}"):
        mtl.Step(model, tasks, balancer=Answers(answer)).backward(batches(1, 2)[0])


def test_sparse_rows_are_refused_where_they_would_become_dense() -> None:
    trunk = nn.Embedding(10, 16, sparse=True)
    tasks = [mtl.Task(f"t{i}", head=nn.Linear(16, 3), loss=nn.CrossEntropyLoss(), target="y") for i in range(2)]
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    with pytest.raises(mtl.UserError, match="'trunk.weight' has sparse gradients"):
        mtl.Step(model, tasks, balancer=made("graddrop")).backward(
            {"x": torch.tensor([1, 2]), "y": torch.tensor([0, 1])}
        )


def test_rows_cannot_be_kept_for_some_steps_or_had_layer_by_layer() -> None:
    model, tasks = problem(2)
    with pytest.raises(mtl.UserError, match=r"gradients.every: the balancer MoCo works on the gradients themselves"):
        mtl.Step(model, tasks, balancer=made("moco"), gradients=mtl.Gradients(every=2))
    with pytest.raises(mtl.UserError, match=r"gradients.source: the balancer MoCo needs the gradients themselves"):
        mtl.Step(model, tasks, balancer=made("moco"), gradients=mtl.Gradients(source="layerwise"))


class Halves(mtl.balancers.Balancer):
    """A balancer that needs rows, and returns half of their sum."""

    needs = "rows"

    def combine(self, losses, rows):
        self.names = list(rows)
        return torch.full_like(losses, 0.5), {name: 0.5 * row.sum(0) for name, row in rows.items()}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", list(PASSES))
def test_rows_reach_the_balancer_and_its_direction_the_parameters(kind: str, precision: str) -> None:
    own = [1.0, 3.0, 0.5]
    near = {"rtol": 1e-9, "atol": 1e-12} if precision == "fp32" else {"rtol": 0.05, "atol": 0.02}
    dtype = torch.float64 if precision == "fp32" else torch.float32
    found = []
    for balancer in (Halves(), None):
        model, tasks = problem(3, weights=own, dtype=dtype, dropout=0.0)
        step = mtl.Step(model, tasks, balancer=balancer, passes=kind, precision=precision if balancer else "fp32")
        torch.manual_seed(3)
        step.backward(batches(1, dtype=dtype)[0])
        scale = step.scaler.get_scale() if step.scaler else 1.0
        found.append({name: p.grad / scale for name, p in model.named_parameters()})
        if balancer is not None:
            assert balancer.names == [name for name in found[0] if name.startswith("trunk")]
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient * (0.5 if name.startswith("trunk") else 1.0), **near)


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ended]:
    """Returns a short run of mnist_two_head with a balancer."""
    folder = tmp_path_factory.mktemp("trajectories")

    @cache
    def trained(name: str) -> Ended:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            short = ["trainer.max_epochs=3", "data.batch_size=256", "log.every=7"]
            run = command("train", "task=mnist_two_head", f"balancer={name}", *short)
            run.run = run.run and run.run.resolve()
            return run

    return trained


def parameters_of(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints/last.pt", weights_only=True)["model"]


@pytest.mark.parametrize("name", slow_but(["equal", "uw", "upgrad", "graddrop"], NAMES))
def test_trains_mnist_two_head(name: str, trajectory: Callable[[str], Ended]) -> None:
    ended = trajectory(name)
    assert ended.code == 0, ended.err
    assert all(value.isfinite().all() for value in parameters_of(ended.run).values())
    figures = ended.metrics
    assert figures["val"]["digit"]["accuracy"] > 0.4, figures["val"]
    assert figures["val"]["parity"]["accuracy"] > 0.6, figures["val"]
    with (ended.run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) in (1, 7, 14, 21, 28, 35, 42)]
    for task in ("digit", "parity"):
        applied = [float(row["value"]) for row in rows if row["tag"] == f"weight/{task}"]
        assert len(applied) == 7
        assert figures["weight"][task] == pytest.approx(sum(applied) / len(applied))  # as applied, not as set


@pytest.mark.slow
def test_no_two_methods_give_the_same_trajectory(trajectory: Callable[[str], Ended]) -> None:
    """But for those that should."""
    ends = {name: torch.cat([v.flatten() for v in parameters_of(trajectory(name).run).values()]) for name in NAMES}
    assert torch.equal(ends["fixed"], ends["equal"])
    del ends["fixed"]
    names = list(ends)
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            if any({name, other} <= pair for pair in ALIKE):
                continue
            assert (ends[name] - ends[other]).abs().max() > 1e-5, (name, other)
    torch.testing.assert_close(ends["torchjd"], ends["upgrad"], rtol=0, atol=0.05)


def test_all_parameter_groups_move() -> None:
    for name in NAMES:
        model, tasks = problem(3)
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), balancer=made(name))
        torch.manual_seed(5)
        for batch in batches(4):
            step(batch)
        still = [n for n, p in model.named_parameters() if torch.equal(p, start[n])]
        assert set(still) <= {"trunk.conv.bias"}, (name, still)  # batch norm takes away what it does


@pytest.mark.parametrize("name", NAMES)
def test_config_says_what_each_line_is(name: str) -> None:
    lines = (ROOT / f"configs/balancer/{name}.yaml").read_text().splitlines()
    assert lines[0].startswith("# ")
    for line in lines:
        assert line.startswith(("#", "_target_")) or "  # " in line, line


@pytest.mark.parametrize("name", NAMES)
def test_docstring_names_its_source(name: str) -> None:
    kind = type(made(name))
    text = kind.__doc__ or ""
    assert kind in (mtl.balancers.Equal, mtl.balancers.TorchJD) or "arXiv" in text or "openreview" in text


def test_docs_say_of_every_balancer_what_it_is() -> None:
    text = (ROOT / "docs/balancing.md").read_text()
    text = text[: text.index("## Settings of the authors' code")]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    table = {cells[0].strip("| `"): cells[1:4] for cells in rows}
    words = {"nothing": "nothing", "past": "earlier losses", "losses": "losses", "gramian": "Gramian", "rows": "rows"}
    assert set(NAMES) <= set(table)
    for name in NAMES:
        balancer = made(name)
        needs, scope, own = table[name]
        assert needs == ("a draw" if name == "rlw" else words[balancer.needs]), name
        everything = balancer.needs in ("nothing", "past", "losses") or balancer.scope == "all"
        assert scope.startswith("the whole gradient" if everything else "shared parameters"), name
        assert own == {"scale": "scale", "steer": "steer", "none": "refused"}[balancer.preference], name


def test_the_balancer_in_the_docs_works() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/balancing.md").read_text(), re.DOTALL)
    space: dict[str, object] = {}
    exec(code, space)
    model, tasks = problem(3)
    result = mtl.Step(model, tasks, balancer=space["Loudest"]()).backward(batches(1)[0])
    assert sorted(weight.item() for weight in result.weights.values()) == [0.0, 0.0, 1.0]
