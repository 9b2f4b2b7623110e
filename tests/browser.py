"""A real browser, Chromium through Playwright, for the tests of pages."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
]
SECONDS = 1800  # after which TensorBoard is taken to hang
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (apt-get install chromium)")


@contextmanager
def browser() -> Iterator[Any]:
    """Provides a headless browser in which a test opens pages."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield opened
        finally:
            opened.close()


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """Provides the address of a TensorBoard process that serves the multirun in this folder."""
    place, shown = folder.parents[2], str(folder.relative_to(folder.parents[2]))  # the page shows what it is given
    serve = [sys.executable, "-m", "tensorboard.main", "--logdir", shown, "--port", "0"]
    server = subprocess.Popen(serve, cwd=place, stderr=subprocess.PIPE, text=True)
    patience = Timer(SECONDS, server.kill)  # what it says ends with it
    patience.start()
    try:
        assert server.stderr is not None
        said = []
        address = None
        while address is None and (line := server.stderr.readline()):
            said.append(line)
            address = re.search(r"http://\S+", line)
        patience.cancel()
        assert address is not None, f"TensorBoard has no address after {SECONDS} seconds, and said: {''.join(said)}"
        yield address[0]
    finally:
        patience.cancel()
        server.terminate()
        server.communicate(timeout=SECONDS)
