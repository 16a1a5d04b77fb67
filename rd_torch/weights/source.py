"""Names to folders: a local folder, a checkpoint that ships with the package, or a Hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

DEFAULT_MODEL: Final = "esm2-rd-mini"
"""The shipped family that everything runs on unless another is named."""

_PACKAGE: Final = Path(__file__).parents[1]
_SHELVES: Final = (_PACKAGE / "checkpoints", _PACKAGE.parent / "checkpoints")


def shipped() -> dict[str, Path]:
    """Checkpoints that come with the package, by name: inside it, or beside it in a source tree."""
    return {
        config.parent.name: config.parent
        for shelf in _SHELVES
        for config in sorted(shelf.glob("*/config.json"))
    }


def locate(name_or_folder: str | Path) -> Path:
    """The folder of a checkpoint: one that is there, a shipped one by name, or one from the Hub.

    Raises:
        FileNotFoundError: when it is none of these.
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    name = str(name_or_folder)
    if name in shipped():
        return shipped()[name]
    expected = (
        f"expected a checkpoint folder, a shipped one ({', '.join(shipped())}) or a Hub id, got {name!r}"
    )
    if name.count("/") != 1 or isinstance(name_or_folder, Path):
        raise FileNotFoundError(expected)
    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"{expected}; the Hub said: {error}") from error
