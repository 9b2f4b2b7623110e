"""The formulas behind docs/scale.md, on values that were worked out by hand."""

import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "scripts"))
import model_formulas
import model_gpus
import model_scale
import page_scale
from model_formulas import Shape

SMALL = Shape(width=4, layers=3, tasks=2, samples=5)  # P = 48; a product takes 2·5·16 = 160 flops
WIDE = Shape(width=1000, layers=3, tasks=8, samples=10)  # P = 3e6, a = 1e4, u = 1e6


@pytest.mark.parametrize(
    ("case", "summing", "products", "rows", "sent", "covering"),
    [
        ("joint", 2, 1280, 0, 48, 800),
        ("representation", 2, 1280, 0, 48, 0),
        ("rows", 2, 480 + 2 * 800, 2 * 48 * 1.5, 3 * 24, 0),
        ("joint fsdp", 2, 1280, 0, 4 * 24, 1280),  # gathered twice, and summed by gloo as all_reduce does
        ("joint fsdp", 1, 1280, 0, 3 * 24, 1280),
        ("rows fsdp", 2, 2080, 48, (1 + 2 * 3) * 24, 2080),
        ("rows fsdp", 1, 2080, 48, (1 + 2 * 2) * 24, 2080),
    ],
)
def test_counts_of_two_processes(
    case: str, summing: int, products: float, rows: float, sent: float, covering: float
) -> None:
    counted = model_formulas.counts(case, SMALL, 2, summing=summing)
    assert (counted.products, counted.rows, counted.sent, counted.covering) == (products, rows, sent, covering)


def test_sharded_parameters_are_gathered_for_each_pass() -> None:
    assert model_formulas.counts("rows fsdp", SMALL, 2).modules == 3 * (1 + 2 * 2) + 2 * 3


@pytest.mark.parametrize(
    ("case", "world", "numbers"),
    [
        ("joint", 1, 3e6 + 2e4),
        ("joint", 2, 3e6 + 2e4),  # gradients of 4 MB are summed without buckets
        ("representation", 2, 6e6 + 9e4),
        ("rows", 1, 24e6 + 8 * 2 * 2 * 16384),
        ("rows", 2, 24e6 + 2.5 * 2**23),
        ("layerwise", 1, 3e6 + 2e4),
        ("layerwise", 2, 3e6 + 2 * 9e4 + 4e4),
        ("joint fsdp", 4, 0.75e6 + 2e4 + 3e6),
        ("rows fsdp", 2, 12e6 + 10e4 + 3e6),
    ],
)
def test_memory_of_wide_layers(case: str, world: int, numbers: float) -> None:
    assert model_formulas.memory(case, WIDE, world, gloo=False) == pytest.approx(4 * numbers)


def test_small_gradients_are_copied_into_buckets() -> None:
    shape = Shape(width=500, layers=3, tasks=8, samples=20)  # 1 MB a layer; a = 1e4, u = 2.5e5, P = 7.5e5
    assert model_formulas.memory("joint", shape, 2, gloo=False) == pytest.approx(4 * (2 * 7.5e5 + 2 * 1e4))


def test_memory_of_many_samples_is_that_of_activations() -> None:
    shape = Shape(width=100, layers=5, tasks=4, samples=10_000)  # a = 1e6, u = 1e4
    expected = {"joint": 7e6 + 1e4, "rows": 3 * 5e4 + 11e6 + 1e4, "representation": 12e6 + 1e4}
    for case, numbers in expected.items():
        assert model_formulas.memory(case, shape, 1) == pytest.approx(4 * numbers)


def test_layers_of_few_samples_hold_inputs_and_gradients() -> None:
    shape = Shape(width=128, layers=20, tasks=4, samples=32)  # a = 4096, u = 16384: with T·L·a > P
    held = 4096 * (20 + 80 + 4) + 4 * 4096 + 2 * 4 * 4096
    assert model_formulas.memory("layerwise", shape, 1) == 4 * held


def test_communication_is_hidden_as_far_as_the_pass_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_scale, "CORES", 2)
    for cost, hidden, seconds in [(1, 1, 1280), (1, 0.5, 1280 + 24), (100, 1, 1280 + 4800 - 800), (100, 0, 6080)]:
        model = model_scale.Model(np.array([1.0, 0, 0, 0, 0, cost, 0]), (hidden, 0.0))
        assert model.seconds("joint", SMALL, 2) == pytest.approx(seconds)


def test_seconds_and_bytes_on_gpus() -> None:
    # 320 calls; 9·P·7/8 numbers between 8 GPUs, and 4·3 messages; on 16 GPUs half of 9·P·15/16 cross the network
    assert model_gpus.seconds("rows", WIDE, 8) == pytest.approx(320 * 5e-6 + 94.5e6 / 450e9 + 12 * 5e-6)
    assert model_gpus.seconds("rows", WIDE, 16) == pytest.approx(320 * 5e-6 + 50.625e6 / 50e9 + 16 * 5e-6)
    assert model_gpus.num_bytes("joint fsdp", WIDE, 4) == pytest.approx(12 * 0.75e6 + 4 * 3.77e6)


def test_the_fit_finds_the_constants_that_made_the_times() -> None:
    true = model_scale.Model(np.array([1e-11, 4e-9, 7e-9, 3e-5, 1e-3, 7e-9, 3e-3]), (0.4, 0.0))
    keys = [
        (world, case, *size)
        for world in (1, 2, 4)
        for size in model_scale.SIZES
        for case in (*model_formulas.CASES, *(model_formulas.SHARDED if world > 1 else ()))
    ]
    found = model_scale.fit({key: true.seconds(key[1], model_scale.shape_of(key), key[0]) for key in keys})
    assert found.hidden == pytest.approx(true.hidden)
    assert found.constants == pytest.approx(true.constants, rel=0.02)


def test_the_page_is_what_the_script_writes() -> None:
    """Except for what was measured."""
    page = (ROOT / "docs/scale.md").read_text()
    tables = [page_scale._of_shape(name, shape) for name, shape in page_scale.SHAPES.items()]
    for text in (page_scale.MEMORY_TEXT, page_scale.ASSUMPTIONS.strip(), *tables, page_scale._choice()):
        assert text in page
    before, after = page_scale.INTRODUCTION.split(f"{model_scale.CORES} cores")
    assert page.startswith(before)
    assert after in page
