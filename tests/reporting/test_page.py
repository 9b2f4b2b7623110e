"""The HTML page in a real Chromium, in the light and the dark theme."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from browser import CHROMIUM, browser
from made_runs import accuracies, run

from mtl.report import report
from mtl.reporting.svg import DARK, LIGHT

HOSTILE = "<img src=x onerror=alert(1)> & $x_1$ | `y`"
CONTRAST = """() => {
  const scene = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = colour => {
    scene.clearRect(0, 0, 1, 1); scene.fillStyle = colour; scene.fillRect(0, 0, 1, 1);
    return [...scene.getImageData(0, 0, 1, 1).data];
  };
  const light = colour => rgb(colour).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = light(getComputedStyle(document.body).backgroundColor);
  const against = colour => {
    const own = light(colour);
    return (Math.max(own, ground) + 0.05) / (Math.min(own, ground) + 0.05);
  };
  const found = {text: [], drawn: []};
  for (const element of document.querySelectorAll("body *")) {
    const style = getComputedStyle(element);
    const own = [...element.childNodes].some(node => node.nodeType == 3 && node.data.trim());
    if (element.tagName == "text") found.text.push([element.textContent, against(style.fill)]);
    else if (own && element.tagName != "title") found.text.push([element.textContent, against(style.color)]);
    if (element.closest(".method") && element.tagName == "path" && style.stroke != "none")
      found.drawn.push([element.closest(".method").textContent.trim(), against(style.stroke)]);
  }
  return found;
}"""


def many(folder: Path, methods: int, seeds: int = 3) -> Path:
    for number in range(methods):
        for seed in range(seeds):
            name = ["equal", "upgrad", HOSTILE][number] if number < 3 else f"method{number}"
            by = 0.01 * number + 0.013 * ((seed * 7 + number * 3) % 5)
            steps = range(1, 11)
            run(
                folder / f"{number}-{seed}",
                balancer=name,
                seed=seed,
                test=accuracies(a=0.5 + by, b=0.9 - 0.8 * by),
                best=0.5 + by,
                cosine={"a~b": {"mean": 0.1 - by, "below_zero": by, "steps": 10}},
                curves={
                    "loss/a/train": {step: 3 / step + by for step in steps},
                    "loss/a/val": {step: 3 / step + by for step in steps},
                    "loss/b/train": {step: 30 / step**2 + by for step in steps},
                    "metric/a/accuracy/val": {step: 0.5 + by - 0.3 / step for step in steps},
                    "cosine/a~b": {step: 0.1 * (-1) ** step - by for step in steps},
                },
            )
    for task in ("a", "b"):
        for seed in range(seeds):
            run(folder / f"{task}-{seed}", seed=seed, tasks=[task], test=accuracies(**{task: 0.7 + 0.01 * seed}))
    run(folder / "failed", status="failed", error=HOSTILE)
    return folder


@pytest.fixture(scope="module", params=[3, 27], ids=["few", "many"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = many(tmp_path_factory.mktemp("runs"), request.param)
    report([folder])
    return folder / "report"


@pytest.fixture(scope="module")
def opened() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here (apt-get install chromium)")
    with browser() as started:
        yield started


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_legible_and_asks_for_nothing(made: Path, opened: Any, scheme: str) -> None:
    page = opened.new_page(color_scheme=scheme, viewport={"width": 1200, "height": 900})
    requests: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append("a dialog"), dialog.dismiss()))
    address = (made / "report.html").as_uri()
    page.goto(address)
    assert page.locator("figure svg").count() == 4
    assert requests == [address]
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    found = page.evaluate(CONTRAST)
    assert len(found["text"]) > 100
    assert [(text, contrast) for text, contrast in found["text"] if contrast < 4.5] == []
    assert len(found["drawn"]) > 20
    assert [(text, contrast) for text, contrast in found["drawn"] if contrast < 3] == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pixels_are_of_the_scheme(made: Path, opened: Any, scheme: str) -> None:
    """The plots' ground is the page's, and their curves have the colours that they should."""
    import io

    import numpy as np
    from PIL import Image

    page = opened.new_page(color_scheme=scheme, viewport={"width": 1200, "height": 900})
    page.goto((made / "report.html").as_uri())
    colours = {"light": LIGHT, "dark": DARK}[scheme]
    for plot in page.locator("figure svg").all():
        pixels = np.asarray(Image.open(io.BytesIO(plot.screenshot())).convert("RGB")).reshape(-1, 3)
        shown = {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in np.unique(pixels, axis=0).tolist()}
        corner = "#{:02x}{:02x}{:02x}".format(*pixels[0])
        assert corner == colours["bg"]
        assert {colours["c0"], colours["c1"]} <= shown
    page.close()


def test_a_narrow_screen_scrolls_tables_and_not_the_page(made: Path, opened: Any) -> None:
    page = opened.new_page(viewport={"width": 400, "height": 800})
    page.goto((made / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()


def test_ids_are_there_once_and_what_is_referred_to_is_there(made: Path) -> None:
    text = (made / "report.html").read_text()
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    assert {one or other for one, other in used} <= set(ids)


def test_whoever_points_at_a_curve_is_told_its_name(made: Path, opened: Any) -> None:
    page = opened.new_page()
    page.goto((made / "report.html").as_uri())
    titles = set(page.locator("figure .method > title").all_text_contents())
    assert {"equal", "upgrad", HOSTILE} <= titles
    page.close()


def test_files_of_plots_stand_alone(made: Path) -> None:
    """They are referred to by the Markdown, well-formed, and have colours of their own."""
    named = re.findall(r"\]\((figures/[^)]+)\)", (made / "report.md").read_text())
    assert len(named) == 4
    for name in named:
        text = (made / name).read_text()
        assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in text
        assert LIGHT["c1"] in text
