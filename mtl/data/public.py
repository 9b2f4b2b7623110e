"""What public data sets have in common: files that one has, or doesn't."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtl.errors import UserError, told


@contextmanager
def files_of(name: str, folder: Path, files: str, page: str, *, download: bool) -> Iterator[None]:
    """Says of any error in the block which files the data set needs, where, and where they are to be had.

    Raises:
        UserError: for any other error.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever torchvision and its readers make of a file that is missing or damaged
        other = "could be neither read nor downloaded" if download else "can't be read"
        way = "" if download else ", let them be downloaded with data.download=true,"
        raise UserError(
            f"{name}: its files {other} in {folder.resolve()} ({told(error)}). It must hold {files}, whole: get them "
            f"from {page}{way} or name another folder with data.root=…"
        ) from error
