"""Embedding files: what is in them, written so that a kill costs little, read by any prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from rd_torch.disk import part_folder
from rd_torch.store.facts import Facts, SaveDtype
from rd_torch.store.fairesm import FairESM
from rd_torch.store.format import Format, Row
from rd_torch.store.hdf5 import HDF5
from rd_torch.store.naming import Names
from rd_torch.store.parquet import Parquet
from rd_torch.store.shards import Shard
from rd_torch.store.store import Store
from rd_torch.store.windows import Record, Window, cut_windows, gather
from rd_torch.store.work import Work

__all__ = [
    "FORMATS",
    "Facts",
    "Format",
    "Names",
    "Record",
    "Row",
    "SaveDtype",
    "Shard",
    "Store",
    "Window",
    "Work",
    "cut_windows",
    "format_of",
    "gather",
    "open_store",
]

FORMATS: Final[dict[str, Format]] = {form.name: form for form in (HDF5(), Parquet(), FairESM())}


def format_of(path: str | Path, name: str | None = None) -> Format:
    """The format of that name, or of the path's suffix.

    Raises:
        ValueError: for a format that does not exist.
    """
    wanted = name or Path(path).suffix.removeprefix(".").replace("hdf5", "h5")
    if wanted not in FORMATS:
        raise ValueError(
            f"expected an output that ends in {', '.join(f'.{each}' for each in FORMATS)}, or a format of "
            f"{', '.join(FORMATS)}, got {str(path)!r}"
        )
    return FORMATS[wanted]


def open_store(path: str | Path) -> Store:
    """Opens an embedding file or folder of any format, ours or other programs'.

    An HDF5 file with a dataset a protein, a folder of our parquet files, or a folder of `.pt` files as
    fair-esm's `extract.py` writes them.

    Args:
        path: the file or folder.

    Returns:
        A `Store`: by identifier, place or slice, at any width, as numpy or torch, without reading the rest.

    Raises:
        FileNotFoundError: where nothing is.
        ValueError: for anything else.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
        >>> _ = rd_torch.embed_to_store(model, [("one", "MQIFVK"), ("two", "MKV")], "proteins.h5")
        >>> with rd_torch.open_store("proteins.h5") as store:
        ...     store["one"].shape, store.read(["two", "one"], width=48).shape
        ((128,), (2, 48))
    """
    path = Path(path)
    if not path.exists():
        unfinished = part_folder(path).is_dir()
        cure = ": it is unfinished, run the same command again" if unfinished else ""
        raise FileNotFoundError(f"expected an embedding file or folder at {path}, got nothing there{cure}")
    if path.is_file():
        return FORMATS["h5"].open(path)
    return FORMATS["parquet" if any(path.glob("*.parquet")) else "pt"].open(path)
