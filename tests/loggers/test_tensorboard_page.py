"""Two finished runs in a real TensorBoard, looked at through a real browser.

`pytest tests/loggers/test_tensorboard_page.py --screenshots docs` writes the picture of README.md.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from browser import browser, needs_chromium, tensorboard
from conftest import command

pytestmark = needs_chromium
RUNS = ["0_balancer-equal", "1_balancer-upgrad"]
PATIENCE = 600_000  # milliseconds after which the page is taken to hang
LINES_OF = {  # the charts in their order, each with its lines of one run
    "loss (train)": 2,
    "loss (val)": 2,
    "accuracy (val)": 2,
    "gradient norm": 3,  # and the total
    "weight": 2,
    "cosine": 1,
    "learning rate": 1,
    "samples per second": 1,
}
EVERYTHING = """
    const all = root => [...root.querySelectorAll('*')].flatMap(e => [e, ...(e.shadowRoot ? all(e.shadowRoot) : [])]);
"""
LINES = f"""() => {{ {EVERYTHING}
    const charts = all(document).filter(e => e.tagName === 'VZ-LINE-CHART2');
    const lines = chart => all(chart.shadowRoot || chart).filter(e => e.tagName === 'path' && (e.getAttribute('d') || '').length > 30);
    return charts.filter(chart => lines(chart).length >= 2).length >= 4;
}}"""
ORDER = f"""wanted => {{ {EVERYTHING}
    const cells = all(document).filter(e => e.tagName === 'VAADIN-GRID-CELL-CONTENT' && wanted.includes(e.innerText.trim()));
    const rows = cells.map(e => [e.getBoundingClientRect().y, e.innerText.trim()]).sort((a, b) => a[0] - b[0]);
    return JSON.stringify(rows.map(row => row[1])) === JSON.stringify(wanted);
}}"""
CELLS = f"""wanted => {{ {EVERYTHING}
    const cells = all(document).filter(e => e.tagName === 'VAADIN-GRID-CELL-CONTENT').map(e => e.innerText.trim());
    return wanted.every(text => cells.some(cell => cell.includes(text)));
}}"""
PICTURES = f"""() => {{ {EVERYTHING}
    return all(document).filter(e => e.tagName === 'IMG' && e.complete && e.naturalWidth > 100).length >= 6;
}}"""


@pytest.fixture(scope="module")
def multirun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        small = ["task=mnist_two_head", "trainer.max_epochs=4", "log.every=20", "log.pictures=2", "log.histograms=4"]
        ended = command("train", "-m", *small, "balancer=equal,upgrad")
        assert ended.code == 0, ended.err
        return ended.run.resolve().parent


@pytest.fixture(scope="module")
def page(multirun: Path) -> Any:
    with tensorboard(multirun) as address, browser() as opened:
        page = opened.new_page(viewport={"width": 1400, "height": 900})
        page.address = address
        page.set_default_timeout(PATIENCE)
        yield page


def tab(page: Any, name: str) -> None:
    page.goto(f"{page.address}#{name}")
    page.reload()


def test_one_chart_for_all_tasks(page: Any, pytestconfig: pytest.Config) -> None:
    from playwright.sync_api import expect

    tab(page, "custom_scalars")
    for chart in LINES_OF:
        page.get_by_text(chart, exact=True).locator("visible=true").first.wait_for()
    for run in RUNS:
        page.get_by_text(run, exact=True).first.wait_for()
    page.wait_for_function(LINES)  # the charts are drawn after their titles
    matches = [f"Matches ({len(RUNS) * lines})" for lines in LINES_OF.values()]
    expect(page.get_by_text("Matches (")).to_have_text(matches, timeout=PATIENCE)
    if folder := pytestconfig.getoption("--screenshots"):
        page.set_viewport_size({"width": 1100, "height": 1330})
        page.wait_for_timeout(2_000)
        page.screenshot(path=Path(folder) / "tensorboard.png")


def test_runs_can_be_sorted_by_options_and_figures(page: Any, multirun: Path) -> None:
    tab(page, "hparams")
    page.get_by_text("Show Metrics").first.wait_for()
    for run in RUNS:
        page.get_by_text(run).first.wait_for()
    values = {run: json.loads((multirun / run / "metrics.json").read_text())["best"]["value"] for run in RUNS}
    figures = [f"{value:.4f}" for value in values.values()]
    page.wait_for_function(CELLS, arg=["balancer", "monitor/best", "equal", "upgrad", *figures])  # they come one by one

    def choose(menu: str, item: str) -> None:
        """Sorts TensorBoard's table by the menus next to it, since the column headings don't sort."""
        found = page.locator(f'paper-dropdown-menu[label="{menu}"]').first
        found.click()
        found.locator("paper-item").filter(has_text=item).first.click()

    choose("Sort by", "balancer")
    choose("Direction", "Descending")
    page.wait_for_function(ORDER, arg=RUNS[::-1])
    choose("Sort by", "monitor/best")
    page.wait_for_function(ORDER, arg=sorted(RUNS, key=values.__getitem__, reverse=True))


def test_pictures_are_there(page: Any) -> None:
    tab(page, "images")
    for tag in ("cosine/matrix", "prediction/digit", "prediction/parity"):
        page.get_by_text(tag, exact=True).first.wait_for()
    page.wait_for_function(PICTURES)


def test_the_config_is_there_as_text(page: Any) -> None:
    tab(page, "text")
    page.get_by_text("num_outputs: 10").first.wait_for()
    page.get_by_text("_target_: mtl.balancers.UPGrad").first.wait_for()


def test_histograms_are_there_where_asked_for(page: Any) -> None:
    tab(page, "histograms")
    page.get_by_text("heads.digit.weight").first.wait_for()
