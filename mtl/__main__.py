"""The command `mtl`: `mtl train task=…` is `python -m mtl.train task=…`."""

import runpy
import sys

import mtl
from mtl.errors import suggest

COMMANDS = {
    "train": "train a problem",
    "evaluate": "evaluate a trained model",
    "graph": "show what autograd builds",
    "report": "compare finished runs",
}


def main() -> None:
    """Runs the entry point that the first argument names."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        commands = [f"  mtl {name:<10}{text}" for name, text in {**COMMANDS, "--version": "print the version"}.items()]
        print("\n".join(["mtl COMMAND [options]", "", *commands]))
        sys.exit(0 if len(sys.argv) > 1 else 2)
    if command == "--version":
        print(f"mtl {mtl.__version__}")
        sys.exit()
    if command not in COMMANDS:
        sys.exit(f"mtl: there is no command '{command}'" + suggest(command, COMMANDS))
    sys.path.insert(0, "")  # as with `python -m`: modules in the current folder are found
    sys.argv = [f"mtl {command}", *sys.argv[2:]]
    runpy.run_module(f"mtl.{command}", run_name="__main__")


if __name__ == "__main__":
    main()
