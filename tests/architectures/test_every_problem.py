"""Every architecture with every problem, from the command line: a step, or a refusal in a sentence."""

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, command, slow_but, stopping
from every import ARCHITECTURES
from PIL import Image
from test_dense import MADE
from test_public import write_celeba, write_cifar, write_pets

SMALL_IMAGES = ["model/trunk=cnn", "model.trunk.in_channels=3", "model.trunk.widths=[4,5,6]", "data.num_workers=0"]
MAPS = [*SMALL_IMAGES, "model.trunk.pooled=false"]
OPTIONS = {
    "celeba": [*SMALL_IMAGES, "data.size=16"],
    "cifar100": SMALL_IMAGES,
    "cityscapes": [*MAPS, "data.batch_size=2"],
    "made_ctr": ["data.num_samples=3000"],
    "made_ctr_chain": ["data.num_samples=3000"],
    "nyuv2": [*MAPS, "data.batch_size=2"],
    "office31": [*SMALL_IMAGES, "data.batch_size=4"],
    "office_home": [*SMALL_IMAGES, "data.batch_size=4"],
    "pets": [*MAPS, "data.size=[16,16]", "data.batch_size=4"],
}
OFFICE = {
    "office31": ["amazon/images", "dslr/images", "webcam/images"],
    "office_home": ["Art", "Clipart", "Product", "Real World"],
}
TASKS = sorted(path.stem for path in (ROOT / "configs" / "task").glob("*.yaml"))
OWN = ("burgers", "mnist_two_source", "office31", "office_home")  # tasks with objectives or data of their own
CHAINS = ("made_ctr_chain",)  # problems whose tasks are a chain of events
QUICK = [("mnist_two_source", "cross_stitch"), ("made_ctr", "ple"), ("made_ctr", "separate"), ("burgers", "mtan")]
NAMES = sorted([*ARCHITECTURES, "hard_sharing"])


def write_data(task: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes a few samples in the layout of the problem's data, if they aren't part of mtl."""
    root = here / "data"
    if task == "celeba":
        write_celeba(root, monkeypatch)
    elif task == "cifar100":
        write_cifar(root, monkeypatch)
    elif task == "pets":
        write_pets(root)
    elif task in ("nyuv2", "cityscapes"):
        MADE.write(root / task, task, {"train": 12, "val": 2}, (32, 32), 0)
    for domain in OFFICE.get(task, ()):
        for name in ("mug", "pen"):
            for index in range(8):
                path = root / domain / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((24, 24, 3), 20 * index, np.uint8)).save(path)


@pytest.mark.parametrize(("task", "name"), slow_but(QUICK, [(task, name) for task in TASKS for name in NAMES]))
def test_a_step_or_a_sentence(here: Path, monkeypatch: pytest.MonkeyPatch, task: str, name: str) -> None:
    """The first lines of a run say which passes it makes."""
    write_data(task, here, monkeypatch)
    done = command("train", f"task={task}", f"model={name}", *OPTIONS.get(task, []), "log.every=1", *stopping(1))
    said = " ".join(done.err.split())
    if name in ("aitm", "esmm") and task not in CHAINS:
        assert done.code == 1
        needed = (
            f"{name.upper()} needs a chain of events",
            "is missing wherever 'click' is 0",
            "at least 2 stages",
            "which can't happen without it",
        )
        assert any(each in said for each in needed)
    elif task == "burgers" and name != "hard_sharing":
        assert done.code == 1
        assert "take model=hard_sharing" in said
    else:
        assert done.code == 143, said
        assert "Stopped at step 1" in done.out
        (passes,) = (line for line in done.out.split("Stopped")[0].splitlines() if line.startswith("passes   "))
        if task in OWN:
            assert passes.startswith("passes   one for each objective and each source")
        else:
            assert passes.startswith("passes   sequential, " if name == "separate" else "passes   shared, one trunk")
            assert passes.endswith("; the tasks share no module") == (name == "separate")
