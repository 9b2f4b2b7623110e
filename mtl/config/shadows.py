"""Files of the user's own that aren't read, since a module of Python's or of a package has their name."""

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

from mtl.errors import is_users


def shadowed(parts: Sequence[str], *, defining: bool) -> str:
    """The tail of a message, where a file of the user's isn't read since another module of its name comes first.

    Args:
        parts: of the target's name.
        defining: whether only a file counts in which the name is defined, and only a module that isn't the user's.
    """
    top, inner = parts[0], parts[1]
    module = sys.modules.get(top)
    origin = getattr(module, "__file__", None)
    if origin is None and hasattr(module, "__path__"):
        return ""  # folders without a file of their own are one module together
    if defining and (top == "mtl" or (origin is not None and is_users(origin))):
        return ""
    loaded = Path(origin).resolve() if origin is not None else None
    for folder in sys.path:
        package = Path(folder or ".", top)
        files = (package.with_name(f"{top}.py"), package / "__init__.py", package / f"{inner}.py")
        own = next((path for path in files if path.is_file()), None)
        if own is None or not is_users(str(own)) or loaded in (own.resolve(), package.resolve() / "__init__.py"):
            continue
        if not defining or own.stem == inner or inner in _names(own):
            kind = "Python's own" if top in sys.stdlib_module_names else f"the one in {origin}"
            return f": '{top}' is {kind}, and your {own} isn't read; give the file another name"
    return ""


def _names(path: Path) -> set[str]:
    """What the file defines or imports at its top."""
    try:
        nodes = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return set()
    found = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    for node in nodes:
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found
