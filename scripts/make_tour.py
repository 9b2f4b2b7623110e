"""Makes the pictures of the tutorial: runs the tutorial's sweeps and report, and the graph of docs/howto/graph.md.

    pip install -e ".[test]" && python scripts/make_tour.py [--browser /usr/bin/chromium]

docs/tensorboard.png is made by `pytest tests/loggers/test_tensorboard_page.py --screenshots docs`.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Runs the commands and copies the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", default=shutil.which("chromium"))
    browser = parser.parse_args().browser
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("tutorial.md", "howto/graph.md")]
    blocks = re.findall(r"^```bash\n(.*?)^```$", "\n".join(pages), re.M | re.S)
    commands = [line for block in blocks for line in block.splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        for command in commands:
            if re.search("mtl.graph task=mnist_two_head$|[+]sweep=|mtl.report", command):
                print(command, flush=True)
                subprocess.run(command.replace("python", sys.executable, 1), shell=True, cwd=folder, check=True)
        graph = next(Path(folder).glob("outputs/graph/*/*/graph.png"))
        for name in ("graph.png", "life.png"):
            shutil.copy(graph.with_name(name), ROOT / "docs" / name)
        page = next(Path(folder).glob("outputs/**/report.html"))
        with sync_playwright() as playwright:
            opened = playwright.chromium.launch(
                executable_path=browser, args=["--headless", "--no-sandbox", "--disable-gpu"]
            )
            shown = opened.new_page(viewport={"width": 1100, "height": 1500})
            shown.goto(page.as_uri())
            shown.screenshot(path=ROOT / "docs" / "report.png")
            opened.close()


if __name__ == "__main__":
    main()
