"""Read what raw embeddings are reconstructed from, in a folder here or in a repository on the Hub."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path

from rd_torch.config import RDConfig
from rd_torch.levels import Reference
from rd_torch.reconstruct import Reconstructor, reconstruction_shapes
from rd_torch.weights.folder import CONFIG, RECONSTRUCTION, read_config
from rd_torch.weights.hub import Hub, MissingFileError
from rd_torch.weights.tensors import Tensors, read_tensors


def reconstructor_in(folder: Path, levels: Collection[str]) -> Reconstructor | None:
    """Map what a checkpoint's folder holds of some levels; None where it holds nothing of the kind.

    It is mapped now, so that a file that replaces this one is not taken for it later.
    """
    config = read_config(folder / CONFIG)
    found = read_reconstruction(folder / RECONSTRUCTION, config)
    return Reconstructor(partial(dict, found)) if found and set(levels) <= set(config.widths) else None


def reconstructor_on(hub: Hub, reference: Reference, levels: Collection[str]) -> Reconstructor:
    """Return a reconstructor that downloads what a checkpoint holds of some levels when it is asked for."""
    return Reconstructor(partial(_fetch, hub, reference, tuple(levels)))


def _fetch(hub: Hub, reference: Reference, levels: Collection[str]) -> Tensors | None:
    """Download and read what a repository holds; None where it holds nothing of the kind."""
    config = read_config(hub.fetch(reference, CONFIG).path)
    if not set(levels) <= set(config.widths):  # the first backbone, taken at another layer
        return None
    try:
        path = hub.fetch(reference, RECONSTRUCTION).path
    except MissingFileError:
        return None
    return read_reconstruction(path, config)


def read_reconstruction(path: Path, config: RDConfig) -> Tensors | None:
    """Read from what raw embeddings are reconstructed; numbers are mapped into memory until they are used.

    Args:
        path: the file `reconstruction.safetensors`.
        config: the config of the whole checkpoint, which says what shapes the tensors have.

    Returns:
        The tensors by name; None where there is no such file, as in checkpoints of earlier versions.

    Raises:
        ValueError: for a file that is cut off, or has other tensors than the config says.
    """
    if not path.exists():
        return None
    tensors = dict(read_tensors(path))
    expected, got = reconstruction_shapes(config), {name: tuple(part.shape) for name, part in tensors.items()}
    if got != expected:
        raise ValueError(f"expected tensors of shapes {expected} in {path}, got {got}")
    return tensors
