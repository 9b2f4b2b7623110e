"""Explains why a user's file isn't imported: another module, of Python or of a package, has the same name."""

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

from mtl.errors import is_users


def shadowed(parts: Sequence[str], *, defining: bool) -> str:
    """Returns the end of an error message if a user's file is shadowed by another module of the same name.

    Args:
        parts: The parts of the dotted name in `_target_`.
        defining: Whether to consider only files that define the name and only modules that aren't the user's.
    """
    top, inner = parts[0], parts[1]
    module = sys.modules.get(top)
    origin = getattr(module, "__file__", None)
    if origin is None and hasattr(module, "__path__"):
        return ""  # a namespace package merges folders
    if defining and (top == "mtl" or (origin is not None and is_users(origin))):
        return ""
    loaded = Path(origin).resolve() if origin is not None else None
    for folder in sys.path:
        package = Path(folder or ".", top)
        files = (package.with_name(f"{top}.py"), package / "__init__.py", package / f"{inner}.py")
        file = next((path for path in files if path.is_file()), None)
        if file is None or not is_users(str(file)) or loaded in (file.resolve(), package.resolve() / "__init__.py"):
            continue
        if not defining or file.stem == inner or inner in _names(file):
            kind = "Python's own" if top in sys.stdlib_module_names else f"the one in {origin}"
            return f": '{top}' is {kind}, and your {file} isn't read; give the file another name"
    return ""


def _names(path: Path) -> set[str]:
    """Returns the names that the file defines or imports at the top level."""
    try:
        nodes = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return set()
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    for node in nodes:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names
