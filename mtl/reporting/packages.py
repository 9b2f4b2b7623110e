"""Checks for the packages that only reports need."""

from importlib import import_module

from mtl.errors import UserError

PACKAGES = ("moocore", "scipy")


def check_packages() -> None:
    """Checks that the packages are installed, before any run is read.

    Raises:
        UserError: If one is missing; the message has the command that installs the packages.
    """
    missing = []
    for package in PACKAGES:
        try:
            import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise UserError(
            f"mtl.report needs the package{'s' * (len(missing) > 1)} {' and '.join(missing)}: "
            'pip install "mtl-train[report]"'
        )
