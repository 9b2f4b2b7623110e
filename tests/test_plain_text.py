"""Texts of a run never act as commands on a terminal, a page or a spreadsheet."""

import csv
import io
import json
import logging
import os
import re
import shutil
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import Ended, command
from hostile import snapshot
from made_runs import accuracies, run
from markdown_it import MarkdownIt
from rich.table import Table
from rich.text import Text

import mtl
from mtl.cli.complaints import show
from mtl.process.screen import Screen
from mtl.report import report
from mtl.reporting import markdown
from mtl.reporting.svg import alone
from mtl.reporting.tidy import _cell
from mtl.reporting.writing import slug
from mtl.text import echo, log, plain
from mtl.training import checkpoint

ODD = "\x1b[31mred\x1b[0m \x1b]8;;http://x\x07 \x9b2J \x00 \x7f \x08 \r \x85 \u202e\u2066 \u200b\u200d\ufeff \u2028\u2029 \ud800 \U000e0041"
OBEYED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\U000e0000-\U000e007f]"
)


def test_what_is_invisible_is_written_out() -> None:
    """All characters of Unicode's categories of control, format, surrogates and separators of lines; no visible one."""
    for code in range(sys.maxunicode + 1):
        kind = unicodedata.category(chr(code))
        if kind in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            assert plain(chr(code)).isprintable(), hex(code)
        elif kind != "Cn":  # not given to any yet
            assert plain(chr(code)) == chr(code), hex(code)


def test_how_it_is_written_out() -> None:
    assert (
        plain("\x1b[1m\u202e\ud800\U000e0041é日本Δm − 😀\n\t")
        == "\\x1b[1m\\u202e\\ud800\\U000e0041é日本Δm − 😀\\x0a\\x09"
    )
    assert plain("a\nb\tc", keep="\n\t") == "a\nb\tc"
    assert plain(plain(ODD)) == plain(ODD)


