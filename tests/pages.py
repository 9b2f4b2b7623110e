"""The pages of the documentation (README.md, docs/ and examples/), with their commands, files and snippets."""

import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from conftest import ROOT

GENERATED = ("toy.md", "multi_mnist.md", "balancing_cost.md", "burgers.md")  # scripts write them, from hours of runs
FILE = re.compile(r"(?:# @package _global_\n)?# (mine/\S+)\n")  # a block that begins so is a file of that name
INSTALLS = "pip install"


@dataclass(frozen=True)
class Page:
    """One file of the documentation, by its path in the repository."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def generated(self) -> bool:
        return self.path.name in GENERATED

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def blocks(self) -> list[tuple[str, str]]:
        """The language and the text of each fenced block, without blocks that include another file."""
        found = re.findall(r"^```(\w+)[^\n]*\n(.*?)^```$", self.text, re.M | re.S)
        return [(kind, text) for kind, text in found if "--8<--" not in text]

    @property
    def files(self) -> dict[str, str]:
        """The files that the page shows, by name."""
        return {named[1]: text for _, text in self.blocks if (named := FILE.match(text))}

    @property
    def to_run(self) -> Iterator[tuple[str, str]]:
        """The Python snippets and the shell commands, in order."""
        for kind, text in self.blocks:
            if FILE.match(text) or INSTALLS in text:
                continue
            if kind == "python":
                yield kind, text
            elif kind == "bash":
                yield from ((kind, command) for command in commands(text))


def commands(text: str) -> list[str]:
    """Returns the commands of a shell block; a function, or lines joined by backslashes, count as one command."""
    joined = re.sub(r"\\\n\s*", "", text)
    return re.findall(r"^\w+\(\) \{\n(?:.*\n)*?\}\n|^.+$", joined, re.M)


PAGES = [
    Page(path)
    for path in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / "examples").rglob("*.md")),
    )
]


def data_of_ones_own(folder: Path) -> None:
    """Writes the data that the problems of the pages use."""
    from PIL import Image

    draws = random.Random(0)
    rows = ["area,year,district,price,rooms,kind"]
    for _ in range(300):
        area, year, district = (
            draws.uniform(30, 200),
            draws.randint(1900, 2020),
            draws.choice(["north", "south", "east"]),
        )
        price = round(area * 3 + (year - 1900) + 100 * (district == "south"), 1)
        kind = "villa" if area > 150 else "house" if area > 80 else "flat"
        cells = [f"{area:.1f}", str(year), district, str(price), str(round(area / 25)), kind]
        rows.append(",".join("" if draws.random() < 0.1 else cell for cell in cells))
    (folder / "houses.csv").write_text("\n".join(rows) + "\n")
    for name, count in (("people.csv", 200), ("new.csv", 50)):
        people = ["age,city,income,smoker"]
        for _ in range(count):
            age, city = draws.randint(18, 80), draws.choice(["Bern", "Basel", "Chur"])
            people.append(f"{age},{city},{1000 + 50 * age},{'yes' if age + draws.randint(-20, 20) < 40 else 'no'}")
        (folder / name).write_text("\n".join(people) + "\n")
    (folder / "pictures").mkdir()
    labels = ["file,fruit,weight"]
    for number in range(40):
        fruit = draws.choice(["apple", "banana"])
        Image.new("RGB", (32, 32), (200, 30 if fruit == "apple" else 200, 30)).save(folder / f"pictures/{number}.png")
        labels.append(f"{number}.png,{fruit},{draws.uniform(1, 2):.2f}")
    (folder / "labels.csv").write_text("\n".join(labels) + "\n")


def made_scenes(folder: Path) -> None:
    """Writes the data sets that docs/howto/dense.md makes with a script of the checkout."""
    for kind in ("nyuv2", "cityscapes", "taskonomy"):
        few = ["--train", "12", "--val", "4", "--kind", kind]
        script = [sys.executable, str(ROOT / "scripts/make_dense.py"), f"data/{kind}", *few]
        subprocess.run(script, cwd=folder, check=True)


def made_logs(folder: Path) -> None:
    """Writes the data sets that docs/howto/recommenders.md makes with a script of the checkout."""
    for name, kind in (("ml-1m", "movielens"), ("ali-ccp", "aliccp")):
        few = ["--rows", "1000", "--kind", kind]
        script = [sys.executable, str(ROOT / "scripts/make_recommender.py"), f"data/{name}", *few]
        subprocess.run(script, cwd=folder, check=True)


def write_files(folder: Path) -> None:
    """Writes the data and the files that any page shows, since how-to pages build on each other."""
    data_of_ones_own(folder)
    made_scenes(folder)
    made_logs(folder)
    for page in PAGES:
        for name, text in page.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
