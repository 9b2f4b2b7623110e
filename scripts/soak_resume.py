"""Kills a training process at random moments, resumes it each time, and compares the result with an undisturbed run.

    python scripts/soak_resume.py [--rounds 10] [--seed 0]

Each round runs the corresponding test of the test suite, with 10 kills, at other moments.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Runs the test once for each round, until it fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "tests/runs/test_resume.py",
        "-m",
        "slow",
        "-k",
        "killed",
    ]
    for number in range(options.rounds):
        environment = os.environ | {"MTL_KILLS": str(options.seed + number)}
        if subprocess.run(command, cwd=Path(__file__).parents[1], env=environment).returncode:
            sys.exit(f"round {number}, --seed {options.seed + number}")


if __name__ == "__main__":
    main()