def test_nothing_that_is_obeyed_leaves(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """By an error's text, a line of the log with its traceback, a printed line, or a complaint."""
    error = mtl.UserError(f"a run is called {ODD}\n  and more")
    assert not OBEYED.search(str(error))
    assert "\n  and more" in str(error)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    log.addHandler(handler)
    try:
        log.warning("%s: %s", Path(ODD), ODD)
        try:
            raise KeyError(ODD) from ValueError(ODD)
        except KeyError as raised:
            log.exception("a mistake of %s", ODD)
            show(raised, full=False, config_name="train")
    finally:
        log.removeHandler(handler)
    echo(f"one\n{ODD}")
    show(ValueError(ODD), full=True, config_name="train")
    show(mtl.UserError(ODD), full=False, config_name="train", where=ODD)
    out, err = capsys.readouterr()
    for text in (stream.getvalue(), out, err):
        assert "\\x1b[31mred" in text
        assert not OBEYED.search(text)
    assert "Traceback" in stream.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_the_screen_obeys_no_text(terminal: bool) -> None:
    stream = io.StringIO()
    screen = Screen(file=stream, force_terminal=terminal, width=400, color_system="standard" if terminal else None)
    table = Table(f"[red]{ODD}[/red]", title=f"{ODD} [link=http://x]y[/link]")
    table.add_row(f"[bold]x[/bold] :smile: {ODD}")
    table.add_row(Text(ODD, style="bold"))
    for each in (ODD, f"[red]{ODD}[/red] :skull:", table, Text(ODD, style="red")):
        screen.print(each, soft_wrap=True)
    text = stream.getvalue()
    for each in ("[red]", "[/red]", "[link=http://x]", "[bold]x[/bold] :smile:", ":skull:", "\\x1b]8;;http"):
        assert each in text
    own = re.sub(r"\x1b\[[0-9;]*m", "", text)  # rich's colours
    assert not OBEYED.search(own)
    assert ("\x1b[31m" in text) == terminal


def test_a_report_of_names_that_would_be_obeyed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of folders too, of which bytes need not be text."""
    text = ODD.replace("\ud800", "")  # which YAML can't hold
    names = [f"runs/\x1b[2J\u202e[red] {number}\n| x" for number in range(3)] + [os.fsdecode(b"runs/\xff\xfe")]
    for number, name in enumerate(names):
        run(
            Path(name),
            seed=number % 2,
            balancer=text if number > 1 else "equal",
            test={"a": {text: 0.5 + 0.1 * number, "[red]m[/red]": 0.1, "loss": 0.2}, "b": {"=1+1": 0.3}},
            config={"optimizer.\x1b[31mlr": f"{text}{number // 2}", "model.trunk._target_": text},
            curves={f"metric/a/{text[:9]}/val": {1: 0.5, 2: 0.6}, "loss/a/val": {1: 0.5, 2: 0.6}},
            problem=text,
            monitor=text,
            launcher=text,
            choices={"task": text, "balancer": f"{text}{number // 2}"},
            versions={"torch": f"{text}{number}"},
            cosine={f"a~{text}": {"mean": 0.1, "below_zero": 0.2, "steps": 10}},
            kinds={f"a/{text}": "max", "a/[red]m[/red]": "max", "a/loss": "min", "b/=1+1": "max"},
        )
    run(
        Path(f"runs/failed {re.sub('[/' + chr(0) + chr(0xD800) + ']', '', ODD)}"),
        status="failed",
        error=f"{ODD}\nsecond",
    )
    report([Path("runs")], out=Path("there"))
    files = [path for path in Path("there").rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".svg"]) >= 2
    for text in (capsys.readouterr().out, *(path.read_text(encoding="utf-8") for path in files)):
        assert not OBEYED.search(text)
        assert "\\x1b" in text or "\\\\x1b" in text
    page = (here / "there/report.html").read_text()
    assert "\\udcff\\udcfe" in page
    with pytest.raises(mtl.UserError, match="there is no method"):
        report([Path("runs")], reference=ODD)


def test_cells_that_would_be_formulas(here: Path) -> None:
    for formula in ("=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "\r=1", "\u3000=1", "＝1", "＋1", "－1", "＠x"):
        assert not re.match(r"\s*[=+\-@＝＋－＠]", str(_cell(formula))), formula
    assert _cell("=1+1") == "'=1+1"
    # Where a comma parts digits, spreadsheets part cells at semicolons, and know nothing of the quotes of another list.
    assert _cell("a;=1+1; @b;c") == "a;'=1+1;' @b;c"
    assert _cell('"=1+1') == "'\"=1+1"
    assert [_cell(value) for value in (-0.5, 3, None, "a=b", "lr-1", "")] == [-0.5, 3, None, "a=b", "lr-1", ""]
    for seed in range(2):
        run(Path(f"runs/{seed}"), seed=seed, problem="=cmd|' /C calc'!A0", test=accuracies(a=-0.5 - seed, b=0.5))
    report([Path("runs")])
    with open("runs/report/report.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert {line["problem"] for line in lines} == {"'=cmd|' /C calc'!A0"}
    (line,) = [line for line in lines if (line["task"], line["figure"]) == ("a", "accuracy")]
    assert float(line["mean"]) == -1.0
    assert float(line["low"]) < -1


def test_markdown_of_a_run_is_no_link_picture_or_person() -> None:
    texts = [
        "https://evil.example/x?a=b&c", "http://evil.example", "ftp://x.y", "www.evil.example", "WWW.evil.example",
        "<https://evil.example>", "[x](https://evil.example)", "![x](https://evil.example/x.png)", "<img src=x>",
        "mailto:a@evil.example", "a@evil.example", "@somebody", "&lt;b&gt; &#x202e; &#27;", "$\\href{x}{y}$", "x\u2028# y",
    ]  # fmt: skip
    text = markdown._plain(" ".join(texts))
    assert not re.search(r"(?<!\\):(?=//)|www\.|@\w|(?<!\\)[&$<](?!!--)", text, re.I)
    shown = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)
    assert set(re.findall(r"<[^>]*>", shown)) == {"<p>", "</p>", "<!-- -->"}
    assert "https://evil.example/x?a=b&amp;c" in shown
    assert "&amp;lt;b&amp;gt; &amp;#x202e; &amp;#27;" in shown


def test_names_of_pictures(here: Path) -> None:
    """Problems whose names are alike in a file's name, or too long for one, have pictures of their own."""
    for number, problem in enumerate(["a/b", "a b", "a-b-1", "x" * 300, "日本" * 200, "../../canary", "CON", ""]):
        run(Path(f"runs/{number}"), problem=problem, test=accuracies(a=0.1 * number, b=0.5))
    before = snapshot(here / "runs")
    report([Path("runs")], out=Path("there"))
    assert snapshot(here / "runs") == before
    pictures = re.findall(r"\((figures/[^)]+)\)", Path("there/report.md").read_text())
    assert len(set(pictures)) == len(pictures) == 8
    assert {f"figures/{path.name}" for path in Path("there/figures").iterdir()} == set(pictures)
    page = Path("there/report.html").read_text()
    anchors = re.findall(r'<h2 id="([^"]+)"', page)
    assert len(set(anchors)) == len(anchors) == 9  # with that on how the numbers are made
    assert re.findall(r'<a href="#([^"]+)"', page) == anchors
    assert len(slug("日本" * 200).encode()) < 200
    assert alone('<svg viewBox="0 0 1 1">var(--nothing) var(--ink)</svg>').count("var(--nothing)") == 1


def test_what_evaluation_and_a_new_start_say_of_a_run(trained: Ended, here: Path) -> None:
    """Names of metrics, parameters and classes that a checkpoint brings along."""
    assert trained.run is not None
    state = checkpoint.load(trained.run / "checkpoints/best.pt")
    state.pop("format")
    metrics = state["config"]["tasks"]["digit"]["metrics"]
    metrics[f"[red]{ODD}"] = metrics["accuracy"]
    state["model"][ODD] = torch.zeros(1)
    shutil.copytree(trained.run, "run")
    checkpoint.save(Path("run/checkpoints/best.pt"), state)
    ended = command("evaluate", "run=run")
    assert "size mismatch" in ended.err or ended.code in (0, 1)
    del state["model"][ODD]
    checkpoint.save(Path("run/checkpoints/best.pt"), state)
    again = command("evaluate", "run=run")
    assert again.code == 0, again.err
    assert "[red]\\x1b[31mred" in again.out.replace("\n", "")
    state["config"]["tasks"]["digit"]["metrics"] = {ODD: {"_target_": f"nothing.{ODD}"}}
    state["model"][ODD] = torch.zeros(1)
    checkpoint.save(Path("run/checkpoints/best.pt"), state)
    wrong = command("evaluate", "run=run")
    assert wrong.code == 1
    start = command("train", "task=mnist_two_head", "trainer.max_epochs=1", "init_from=run")
    assert start.code == 0, start.err
    assert "not used: \\x1b[31mred" in start.out
    assert start.run is not None
    for text in (
        ended.out,
        ended.err,
        again.out,
        again.err,
        wrong.err,
        start.out,
        (start.run / "train.log").read_text(),
    ):
        assert not OBEYED.search(text)


def test_what_is_said_of_a_run_that_is_to_go_on(trained: Ended, here: Path) -> None:
    assert trained.run is not None
    name = f"\x1b[31m\u202e {os.fsdecode(bytes([0xFF]))}"
    shutil.copytree(trained.run, f"runs/mnist_two_head/{name}")
    config = Path(f"runs/mnist_two_head/{name}/config.yaml")
    config.write_text(config.read_text() + f'odd: "{json.dumps(ODD)[1:-1]}"\n')
    auto = command("train", "task=mnist_two_head", "optimizer.lr=-1", "output_root=runs", "resume=auto")
    named = command("train", "task=mnist_two_head", "optimizer.lr=-1", f"resume='runs/mnist_two_head/{name}'")
    for ended in (auto, named):
        assert ended.code == 1
        assert not OBEYED.search(ended.out + ended.err)
