"""Files of any size and depth, with any numbers and types, among valid runs."""

import json
import os
from pathlib import Path

import pytest
import yaml
from hostile import at_most, good_runs, one_input, one_resume, snapshot
from made_runs import run

import mtl
from mtl.report import report
from mtl.reporting import curves, reading
from mtl.reporting.naming import _shorten, names
from mtl.reporting.reading import UNREADABLE
from mtl.runs.resume import config_of, finished
from mtl.safety.bounded import parse_json, read_json, read_lines, read_text, read_yaml

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 100))
YAML = {
    LAUGHS: "holds an alias, *a0, which mtl never writes",
    "seed: 0\n<<: &a {x: 1}\ny: *a\n": "holds an alias, *a, which mtl never writes",
    "[" * 100_000: "can't be read: while increasing flow level",
    "- " * 100_000: "is nested more than 100 levels deep",
    "a: " + "[" * 101 + "]" * 101: "is nested more than 100 levels deep",
    "a: " + "1:" * 40_000 + "1": "holds a value of more than 65536 characters",
    "a: " + "9" * 10_000: "holds a number of 10000 characters: 999",
    "a: 0x" + "f" * 10_000: "holds a number of 10002 characters: 0xfff",
    "".join(
        f"{(2**61 - 1) * n}: 1\n" for n in range(10**4, 8 * 10**4)
    ): "holds a number of 23 characters",  # of one hash
    "".join(f"k{n}: 1{':59' * 20_000}\n" for n in range(30)): "holds a number of 60001 characters",
    "a: 1" + ":59" * 10_000 + ".5": "holds a number of 30003 characters",
    "".join(f"%TAG !a{n}! x{n}:\n" for n in range(80_000)) + "---\na: 1\n": "holds a line that begins with %",
    "a: 99999999999999999999": "holds a whole number that isn't of 64 bits",
    "a: 2020-01-01": "holds a date, which mtl never writes",
    "a: !!binary aGVsbG8=": "holds a tag, tag:yaml.org,2002:binary, which mtl never writes",
    "a: !!set {b, c}": "holds a tag, tag:yaml.org,2002:set, which mtl never writes",
    "a: !!int ''": "holds a tag, tag:yaml.org,2002:int, which mtl never writes",
    "a: !!bool perhaps": "holds a tag, tag:yaml.org,2002:bool, which mtl never writes",
    "a: !!timestamp never": "holds a tag, tag:yaml.org,2002:timestamp, which mtl never writes",
    "a: !!python/object/apply:os.system ['touch canary']": "holds a tag, tag:yaml.org,2002:python/object/apply:os.system, which mtl never writes",
    "? [1, 2]\n: 3": "can't be read: while constructing a mapping",
    "a: *b": "holds an alias, *b",
    "a: \x1b": "can't be read",
    "{": "can't be read",
    "[1, 2]": "holds no mapping",
    "a: 1\n---\nb: 2": "can't be read",
    "\xff": "isn't text in UTF-8",
    "- x\n" * 300_000: "holds more than 200,000 values",
    "x" * (33 * 2**20): "is larger than 32 MB",
}
JSON = {
    "[" * 100_000: "is nested more than 100 levels deep",
    '{"a":' * 100_000: "is nested more than 100 levels deep",
    '{"a": ' + "[" * 101 + "]" * 101 + "}": "is nested more than 100 levels deep",
    '{"a": 1e999}': "can't be read: a number that no float holds: 1e999",
    '{"a": -1e999}': "can't be read: a number that no float holds: -1e999",
    '{"a": ' + "9" * 10_000 + "}": "can't be read: a whole number that isn't of 64 bits: 999",
    '{"a": 18446744073709551616}': "holds a whole number that isn't of 64 bits",
    "[1]": "holds no mapping",
    "3": "holds no mapping",
    "null": "holds no mapping",
    '{"status": "fin': "can't be read: Unterminated string",
    '{"a": nope}': "can't be read: Expecting value",
    "\xff": "isn't text in UTF-8",
    "[" + "0," * 1_100_000 + "0]": "holds more than 1,000,000 values",
    '{"a": "' + "x" * (33 * 2**20): "is larger than 32 MB",
}
OF_METRICS = {
    "steps": ["NaN", "-1", '"3"', "[1]", "1.5", "true"],
    "epochs": ['"x"'],
    "best": ["3", '{"value": "x"}', '{"mode": "up"}', '{"value": 1e300}', '{"monitor": [1]}'],
    "test": [
        "3",
        '{"a": 3}',
        '{"a": {"m": "x"}}',
        '{"a": {"m": 1e41}}',
        '{"a": {"m": [1]}}',
        '{"a": null}',
        '{"a": {"m": true}}',
    ],
    "val": ['{"' + "x" * 300 + '": {}}'],
    "kinds": ['{"a/m": "sideways"}', "[1]", '{"a/m": {}}'],
    "samples": ['{"test": "x"}', '{"test": -1}'],
    "fingerprints": ['{"test": [1]}', "7"],
    "cosine": ["3", '{"a~b": 3}', '{"a~b": {"mean": 1}}', '{"a~b": {"mean": NaN, "below_zero": 1}}', '{"a~b": {}}'],
    "versions": ["3", '{"torch": [1]}'],
    "choices": ["3", '{"task": {}}'],
    "arguments": ["3", "[3]"],
    **{name: ["3", "[1]"] for name in ("status", "problem", "error", "launcher")},
    **{name: ['"x"', "1e300", "{}", "NaN", "Infinity"] for name in ("seconds_per_step", "memory_per_step")},
}
OF_CONFIG = {
    "seed": [[1], "x", 1.5, None, True],
    "tasks": ["digit", [1], None, {"a": 3}, {"a b": {}}, {"\x1b": {}}, {"a": {"weight": "x"}}, {"a": {"weight": [1]}}],
    "trainer": [3, None, [1], {"monitor": [1]}, {"monitor": {"a": [1]}}],
    "only": [3, [[1]], {"a": 1}],
    "data": [3, [1]],
    "balancer": ["x", {"_target_": [1]}],
    "log": [3, {"every": "x"}],
    "model": [{"trunk": {"_target_": {"a": 1}}}],
}


