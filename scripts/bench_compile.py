"""Compares the time of steps with compiled and with eager modules, in interleaved rounds.

    python scripts/bench_compile.py [--rounds 5] [--steps 5]

All cases use one thread, four tasks and AdamW. The processor's time is measured, so that other processes disturb it
less, and the best of all rounds counts. The first step, which compiles the modules and compares them with eager ones,
is shown by itself, in time by the clock.
"""

import argparse
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import mtl


class Transformer(nn.Module):
    """Encoder layers over the rows of images."""

    def __init__(self, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Linear(28, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the mean over the rows, (N, width)."""
        return self.encoder(self.embedding(x)).mean(1)


class Gated(nn.Module):
    """Residual blocks over the rows of images, with many operations on elements between the linear layers."""

    def __init__(self, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Linear(28, width)
        self.up = nn.ModuleList([nn.Linear(width, 2 * width) for _ in range(layers)])
        self.down = nn.ModuleList([nn.Linear(width, width) for _ in range(layers)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the mean over the rows, (N, width)."""
        x = self.embedding(x)
        for up, down in zip(self.up, self.down, strict=True):
            normalised = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            gate, value = up(normalised).chunk(2, -1)
            x = x + down(value * gate * torch.sigmoid(1.702 * gate)) * 0.5
        return x.mean(1)


def mlp(width: int = 512, layers: int = 4) -> nn.Module:
    """Returns linear layers with norms and activations over flat images."""
    first, *others = [nn.Linear(28 * 28, width), *[nn.Linear(width, width) for _ in range(layers - 1)]]
    modules: list[nn.Module] = [nn.Flatten(), first]
    for linear in others:
        modules += [nn.LayerNorm(width), nn.GELU(), linear]
    return nn.Sequential(*modules)


TRUNKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "MLP": (mlp, 512),
    "transformer": (Transformer, 128),
    "gated": (Gated, 64),
}


def step_of(trunk: str, balancer: str, *, compile: bool) -> mtl.Step:
    """Returns a step of four tasks over the trunk."""
    torch.manual_seed(0)
    build, width = TRUNKS[trunk]
    tasks = [mtl.Task(f"t{i}", head=nn.Linear(width, 10), loss=nn.CrossEntropyLoss(), target=f"y{i}") for i in range(4)]
    model = mtl.MultiTaskModel(build(), tasks, inputs=["x"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return mtl.Step(model, tasks, optimizer, balancer=getattr(mtl.balancers, balancer)(), compile=compile)


def seconds(step: mtl.Step, batch: dict[str, torch.Tensor], count: int) -> float:
    """Returns the processor's seconds per step."""
    start = time.process_time()
    for _ in range(count):
        step(batch)
    return (time.process_time() - start) / count


def main() -> None:
    """Prints a table of times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    batch = {"x": torch.randn(64, 28, 28)} | {f"y{i}": torch.randint(0, 10, (64,)) for i in range(4)}
    table = Table("trunk", "balancer", "eager, ms", "compiled, ms", "ratio", "first compiled step, s")
    for trunk in TRUNKS:
        for balancer in ("Equal", "UPGrad"):
            eager, compiled = (step_of(trunk, balancer, compile=flag) for flag in (False, True))
            seconds(eager, batch, 1)
            start = time.perf_counter()
            compiled(batch)
            first = time.perf_counter() - start
            rounds = [
                (seconds(eager, batch, arguments.steps), seconds(compiled, batch, arguments.steps))
                for _ in range(arguments.rounds)
            ]
            best, other = (min(times) for times in zip(*rounds, strict=True))
            shown = (f"{best * 1e3:.1f}", f"{other * 1e3:.1f}", f"{best / other:.2f}", f"{first:.0f}")
            table.add_row(trunk, balancer, *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
