"""Makes docs/tensorboard.png, the README's picture: trains mnist_two_head and opens the run in a real TensorBoard.

pip install playwright && python scripts/screenshot_tensorboard.py [--browser /usr/bin/chromium]
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).parents[1] / "docs" / "tensorboard.png"
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
]


def main() -> None:
    """Trains, serves, takes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", default="/usr/bin/chromium")
    browser_path = parser.parse_args().browser
    with tempfile.TemporaryDirectory() as folder:
        train = [sys.executable, "-m", "mtl.train", "task=mnist_two_head", "log.every=20", f"output_root={folder}"]
        subprocess.run(train, check=True)
        serve = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", "0"]
        server = subprocess.Popen(serve, stderr=subprocess.PIPE, text=True)
        try:
            address = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+", line)))
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=browser_path, args=FLAGS)
                page = browser.new_page(viewport={"width": 1400, "height": 880})
                page.goto(f"{address}#custom_scalars")
                page.get_by_text("gradient norm", exact=True).first.wait_for(timeout=60_000)
                page.wait_for_timeout(5_000)  # the charts are drawn after their titles
                page.screenshot(path=PICTURE)
                browser.close()
        finally:
            server.terminate()
            server.communicate(timeout=60)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
