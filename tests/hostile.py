"""Folders of runs as somebody might send them, damaged by accident or on purpose."""

import json
import logging
import os
import random
import shutil
import signal
import stat
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from made_runs import accuracies, run

from mtl.cli.sweep import Sweep
from mtl.errors import UserError
from mtl.report import report
from mtl.runs.resume import newest_unfinished

HANGS = 60  # seconds; other processes may be at work
SLOW = 10  # seconds of work, of which a report of a few runs takes one
CURVES = {
    **{
        f"loss/{task}/{split}": {step: 1 / step for step in range(1, 40)} for task in "ab" for split in ("train", "val")
    },
    **{"metric/a/accuracy/val": {10: 0.3, 20: 0.5}, "cosine/a~b": {step: (-1) ** step / step for step in range(1, 40)}},
}
COSINE = {"a~b": {"mean": -0.1, "below_zero": 0.6, "steps": 30}}


def good_runs(folder: Path) -> None:
    """Writes two methods with two seeds each, which can be compared."""
    for seed in range(2):
        for name in ("equal", "upgrad"):
            figures = accuracies(a=0.5 + 0.01 * seed, b=0.6 + 0.02 * seed + 0.01 * (name == "equal"))
            run(folder / f"{name}{seed}", seed=seed, balancer=name, test=figures, curves=CURVES, cosine=COSINE)


def snapshot(folder: Path) -> dict[str, tuple[str, Any]]:
    """Returns all content of the folder and its subfolders, without following links."""
    found: dict[str, tuple[str, Any]] = {}
    for place, below, files in os.walk(folder):
        for name in [*below, *files]:
            path = Path(place) / name
            kind = path.lstat().st_mode
            if stat.S_ISLNK(kind):
                found[str(path)] = ("link", os.readlink(path))
            elif stat.S_ISREG(kind):
                found[str(path)] = ("file", path.read_bytes())
            else:
                found[str(path)] = (oct(stat.S_IFMT(kind)), None)
    return found


