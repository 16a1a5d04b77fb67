"""Files from the Hub: fetched into its cache, checked once, pinned where a checksum is known."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypedDict, Unpack

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is a re-export
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # a public re-export

from rd_torch.config import Reference
from rd_torch.disk import write_whole
from rd_torch.weights.known import ESM2_ON_HUB, FIRST_KEPT, PUBLISHED_MAPS
from rd_torch.weights.tensors import sha256_of

RECORD: Final = "rd_torch.json"
"""Beside a repository's snapshots in the cache: checksums of its files, and the commit that came first."""


class MissingFileError(FileNotFoundError):
    """A repository, or without network its cache, does not have the file: another layout may be there."""


class Fetched(NamedTuple):
    """A file of the cache, the commit it belongs to and its checksum."""

    path: Path
    commit: str
    sha256: str


@dataclass(frozen=True)
class Hub:
    """How to reach the Hub; `HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and `HF_TOKEN` count too.

    Attributes:
        cache_dir: folder of the cache; by default the Hub's own.
        local_files_only: take what is cached, never the network.
    """

    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def fetch(self, reference: Reference, filename: str) -> Fetched:
        """A file of a repository, downloaded if need be and checked the first time it is seen.

        Of published repositories without a known checksum the commit that came first is kept: a later
        change of their main branch is not taken, other bytes under the same name are refused.

        Raises:
            MissingFileError: when the repository has no such file, or without network the cache.
            FileNotFoundError: when the network fails and nothing is cached.
            ValueError: when its checksum is another than the known or first one.
        """
        repo = reference.repo
        cache = Path(self.cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()
        folder = cache / f"models--{repo.replace('/', '--')}"
        keep = repo in FIRST_KEPT and reference.revision is None
        try:
            path = Path(
                hf_hub_download(
                    repo,
                    filename,
                    revision=_read_record(folder).get("commit") if keep else reference.revision,
                    cache_dir=cache,
                    local_files_only=self.local_files_only,
                )
            )
        except (EntryNotFoundError, HFValidationError, HTTPError, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise  # the disk's, not the Hub's
            lacking = self._is_offline or _says_there_is_none(error)
            raise (MissingFileError if lacking else FileNotFoundError)(
                _explain(repo, filename, error)
            ) from error
        commit = path.parents[len(Path(filename).parts) - 1].name
        sha256 = _check(folder, path, f"{commit}/{filename}", reference.sha256.get(filename))
        if keep:
            _remember(folder, commit=commit)
        return Fetched(path, commit, sha256)

    @property
    def _is_offline(self) -> bool:
        return self.local_files_only or constants.HF_HUB_OFFLINE


def _says_there_is_none(error: Exception) -> bool:
    """Whether the Hub answered that the repository has no such file."""
    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)


def _explain(repo: str, filename: str, error: Exception) -> str:
    """What to do about a file that did not come."""
    if _says_there_is_none(error):
        return f"expected {filename} in the repository {repo}, got a repository without it"
    levels = {reference.repo: level for level, reference in ESM2_ON_HUB.items()}
    ours = repo in levels or repo == PUBLISHED_MAPS
    command = f"rd-torch download {levels.get(repo, 'LEVEL')}" if ours else f"hf download {repo}"
    return (
        f"expected {filename} of {repo} from the Hub or its cache, got neither: where there is network, run "
        f"`{command}`; the Hub said: {error}"
    )


def _check(folder: Path, path: Path, name: str, known: str | None) -> str:
    """A file's checksum, compared with the known one or, at the same commit, the one that came first."""
    seen = _read_record(folder).get("files", {}).get(name)
    stat = path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    if seen and seen["stamp"] == stamp and known in (None, seen["sha256"]):
        return str(seen["sha256"])
    got = sha256_of(path)
    expected = known or (seen and seen["sha256"])
    if expected and got != expected:
        raise ValueError(
            f"expected sha256 {expected} of {name}, got {got}: it is not loaded; delete {path} and "
            f"{path.resolve()} and download it again"
        )
    repo = folder.name.removeprefix("models--").replace("--", "/")
    if repo in FIRST_KEPT and not expected:
        warnings.warn(
            f"no checksum of {name} in {repo} is known: sha256 {got}, its first, is kept in "
            f"{folder / RECORD}, and other bytes will be refused",
            stacklevel=5,
        )
    _remember(folder, files={name: {"sha256": got, "stamp": stamp}})
    return got


def _read_record(folder: Path) -> dict[str, Any]:
    """What is remembered of a repository; nothing where nothing reads."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _remember(folder: Path, *, files: Mapping[str, Any] | None = None, commit: str | None = None) -> None:
    """Adds to the record, a commit only if there is none; a cache that is read-only stays without."""
    if not os.access(folder, os.W_OK):
        return
    # The Hub's own kind of lock: other users of a shared cache may take it, and it needs no flock.
    with WeakFileLock(folder / f"{RECORD}.lock"):
        record = _read_record(folder)
        changed = {**record, "files": {**record.get("files", {}), **(files or {})}}
        if commit:
            changed.setdefault("commit", commit)
        if changed != record:
            text = json.dumps(changed, indent=1)
            write_whole(folder / RECORD, lambda part: part.write_text(text), durable=False)


class Upload(TypedDict, total=False):
    """Options of an upload, as the Hub's own functions have them."""

    private: bool
    token: str
    revision: str
    commit_message: str


def upload(folder: Path, repo: str, **options: Unpack[Upload]) -> str:
    """Uploads a folder to a repository or a branch of it, made if need be; the address of the commit."""
    api = HfApi(token=options.get("token"))
    revision = options.get("revision")
    api.create_repo(repo, private=options.get("private"), exist_ok=True)
    if revision:
        api.create_branch(repo, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        revision=revision,
        commit_message=options.get("commit_message", "Upload a reverse-distilled chain"),
        delete_patterns="backbones/*",  # those of an earlier chain
    )
    return commit.commit_url
