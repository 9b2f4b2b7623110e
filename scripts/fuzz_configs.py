"""Runs the fuzz test of configs with a chosen number of cases.

python scripts/fuzz_configs.py [--cases 5000]
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Runs pytest on the fuzz test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    options = parser.parse_args()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_fuzz.py"]
    environment = os.environ | {"MTL_FUZZ": str(options.cases)}
    sys.exit(subprocess.run(command, cwd=Path(__file__).parents[1], env=environment).returncode)


if __name__ == "__main__":
    main()