def check(folder: Path, name: str, wanted: str) -> None:
    with at_most():
        found = reading.read(folder)
    assert found is not None
    assert found.status == UNREADABLE
    assert wanted in found.error, found.error
    assert found.error.startswith(f"{name}"), found.error


@pytest.mark.parametrize("text", YAML, ids=range(len(YAML)))
def test_a_config_that_explodes(here: Path, text: str) -> None:
    path = run(here / "bad") / "config.yaml"
    path.write_text(text, encoding="latin-1")
    check(path.parent, "config.yaml", YAML[text])
    with at_most(), pytest.raises(mtl.UserError, match=r"bad/config\.yaml "):
        config_of(path.parent)
    assert not Path("canary").exists()


@pytest.mark.parametrize("text", JSON, ids=range(len(JSON)))
def test_metrics_that_explode(here: Path, text: str) -> None:
    path = run(here / "bad") / "metrics.json"
    path.write_text(text, encoding="latin-1")
    check(path.parent, "metrics.json", JSON[text])
    with at_most(), pytest.raises(mtl.UserError, match=r"bad/metrics\.json "):
        finished(path.parent)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in OF_METRICS.items() for value in values])
def test_metrics_of_wrong_types(here: Path, key: str, value: str) -> None:
    path = run(here / "bad") / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics[key] = "here"
    path.write_text(json.dumps(metrics).replace('"here"', value))
    check(path.parent, "metrics.json", f"metrics.json: {key} is ")


@pytest.mark.parametrize(
    ("key", "value"),
    [pytest.param(key, value, id=f"{key}-{n}") for key, values in OF_CONFIG.items() for n, value in enumerate(values)],
)
def test_a_config_of_wrong_types(here: Path, key: str, value: object) -> None:
    path = run(here / "bad") / "config.yaml"
    config = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(config | {key: value}))
    check(path.parent, "config.yaml", "config.yaml")


def test_all_of_them_beside_good_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One report, in which the good ones are as if the others weren't there."""
    good_runs(here / "runs")
    report([Path("runs")], out=Path("alone"))
    kinds = {"config.yaml": YAML, "metrics.json": JSON}
    for name, texts in kinds.items():
        for number, text in enumerate(list(texts)[:-2]):
            (run(here / f"runs/bad {name} {number}") / name).write_text(text, encoding="latin-1")
    (here / "runs/report.d").mkdir()
    (here / "config.yaml").write_text("[" * 1000)  # of the folder above
    before = snapshot(here / "runs")
    with at_most():
        report([Path()], out=Path("there"))
    assert snapshot(here / "runs") == before
    bad = len(YAML) + len(JSON) - 4 + 1  # with the one above
    assert f"4 finished of {bad + 4} runs in" in Path("there/report.md").read_text()
    assert Path("there/report.csv").read_text() == Path("alone/report.csv").read_text()


def test_a_log_of_giant_lines(here: Path) -> None:
    folder = run(here / "one")
    lines = ["step,epoch,tag,value", "1,1,loss/a/train,0.5", "2" * 10**6, "2,1,loss/a/train,0.25", 'x,"y', "\0,\0"]
    lines += ["3,1,loss/a/train,1e308", "-1,1,loss/a/train,1", "9" * 400 + ",1,loss/a/train,1", "4,1,loss/a/train,nan"]
    lines += ["5,1,loss/a/train,inf", "x,1,loss/a/train,1", "6,1,cosine/a~b,"]
    (folder / "metrics.csv").write_text("\n".join(lines) + '\n7,1,"loss/a/train",1\n')
    with at_most():
        found = curves.read(folder)
    assert list(found) == ["loss/a/train"]
    assert found["loss/a/train"][0] == [1, 2, 4, 5, 7]
    assert found["loss/a/train"][1][:2] == [0.5, 0.25]
    with (folder / "metrics.csv").open("r+b") as file:
        file.truncate(2**40)
    assert curves.read(folder) == {}
    with (folder / "metrics.csv").open("r+b") as file:
        file.truncate(2**28)  # one line of NUL
    with at_most():
        assert curves.read(folder)["loss/a/train"][0] == [1, 2, 4, 5, 7]


