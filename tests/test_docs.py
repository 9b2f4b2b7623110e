"""Every command and snippet of README.md, docs/ and examples/, and the site that is built from docs/."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Ended, command
from pages import PAGES, Page, commands, write_files
from test_readme import HANGS, environment, run

import mtl
from mtl import graph, schema, train

RUNNABLE = [page for page in PAGES if next(page.to_run, None)]
TRAININGS = ("python -m mtl.train ", "python -m mtl.graph ")


def page(name: str) -> Page:
    (found,) = [page for page in PAGES if page.name == name]
    return found


def starts_tensorboard(command: str, folder: Path) -> None:
    """Stops the command when it prints its address, since it would run until it is stopped."""
    process = subprocess.Popen(
        [*command.split(), "--port", "0"], cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        assert any("http://" in line for line in process.stderr)
    finally:
        process.terminate()
        process.communicate(timeout=HANGS)


def prepared(page: Page, folder: Path, trained: Ended) -> Path:
    """Returns the folder for the page's commands, with the files of all pages or the example's, and one run."""
    if page.name.startswith("examples/"):
        shutil.copytree(page.path.parent, folder / "example")
        return folder / "example"
    write_files(folder)
    assert trained.run is not None
    shutil.copytree(trained.run, folder / "outputs/mnist_two_head/2026-01-01_00-00-00-0000")
    return folder


def test_no_command_is_repeated_and_files_agree() -> None:
    lines = Counter(line for page in PAGES for kind, line in page.to_run if kind == "bash" and "RUN=" not in line)
    assert [line for line, count in lines.items() if count > 1] == []
    files: dict[str, str] = {}
    for each in PAGES:
        for name, text in each.files.items():
            assert files.setdefault(name, text) == text, f"{name} is another one in {each.name}"


def test_all_blocks_are_of_a_known_kind() -> None:
    """What only shows output or syntax is text; what is YAML is a file that is used."""
    for each in PAGES:
        assert {kind for kind, _ in each.blocks} <= {"bash", "python", "yaml", "text"}, each.name
        for kind, text in each.blocks:
            if kind == "python":
                compile(text, each.name, "exec")
            if kind == "yaml" and each.name != "README.md":
                assert text in each.files.values(), (each.name, text)


def test_commands_of_a_block() -> None:
    text = 'RUN=x\na \\\n  b\n_f() {\n    local x="}"\n    y\n}\ncomplete -F _f f\n'
    assert commands(text) == ["RUN=x", "a b", '_f() {\n    local x="}"\n    y\n}\n', "complete -F _f f"]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_every_training_composes_to_a_config_that_is_right(
    page: Page, here: Path, trained: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each job of each command, by Hydra; that they train as well is for the slow test."""
    lines = [line for kind, line in page.to_run if kind == "bash" and line.startswith(TRAININGS)]
    if not lines:
        pytest.skip("the page has no training")
    monkeypatch.chdir(prepared(page, here, trained))
    checked: list[object] = []
    monkeypatch.setattr(train, "train", lambda composed: checked.append(schema.check(composed)))
    monkeypatch.setattr(graph, "graph", lambda composed: checked.append(schema.check_graph(composed)))
    for line in lines:
        module, *arguments = shlex.split(line.replace("$RUN", str(trained.run)))[2:]
        if "+sweep=optuna" in arguments:
            continue
        if any(argument.startswith("+sweep=") for argument in arguments):  # not three times each
            arguments = [*(a for a in arguments if not a.startswith("seed=")), "seed=0"]
        arguments = [a for a in arguments if not a.startswith("hydra/launcher=")]  # in this process
        before = len(checked)
        ended = command(module.removeprefix("mtl."), *arguments)
        assert ended.code == 0, (arguments, ended.err)
        assert len(checked) > before or "--cfg" in arguments, arguments


def test_the_loop_without_hydra_runs(tmp_path: Path) -> None:
    (loop,) = [text for kind, text in page("README.md").to_run if kind == "python" and "step(batch)" in text]
    run([sys.executable, "-c", loop], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in RUNNABLE if not page.generated], ids=lambda page: page.name)
def test_every_command_and_snippet_runs(page: Page, tmp_path: Path, trained: Ended) -> None:
    """As they are on the page, in order, in a folder of the page's own; but the sweeps train for one epoch."""
    folder = prepared(page, tmp_path, trained)
    script = "set -euo pipefail\n"
    for kind, text in page.to_run:
        if kind == "python":
            run([sys.executable, "-c", text], folder)
        elif text.startswith("tensorboard"):
            starts_tensorboard(text, folder)
        elif re.match(r"\w+=|_\w+\(|complete ", text):
            script += text + "\n"
            run(["bash", "-c", script], folder)
        else:
            run(["bash", "-c", script + re.sub(r"max_epochs=[25] (?=\+sweep)", "max_epochs=1 ", text)], folder)


