"""Error messages for the files of public data sets."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtl.errors import UserError, describe_error


@contextmanager
def files_of(name: str, folder: Path, files: str, page: str, *, download: bool) -> Iterator[None]:
    """Turns any error in the block into a message about the files that the data set needs and where to get them.

    Raises:
        UserError: If the block raises any other exception than a UserError, which passes unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torchvision and its readers raise many types for missing or damaged files
        other = "could be neither read nor downloaded" if download else "can't be read"
        way = "" if download else ", let them be downloaded with data.download=true,"
        raise UserError(
            f"{name}: its files {other} in {folder.resolve()} ({describe_error(error)}). This folder must contain "
            f"{files}, undamaged: get them from {page}{way} or name another folder with data.root=…"
        ) from error