def test_reading_within_bounds(here: Path) -> None:
    Path("x").write_text("one\ntwo\n" + "3" * 50 + "\nfour")
    assert list(read_lines(Path("x"), 100, 10)) == ["one\n", "two\n", "four"]
    assert list(read_lines(Path("x"), 100, 51))[2] == "3" * 50 + "\n"
    for read in (read_text, read_json, read_yaml, lambda path: list(read_lines(path, 10, 10))):
        with pytest.raises(FileNotFoundError):
            read(Path("nothing"))
    with pytest.raises(mtl.UserError, match="x is larger than"):
        list(read_lines(Path("x"), 10, 10))
    with pytest.raises(mtl.UserError, match="x is larger than"):
        read_text(Path("x"), 10)
    assert parse_json('{"a": [NaN, -Infinity, 1e308, 9223372036854775807]}', "x")["a"][2:] == [1e308, 2**63 - 1]
    Path("y").write_text("a: [1, 0.5, .nan, null, true, x, {2: b}]\n")
    assert read_yaml(Path("y"))["a"][3:] == [None, True, "x", {2: "b"}]


def test_a_file_that_mtl_wrote_is_read_as_omegaconf_reads_it(here: Path) -> None:
    """Numbers of all kinds, and texts that look like something else."""
    from omegaconf import OmegaConf

    texts = [
        "1e-3",
        "1_000",
        "0x1f",
        "0o7",
        "1:30",
        "2020-01-01",
        "yes",
        "on",
        "~",
        "null",
        ".5",
        "1.",
        "+1",
        "=",
        "<<",
        "é",
    ]
    config = {
        "numbers": [1e-3, 1e-10, 1e22, 1.5, 0.1, -0.0, 10**18, -3, 1e300, True, None],
        "texts": [
            *texts,
            "a: b",
            "- a",
            "#",
            "a\nb",
            "\t",
            " a ",
            "'",
            '"',
            "*a",
            "&a",
            "!a",
            "%a",
            "@a",
            "{}",
            "[]",
            "",
        ],
        "keys": dict.fromkeys(texts, 1),
    }
    Path("x.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)), encoding="utf-8")
    assert read_yaml(Path("x.yaml")) == config
    assert repr(read_yaml(Path("x.yaml"))) == repr(OmegaConf.to_container(OmegaConf.load("x.yaml")))


FUZZ = int(os.environ.get("MTL_FUZZ", "12"))


@pytest.mark.parametrize("number", range(FUZZ))
def test_a_run_that_was_changed_beside_good_ones(here: Path, number: int) -> None:
    """Bytes and values of its files; numbers of which the code of before failed."""
    chosen = [14, 43, 52, 67, 79, 108, 113, 138, 187, 258, 283, 846]
    what, wrong = one_input(here / "x", chosen[number] if number < len(chosen) else 1000 + number)
    assert wrong is None, (what, wrong)


def test_runs_and_multiruns_that_were_changed_beside_one_to_go_on_with(here: Path) -> None:
    for number in range(20 * FUZZ):
        what, wrong = one_resume(here / "x", number)
        assert wrong is None, (number, what, wrong)


def test_what_a_report_has_no_room_for(here: Path) -> None:
    """Far less than a file may hold; a table with a column for each, or a plot with a panel, would take minutes."""
    figures = {f"f{n}": 0.5 for n in range(5_001)}
    run(here / "figures", test={"a": figures, "b": {"accuracy": 0.5}})
    check(here / "figures", "metrics.json", "at most 5,000 figures in all")
    path = run(here / "tasks") / "config.yaml"
    whole = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(whole | {"tasks": {f"t{n}": {} for n in range(1_001)}}))
    check(here / "tasks", "config.yaml", "has 1,001 tasks; a report takes at most 1,000")
    path = run(here / "config") / "config.yaml"
    path.write_text(yaml.safe_dump(whole | {"vars": {f"k{n}": n for n in range(20_000)}}))
    check(here / "config", "config.yaml", "holds more than 20,000 values")


def test_names_of_configs_with_many_keys() -> None:
    configs = [{"model": {f"{side}{n}": {"x": n} for n in range(10_000)}, "y": side} for side in "ab"]
    with at_most(10):
        one, other = names(configs, [{}, {}])
    assert one.text != other.text
    assert one.settings["model.a7"] == "{'x': 7}"
    short = _shorten(["lr", "a.lr", "b.lr", "b.c.lr", "tasks.t.weight", "balancer.c", "data.size", "model.d.x"])
    assert short == {
        **{"lr": "lr", "a.lr": "a.lr", "b.lr": "b.lr", "b.c.lr": "c.lr", "tasks.t.weight": "t.weight"},
        **{"balancer.c": "balancer.c", "data.size": "size", "model.d.x": "x"},
    }
