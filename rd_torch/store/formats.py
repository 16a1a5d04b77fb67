"""The formats of a store: each is a file of its own and a line here."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rd_torch.store.format import Format

FORMATS: Final = {
    "h5": ("hdf5", "HDF5"),
    "parquet": ("parquet", "Parquet"),
    "pt": ("fairesm", "FairESM"),
}
"""File and class of each format, by its name.

A format is loaded when it is asked for, so that the command line, which lists the names, need not wait for
torch, h5py and pyarrow. A store is opened by the first format that claims it.
"""


def load_format(name: str) -> Format:
    """Load a format.

    Args:
        name: one of the names in `FORMATS`.

    Returns:
        The format.
    """
    file, kind = FORMATS[name]
    form: Format = getattr(import_module(f"rd_torch.store.{file}"), kind)()
    return form


def format_of(path: str | Path, name: str | None = None) -> Format:
    """Load the format in which a store is written.

    Args:
        path: the store; the ending of its name tells the format.
        name: name of the format, in place of the ending.

    Returns:
        The format.

    Raises:
        ValueError: for a format that does not exist.
    """
    wanted = name or Path(path).suffix.removeprefix(".").replace("hdf5", "h5")
    if wanted not in FORMATS:
        raise ValueError(
            f"expected an output that ends in {', '.join(f'.{each}' for each in FORMATS)}, or a format of "
            f"{', '.join(FORMATS)}, got {str(path)!r}"
        )
    return load_format(wanted)