@contextmanager
def at_most(seconds: int = HANGS) -> Iterator[None]:
    """Lets the code in the context fail if it takes longer than this, since it probably hangs."""

    def hangs(*_: object) -> None:
        raise AssertionError(f"it took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Literal:
    """Text that is written into the file unchanged."""

    def __init__(self, text: str) -> None:
        self.text = text


VALUES: list[Any] = [
    *(None, True, -1, 0, 3, 0.5, -1e-320, 1e300, -1e38, 2**63, float("nan"), float("inf"), "", "x", "a" * 5000),
    *(
        "\x1b[31mred",
        "\x1b]0;title\x07",
        "\u202eabc",
        "\ud800",
        "=1+1",
        "a\nb",
        "[red]x[/red]",
        "<script>",
        "var(--zz)",
    ),
    *([], {}, [1], ["a", None], {"a": 1}, {"x": {"y": None}}, {"_target_": 3}, {"_target_": "x", "lr": [[]]}),
    *(
        Literal("1e999"),
        Literal("-1e999"),
        Literal("9" * 10_000),
        Literal("[" * 500 + "]" * 500),
        Literal("0x" + "f" * 9999),
    ),
]
KEYS = ["", " ", "a.b", "\x1b[2J", "weight", "_target_", "x" * 400, "a~b", "=cmd", "loss", "1"]


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Returns the paths to all nested values."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def exchanged(tree: Any, draws: random.Random) -> tuple[Any, dict[str, str]]:
    """Returns the tree with one or two values replaced, renamed or removed, and the texts for literals in it."""
    literals: dict[str, str] = {}
    for _ in range(draws.choice([1, 1, 2])):
        there = list(places(tree))
        if not there:
            break
        *path, last = draws.choice(there)
        node = tree
        for key in path:
            node = node[key]
        how = draws.choice(["value", "value", "value", "key", "gone"])
        if how == "gone":
            del node[last]
        elif how == "key" and isinstance(node, dict):
            node[draws.choice(KEYS)] = node.pop(last)
        else:
            value = draws.choice(VALUES)
            if isinstance(value, Literal):
                literals[f"literal-{len(literals)}"] = value.text
                value = f"literal-{len(literals) - 1}"
            node[last] = value
    return tree, literals


def written(tree: Any, literals: dict[str, str], dump: Callable[[Any], str]) -> bytes:
    text = dump(tree)
    for name, literal in literals.items():
        text = text.replace(f'"{name}"', literal).replace(name, literal)
    return text.encode("utf-8", errors="surrogatepass")


def spoilt(content: bytes, draws: random.Random) -> bytes:
    """Returns the content with a few bytes changed, removed or inserted."""
    content = bytearray(content)
    for _ in range(draws.choice([1, 1, 3, 20])):
        at = draws.randrange(len(content) + 1)
        how = draws.choice(["bit", "byte", "cut", "in", "out"])
        if how == "bit" and at < len(content):
            content[at] ^= 1 << draws.randrange(8)
        elif how == "byte" and at < len(content):
            content[at] = draws.randrange(256)
        elif how == "cut":
            del content[at:]
        elif how == "in":
            content[at:at] = draws.randbytes(draws.choice([1, 5, 300]))
        else:
            del content[at : at + draws.choice([1, 5, 100])]
    return bytes(content)


LINES = ["1,1,loss/a/train,nan", "1,1,loss/a/train,1e308", "9" * 400 + ",1,loss/a/train,1", "-5,1,cosine/a~b,0.1"]
LINES += [
    "0,1,cosine/a~b,1",
    'x,"',
    "1" * 200_000,
    "\0",
    "1,1,loss/\x1b[31m/train,1",
    "5,1,loss/a/val,inf",
    ",,,",
    "2,1,cosine/a~b,-1e308",
]


def mutated(folder: Path, draws: random.Random) -> str:
    """Changes one file of a run; returns a description of the change."""
    name = draws.choice(["metrics.json"] * 5 + ["config.yaml"] * 5 + ["metrics.csv"] * 2)
    path = folder / name
    if draws.random() < 0.3:
        path.write_bytes(spoilt(path.read_bytes(), draws))
        return f"{name}: bytes"
    if name == "metrics.json":
        path.write_bytes(written(*exchanged(json.loads(path.read_text()), draws), json.dumps))
    elif name == "config.yaml":
        unaliased = yaml.safe_dump
        path.write_bytes(written(*exchanged(yaml.safe_load(path.read_text()), draws), unaliased))
    else:
        lines = path.read_text().splitlines()
        for _ in range(draws.choice([1, 5])):
            lines.insert(draws.randrange(len(lines) + 1), draws.choice(LINES))
        path.write_text("\n".join(lines) + "\n")
    return f"{name}: values"


def one_input(folder: Path, number: int) -> tuple[str, str | None]:
    """Makes a report of good runs and a bad one; returns the change, and the error if there was one."""
    draws = random.Random(number)
    shutil.rmtree(folder, ignore_errors=True)
    good_runs(folder / "runs")
    kind = draws.choice(["third seed", "another method", "alone", "failed"])
    bad = {
        "third seed": {"seed": 2},
        "another method": {"balancer": "bad"},
        "alone": {"tasks": ["a"]},
        "failed": {"status": "failed", "error": "x"},
    }
    run(folder / "runs/bad", curves=CURVES, cosine=COSINE, **bad[kind])
    what = f"{mutated(folder / 'runs/bad', draws)} of {kind}"
    began = time.process_time()  # another process may be at work beside it
    try:
        with warnings.catch_warnings(), at_most():
            warnings.simplefilter("ignore")
            report([folder / "runs"])
    except UserError as error:
        return what, f"nothing is reported: {error}"
    except Exception as error:
        return what, f"{type(error).__name__}: {str(error)[:200]}"
    if time.process_time() - began > SLOW:
        return what, "slow"
    text = (folder / "runs/report/report.md").read_text(encoding="utf-8")
    missing = [name for name in ("equal0", "equal1", "upgrad0", "upgrad1") if f"runs/{name} |" not in text]
    for each in (folder / "runs/report").rglob("*.*"):
        odd = {c for c in each.read_text(encoding="utf-8") if (ord(c) < 32 and c != "\n") or c in "\x7f\x9b\u202e"}
        if odd:
            return what, f"{each.name} holds {odd}"
    return what, f"missing: {missing}" if missing else None


def one_resume(folder: Path, number: int) -> tuple[str, str | None]:
    """Searches for the run and the multirun to resume, after a newer one of each was changed."""
    draws = random.Random(number)
    shutil.rmtree(folder, ignore_errors=True)
    good = run(folder / "runs/2020", status="running", curves=CURVES)
    ours = yaml.safe_load((good / "config.yaml").read_text()) | {"vars": {}}
    bad = run(folder / "runs/2030", status="running", curves=CURVES)
    typed = ["-m", "task=made", "seed=0,1"]
    for year in ("2020", "2030"):
        (folder / "multirun" / year).mkdir(parents=True)
        (folder / "multirun" / year / "sweep.json").write_text(json.dumps({"arguments": typed, "fixed": typed[:2]}))
        lines = [{"by": "new", "job": f"{n}_x", "outcome": "done", "value": 0.5} for n in range(3)]
        (folder / "multirun" / year / "jobs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    what = mutated(bad, draws)
    name = draws.choice(["sweep.json", "jobs.jsonl"])
    path = folder / "multirun/2030" / name
    if name == "sweep.json" and draws.random() < 0.7:
        path.write_bytes(written(*exchanged(json.loads(path.read_text()), draws), json.dumps))
    elif draws.random() < 0.5:
        path.write_bytes(spoilt(path.read_bytes(), draws))
    else:
        path.write_text(draws.choice(["[" * 100_000, "9" * 10_000, "[1]\n3\n", '{"by": []}', "\0\0", ""]))
    what += f", {name}"
    try:
        with at_most(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("mtl").setLevel(logging.ERROR)
            found = newest_unfinished(folder / "runs", ours)
            sweep = Sweep(typed, "new")
            chosen = sweep.choose_folder(str(folder / "multirun"), "auto")
            sweep.noted(folder / "multirun/2030")
    except Exception as error:
        return what, f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        logging.getLogger("mtl").setLevel(logging.NOTSET)
    if found not in (good, bad):
        return what, f"found {found}"
    return what, None if Path(chosen).name in ("2020", "2030") else f"a new multirun: {chosen}"


if __name__ == "__main__":
    import sys
    import tempfile
    from collections import Counter
    from contextlib import redirect_stdout

    first, last = int(sys.argv[1]), int(sys.argv[2])
    one = one_resume if "resume" in sys.argv else one_input
    failures: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        for number in range(first, last):
            with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
                what, wrong = one(Path(place) / "x", number)
            tried[what.split(" of ")[0]] += 1
            if wrong is not None:
                failures[what.split(" of ")[0]] += 1
                print(number, what, "|", wrong.replace("\n", " ")[:160], flush=True)
    print({kind: f"{failures[kind]} of {count}" for kind, count in tried.items()})
