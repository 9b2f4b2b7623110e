"""The bytes that autograd saves, against counts by hand, another kind of count, and PyTorch's profiler."""

import pytest
import torch
from conftest import batches, most_saved, problem
from torch import nn
from torch.utils.checkpoint import checkpoint

import mtl
from mtl.choices import PASSES
from mtl.graphs import Life, backward, living_anyway
from mtl.graphs.life import storages
from mtl.graphs.watched import Phase
from mtl.process.memory import peak_within

KINDS = list(PASSES)
N = 6


def life_of(kind: str, model: mtl.MultiTaskModel, tasks: list[mtl.Task], batch: object, **options: object) -> Life:
    life = Life(living_anyway(model, batch))
    with life.counting():
        backward(mtl.Step(model, tasks, passes=kind, **options), batch, life)
    assert life.ticks[-1] == 0
    return life


def said(life: Life) -> list[tuple[str, int]]:
    return [(str(event.phase), event.alive) for event in life.events]


def by_hand() -> tuple[mtl.MultiTaskModel, list[mtl.Task], dict[str, torch.Tensor]]:
    """Numbers (N, 3) → linear → tanh → linear → relu → (N, 4) features; heads of 2 and 5 numbers, mean squares.

    Kept, in float32: the first linear layer keeps its input, which is the batch's; tanh its result, (N, 8), which is
    also what the second layer keeps; relu its result, (N, 4), which is also what the heads keep; a mean square keeps
    the prediction, and the target, which is the batch's. Weights live anyway. So the trunk keeps (8 + 4)·4·N bytes, the
    heads 2·4·N and 5·4·N.
    """
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4), nn.ReLU())
    tasks = [
        mtl.Task(n, head=nn.Linear(4, width), loss=nn.MSELoss(), target=n) for n, width in (("two", 2), ("five", 5))
    ]
    batch = {"x": torch.randn(N, 3), "two": torch.randn(N, 2), "five": torch.randn(N, 5)}
    return mtl.MultiTaskModel(trunk, tasks, inputs=["x"]), tasks, batch