@pytest.mark.slow
def test_the_two_loops_agree(tmp_path: Path) -> None:
    """The loop by hand and that of mtl end with the same weights."""
    by_hand, ours = (text for kind, text in page("docs/from/loop.md").to_run if kind == "python")
    assert run([sys.executable, "-c", by_hand], tmp_path) == run([sys.executable, "-c", ours], tmp_path)


def test_the_table_of_an_example_is_what_its_script_writes(tmp_path: Path) -> None:
    folder = ROOT / "examples/sensors"
    shutil.copy(folder / "make_machines.py", tmp_path)
    run([sys.executable, "make_machines.py"], tmp_path)
    assert (tmp_path / "machines.csv").read_bytes() == (folder / "machines.csv").read_bytes()


def test_lengths_that_are_promised() -> None:
    (module,) = [
        text for kind, text in page("docs/howto/own_loop.md").blocks if kind == "python" and "class Digits" in text
    ]
    body = module.split("class Digits")[1].split("\n\n\n")[0]
    assert len([line for line in body.splitlines() if line.strip()]) <= 15
    files = {name: text for each in PAGES for name, text in each.files.items()}
    for case in ("houses", "fruit", "two_sets", "partly", "mirrored"):
        text = files[f"mine/task/{case}.yaml"] + files.get(f"mine/{case}.py", "")
        assert 5 < len([line for line in text.splitlines() if line.strip()]) <= 30, case


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash isn't there")
@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("mtl train task=mnist_two", {"task=mnist_two_head", "task=mnist_two_model", "task=mnist_two_source"}),
        ("mtl graph task=mnist_two_head balancer=u", {"balancer=upgrad", "balancer=uw", "balancer=uw_so"}),
    ],
)
def test_the_tab_key_completes(tmp_path: Path, typed: str, completed: set[str]) -> None:
    (block,) = [text for kind, text in page("docs/howto/command_line.md").blocks if "_mtl()" in text]
    words = " ".join(map(shlex.quote, typed.split()))
    script = f"{block}\nCOMP_LINE={shlex.quote(typed)} COMP_WORDS=({words}) COMP_CWORD={len(typed.split()) - 1}\n"
    shown = run(["bash", "-c", f'{script}_mtl\nprintf "%s\\n" "${{COMPREPLY[@]}}"'], tmp_path)
    assert set(shown.split()) == completed


def test_the_reference_has_every_public_name_and_config() -> None:
    for module in ("architectures", "balancers", "data", "distributed", "heads", "losses", "trunks"):
        text = page(f"docs/reference/{module}.md").text
        shown = set(re.findall(rf"^::: mtl\.{module}\.(\w+)$", text, re.M))
        assert shown == set(getattr(mtl, module).__all__), module
    index = page("docs/reference/index.md").text
    names = {name for name in mtl.__all__ if name[0].isupper() or name == "load"}
    assert set(re.findall(r"^\| \[`mtl\.(\w+)`\]\(\1\.md\) \|", index, re.M)) == set(mtl.__all__) - names
    assert set(re.findall(r"^::: mtl\.(\w+)$", page("docs/reference/mtl.md").text, re.M)) == names
    (row,) = re.findall(r"^\| \[`mtl`\]\(mtl\.md\) \| (.+) \|$", index, re.M)
    assert set(re.findall(r"`(\w+)`", row)) == names
    configs = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "task"}
    assert set(re.findall(r'--8<-- "(.+)"', page("docs/reference/configs.md").text)) == configs


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs isn't there")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 40
    for built in pages:
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?([^\s\">]+)", built.read_text())
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|preconnect)[^>]*href=\"?([^\s\">]+)", built.read_text())
        assert not [url for url in loaded if re.match(r"(?:https?:)?//", url)], built.name


def test_the_public_ci_tests_what_the_package_promises() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    versions = {text.rsplit(" ", 1)[1] for text in project["classifiers"] if "Python :: 3." in text}
    assert set(matrix["python"]) | {each["python"] for each in matrix["include"]} == versions
    lowest = {each["torch"] for each in matrix["include"]} - {"newest"}
    assert all(f"torch>={version.removesuffix('.0')},<3" in project["dependencies"] for version in lowest)
    assert {each.split("-")[0] for each in matrix["os"]} == {"ubuntu", "macos"}


def test_settings_of_other_tools_can_be_read() -> None:
    for name in (".pre-commit-config.yaml", "CITATION.cff", *_templates()):
        assert yaml.safe_load((ROOT / name).read_text()), name
    assert os.access(ROOT / ".ci/run", os.X_OK)


def _templates() -> list[str]:
    found = sorted(str(path.relative_to(ROOT)) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert len(found) >= 2
    return found
