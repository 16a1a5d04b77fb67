"""`open_store`: opens an embedding file or folder, whichever format it has."""

from __future__ import annotations

from pathlib import Path

from rd_torch.disk import part_folder
from rd_torch.store.format import Format
from rd_torch.store.formats import FORMATS, load_format
from rd_torch.store.store import Store


def open_store(path: str | Path) -> Store:
    """Open an embedding file or folder of any format, whether this package or another program wrote it.

    That is an HDF5 file with one dataset for each protein, a folder of parquet files that this package wrote,
    or a folder of `.pt` files as fair-esm's `extract.py` writes them.

    Args:
        path: the file or folder.

    Returns:
        A `Store`, which reads embeddings by identifier, place or slice, at any width, as numpy or torch, and
        does not read the rest.

    Raises:
        FileNotFoundError: where there is nothing at the path.
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
    forms = map(load_format, FORMATS)
    return next(form for form in forms if form.claims(path)).open(path)


def open_finished(form: Format, path: Path) -> Store:
    """Open the finished store that this package has written at a path.

    Args:
        form: the store's format.
        path: the file or folder.

    Returns:
        The store, which has facts.

    Raises:
        ValueError: where something else is there.
    """
    wanted = f"expected nothing or an embedding of rd_torch's at {path}"
    try:
        store = form.open(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{wanted}, got something else: choose another output ({error})") from error
    if store.facts is None:
        store.close()
        raise ValueError(f"{wanted}, got another program's: choose another output")
    return store