TRUNK, TWO, FIVE = 48 * N, 8 * N, 20 * N
EXPECTED = {
    "joint": [
        ("trunk forward", TRUNK),
        ("two forward", TRUNK + TWO),
        ("five forward", TRUNK + TWO + FIVE),
        ("two + five backward", 0),
    ],
    "sequential": [
        ("two forward", TRUNK + TWO),
        ("two backward", 0),
        ("five forward", TRUNK + FIVE),
        ("five backward", 0),
    ],
    "shared": [
        ("trunk forward", TRUNK),
        ("two forward", TRUNK + TWO),
        ("two backward", TRUNK),
        ("five forward", TRUNK + FIVE),
        ("five backward", TRUNK),
        ("trunk backward", 0),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_by_hand(kind: str) -> None:
    life = life_of(kind, *by_hand())
    assert said(life) == EXPECTED[kind]
    assert life.peak == max(alive for _, alive in EXPECTED[kind])


def test_graph_one_goes_before_graph_two_is_built() -> None:
    """Tick by tick: what each layer saves on its way forward goes on the way back."""
    tanh, relu = 32 * N, 16 * N
    one = [tanh, tanh + relu, tanh + relu + TWO]
    two = [tanh, tanh + relu, tanh + relu + FIVE]
    assert life_of("sequential", *by_hand()).ticks == [0, *one, *one[-2::-1], 0, *two, *two[-2::-1], 0]


@pytest.mark.parametrize("balancer", ["MGDA", "UPGrad", "GradDrop"])
def test_a_balancer_of_gradients_keeps_joint_graphs_longer(balancer: str) -> None:
    """Each task goes backward by itself; the first one's own part goes with its loss, when all is done."""

    def life(kind: str) -> Life:
        return life_of(kind, *by_hand(), balancer=getattr(mtl.balancers, balancer)())

    assert said(life("joint")) == [
        *EXPECTED["joint"][:3],
        ("two backward", TRUNK + TWO + FIVE),
        ("five backward", 16 * N + TWO),  # the head keeps the features, which are relu's result
        ("between the passes", 0),
    ]
    assert said(life("sequential")) == EXPECTED["sequential"]
    assert said(life("shared")) == EXPECTED["shared"]


def test_weights_from_the_losses_keep_all_heads_graphs_of_shared_passes() -> None:
    life = life_of("shared", *by_hand(), balancer=mtl.balancers.GLS())
    assert said(life)[:3] == EXPECTED["joint"][:3]
    assert said(life)[3:] == [("two + five backward", TRUNK), ("trunk backward", 0)]


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_one_after_the_other(kind: str) -> None:
    life = life_of(kind, *by_hand(), num_micro_batches=3)
    third = [(phase, alive // 3) for phase, alive in EXPECTED[kind]]
    assert said(life) == third * 3
    assert [event.phase.micro_batch for event in life.events] == sorted([1, 2, 3] * len(third))


def test_frozen_trunk_keeps_nothing() -> None:
    model, tasks, batch = by_hand()
    model.freeze(["trunk"])
    # Its features are kept now as what the heads were given, not as what relu gave.
    assert said(life_of("shared", model, tasks, batch)) == [
        ("two forward", 16 * N + TWO),
        ("two backward", 0),
        ("five forward", 16 * N + FIVE),
        ("five backward", 0),
    ]


def test_separate_trunks() -> None:
    _, _, batch = by_hand()
    tasks = [mtl.Task(n, head=nn.Linear(4, w), loss=nn.MSELoss(), target=n) for n, w in (("two", 2), ("five", 5))]
    model = mtl.architectures.SeparateModels(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh()), tasks, inputs=["x"])
    own = 16 * N
    assert said(life_of("joint", model, tasks, batch)) == [
        ("two forward", own + TWO),
        ("five forward", 2 * own + TWO + FIVE),
        ("two + five backward", 0),
    ]
    assert said(life_of("sequential", model, tasks, batch)) == [
        ("two forward", own + TWO),
        ("two backward", 0),
        ("five forward", own + FIVE),
        ("five backward", 0),
    ]


def test_objectives_and_batches_of_their_own() -> None:
    model, tasks, batch = by_hand()

    def residual(model: mtl.MultiTaskModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model.trunk(batch["x"]).square().mean()  # square keeps the features, which are there already

    tasks = [*tasks, mtl.Task("residual", objective=residual)]
    own = {"two": batch, "five": batch, "residual": {"x": torch.randn(2 * N, 3)}}
    life = life_of("shared", mtl.MultiTaskModel(model.trunk, tasks, inputs=["x"]), tasks, own)
    assert said(life) == [*EXPECTED["shared"], ("residual forward", 2 * TRUNK), ("residual backward", 0)]
    assert life.events[-1].phase.micro_batch == 2


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.rest, self.first(x), use_reentrant=False)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_keeps_its_input_alone(kind: str) -> None:
    """(N, 4) between the first layer and the rest, and (N, 4) features, which the heads keep."""
    _, tasks, batch = by_hand()
    life = life_of(kind, mtl.MultiTaskModel(Checkpointed(), tasks, inputs=["x"]), tasks, batch)
    forward = {str(event.phase): event.alive for event in life.events}
    assert forward["two forward"] == 16 * N + 16 * N + TWO
    assert [str(event.phase) for event in life.events] == [phase for phase, _ in EXPECTED[kind]]


@pytest.mark.parametrize("kind", KINDS)
def test_against_a_count_of_numbers(kind: str) -> None:
    """`most_saved` counts every saved tensor each time it is saved, those that live anyway too."""
    model, tasks = problem(3)
    (batch,) = batches(1)
    counted = most_saved(lambda: backward(mtl.Step(model, tasks, passes=kind), batch, Life([])))
    assert 0 < life_of(kind, model, tasks, batch).peak <= counted * 8

    _, _, small = by_hand()
    tasks = [mtl.Task("two", head=nn.Identity(), loss=nn.MSELoss(), target="two")]
    model = mtl.MultiTaskModel(nn.Sequential(nn.Linear(3, 2), nn.Sigmoid()), tasks, inputs=["x"])
    counted = most_saved(lambda: backward(mtl.Step(model, tasks, passes=kind), small, Life([])))
    extra = N * 3 + N * 2 + N * 2  # inputs and targets, and what sigmoid gave, which the loss keeps too
    assert life_of(kind, model, tasks, small).peak == 4 * (counted - extra)


@pytest.mark.parametrize("num_tasks", [1, 2, 4])
def test_sequential_keeps_no_more_than_shared_and_that_no_more_than_joint(num_tasks: int) -> None:
    model, tasks = problem(num_tasks)
    (batch,) = batches(1, num_tasks)
    peaks = {kind: life_of(kind, model, tasks, batch).peak for kind in KINDS}
    assert peaks["sequential"] <= peaks["shared"] <= peaks["joint"]
    assert (peaks["shared"] < peaks["joint"]) == (num_tasks > 1)


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_than_all_memory_of_the_step(kind: str) -> None:
    """What the profiler counts has gradients in it, and what operations need for a moment."""
    model, tasks = problem(3)
    (batch,) = batches(1)
    step = mtl.Step(model, tasks, passes=kind)
    step.backward(batch)
    step.undo()
    _, peak = peak_within(lambda: step.backward(batch), torch.device("cpu"))
    assert 0 < life_of(kind, model, tasks, batch).peak <= peak


def test_watching_changes_nothing() -> None:
    """Gradients, losses, buffers and draws are those of a step that nobody watches."""
    ends = []
    for watched in (False, True):
        model, tasks = problem(3)
        (batch,) = batches(1)
        step = mtl.Step(model, tasks, torch.optim.SGD(model.parameters(), lr=0.1), passes="shared")
        torch.manual_seed(1)
        if watched:
            life_of("shared", model, tasks, batch)
            assert all(parameter.grad is None for parameter in model.parameters())
        step(batch)
        ends.append((model.state_dict(), torch.get_rng_state()))
    (state, draws), (other, other_draws) = ends
    assert torch.equal(draws, other_draws)
    assert all(torch.equal(state[name], other[name]) for name in state)


def test_sparse_embeddings() -> None:
    """An embedding keeps its indices, which are the batch's; the sum over the sequence keeps nothing."""
    tasks = [mtl.Task("y", head=nn.Linear(4, 1), loss=nn.MSELoss(), target="y")]
    trunk = nn.EmbeddingBag(10, 4, sparse=True, mode="sum")
    model = mtl.MultiTaskModel(trunk, tasks, inputs=["x"])
    batch = {"x": torch.randint(0, 10, (N, 3)), "y": torch.randn(N, 1)}
    life = life_of("joint", model, tasks, batch)
    assert str(life.events[0].phase) == "trunk forward"
    assert life.events[1].alive - life.events[0].alive == 16 * N + 4 * N  # the head's input, its prediction


def test_what_happens_between_phases_is_none_s() -> None:
    """64 bytes are saved in the first phase; 32 between the two; the second gives up the first ones, then all."""
    life = Life([])
    one, two = Phase(1, "forward", ("a",)), Phase(1, "backward", ("a",))
    life.begin(one)
    life.change(first := torch.zeros(16), +1)
    life.end(one)
    life.change(second := torch.zeros(8), +1)
    life.begin(two)
    life.change(first, -1)
    life.change(second, -1)
    life.end(two)
    between = Phase(1, "between", ())
    assert [(event.phase, event.alive, event.peak) for event in life.events] == [
        (one, 64, 64),
        (between, 96, 96),
        (two, 0, 96),  # what was alive when it began is in its peak
    ]
    assert life.ticks == [0, 64, 96, 32, 0]


def test_a_part_of_a_tensor_keeps_the_whole() -> None:
    whole = torch.zeros(100)
    assert storages(whole[:10]) == [(whole.untyped_storage().data_ptr(), 400)]
    life = Life([])
    life.change(whole[:10], +1)
    life.change(whole[50:], +1)
    assert life.ticks == [0, 400]


def test_a_sparse_tensor_is_its_indices_and_its_values() -> None:
    """Two entries of a matrix: 2·2 indices of 8 bytes, 2 values of 4."""
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 1], [2, 0]]), torch.ones(2), (3, 3), check_invariants=True)
    assert [size for _, size in storages(sparse)] == [32, 8]
