"""Download files from the Hub into its cache, check their checksums, and upload folders.

A checksum is computed when a file is seen for the first time, and again only if the file has changed.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypedDict, Unpack

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is a re-export
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
)
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # a public re-export

from rd_torch.disk import write_whole
from rd_torch.levels import Reference
from rd_torch.weights.known import ON_HUB, PINNED_ON_FIRST_USE, PUBLISHED_MAPS
from rd_torch.weights.tensors import sha256_of

RECORD: Final = "rd_torch.json"
"""The file beside a repository's snapshots in the cache that holds what we know of the repository.

It holds the checksums of files, with the size and time that the files had then, and the first commit of a
repository that is pinned on first use.
"""


class MissingFileError(FileNotFoundError):
    """A repository, or its cache when there is no network, does not have a file.

    Another layout of weight files may be there instead; other errors of the Hub leave that open.
    """


class Fetched(NamedTuple):
    """A file in the cache, with the commit that it belongs to and its checksum."""

    path: Path
    commit: str
    sha256: str


@dataclass(frozen=True)
class Hub:
    """How to reach the Hub. `HF_HOME`, `HF_ENDPOINT`, `HF_HUB_OFFLINE` and `HF_TOKEN` count too.

    Attributes:
        cache_dir: folder of the cache; by default the Hub's own.
        local_files_only: whether to take files from the cache alone, without the network.
        trusted: names of models, folders or Hub ids, whose files may bring Python code that is run.

    Raises:
        TypeError: for `True` in place of names.
    """

    cache_dir: str | Path | None = None
    local_files_only: bool = False
    trusted: Collection[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.trusted, bool) and self.trusted:  # as transformers has it
            raise TypeError(
                "expected the names of models whose code may be run, got True: name them, as in "
                'trust_remote_code=["owner/model"]'
            )

    def trusts(self, name: str) -> bool:
        """Return whether Python code among the files of a model may be run.

        Args:
            name: the folder or Hub id, with or without `hf:`.
        """
        given = [self.trusted] if isinstance(self.trusted, str) else self.trusted or ()
        return _place_of(name) in map(_place_of, given)

    def fetch(self, reference: Reference, filename: str) -> Fetched:
        """Find a file of a repository in the cache, or download it.

        For repositories that are pinned on first use, the commit of the first download holds from then on, so
        that a later change of the main branch is not taken.

        Args:
            reference: the repository, its revision and the checksums that are known.
            filename: path of the file in the repository.

        Returns:
            The file in the cache, its commit and its checksum.

        Raises:
            MissingFileError: if the repository, or without network the cache, does not have the file.
            FileNotFoundError: if the network fails and the file is not in the cache.
            OSError: if the disk fails.
            ValueError: for another checksum than the known one, or than that of the first download.
        """  # noqa: DOC501  # the others are caught here
        repo = reference.repo
        cache = Path(self.cache_dir or constants.HF_HUB_CACHE).expanduser().absolute()
        folder = cache / f"models--{repo.replace('/', '--')}"
        pins_first = repo in PINNED_ON_FIRST_USE and reference.revision is None
        try:
            path = Path(
                hf_hub_download(
                    repo,
                    filename,
                    revision=_read_record(folder).get("commit") if pins_first else reference.revision,
                    cache_dir=cache,
                    local_files_only=self.local_files_only,
                )
            )
        except (EntryNotFoundError, HFValidationError, HTTPError, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise  # the error is the disk's, not the Hub's
            is_missing = self._is_offline or _says_file_is_absent(error)
            raise (MissingFileError if is_missing else FileNotFoundError)(
                _failure_message(repo, filename, error)
            ) from error
        commit = path.parents[len(Path(filename).parts) - 1].name
        sha256 = _verify(folder, path, f"{commit}/{filename}", reference.sha256.get(filename))
        if pins_first:
            _remember(folder, commit=commit)
        return Fetched(path, commit, sha256)

    def fetch_folder(self, reference: Reference, folder: str) -> Path:
        """Find a folder of a repository in the cache, or download all its files.

        Args:
            reference: the repository and its revision.
            folder: path of the folder in the repository.

        Returns:
            The folder in the cache.

        Raises:
            FileNotFoundError: if the network fails and the folder is not in the cache.
            MissingFileError: if the repository does not have the folder.
        """
        try:
            root = snapshot_download(
                reference.repo,
                revision=reference.revision,
                cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
                allow_patterns=f"{folder}/*",
            )
        except (HFValidationError, HTTPError, OSError) as error:
            raise FileNotFoundError(_failure_message(reference.repo, folder, error)) from error
        if not (Path(root) / folder).is_dir():
            raise MissingFileError(
                f"expected the folder {folder} in the repository {reference.repo}, got none there or in the "
                "cache"
            )
        return Path(root) / folder

    @property
    def _is_offline(self) -> bool:
        return self.local_files_only or constants.HF_HUB_OFFLINE


def _place_of(name: str) -> str:
    """Return a model's name in the form in which names are compared: a folder's whole path, or the Hub id."""
    name = str(name).removeprefix("hf:")
    return str(Path(name).resolve()) if Path(name).exists() else name


def _says_file_is_absent(error: Exception) -> bool:
    """Return whether the Hub answered that the repository does not have the file."""
    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)


def _failure_message(repo: str, filename: str, error: Exception) -> str:
    """Return the message for a file that could not be fetched, with what to do about it."""
    if _says_file_is_absent(error):
        return f"expected {filename} in the repository {repo}, got a repository without it"
    levels = {each.repo: level for family in ON_HUB.values() for level, each in family.items()}
    is_published = repo in levels or repo == PUBLISHED_MAPS
    command = f"rd-torch download {levels.get(repo, 'LEVEL')}" if is_published else f"hf download {repo}"
    return (
        f"expected {filename} of {repo} from the Hub or its cache, got it from neither: run `{command}` on a "
        f"machine with network; the Hub said: {error}"
    )


def _verify(folder: Path, path: Path, name: str, known: str | None) -> str:
    """Return a file's checksum if it is the known one or, without one, that of the first download.

    Args:
        folder: the repository's folder in the cache.
        path: the file in the cache.
        name: the file's commit and path in the repository; another commit may have another file.
        known: the checksum to compare with, if one is known.

    Raises:
        ValueError: for another checksum.
    """
    seen = _read_record(folder).get("files", {}).get(name)
    stat = path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    if seen and seen["stamp"] == stamp and known in (None, seen["sha256"]):
        return str(seen["sha256"])
    got = sha256_of(path)
    expected = known or (seen and seen["sha256"])
    if expected and got != expected:
        raise ValueError(
            f"expected sha256 {expected} of {name}, got {got}: the file is not loaded; delete {path} and "
            f"{path.resolve()} and download it again"
        )
    repo = folder.name.removeprefix("models--").replace("--", "/")
    if repo in PINNED_ON_FIRST_USE and not expected:
        warnings.warn(
            f"no checksum of {name} in {repo} is known: sha256 {got} of this first download is kept in "
            f"{folder / RECORD}, and a file with another one will be refused",
            stacklevel=5,
        )
    _remember(folder, files={name: {"sha256": got, "stamp": stamp}})
    return got


def _read_record(folder: Path) -> dict[str, Any]:
    """Return what the record holds of a repository; nothing if there is no record or it cannot be read."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _remember(folder: Path, *, files: Mapping[str, Any] | None = None, commit: str | None = None) -> None:
    """Add checksums of files to the record, and a commit if it has none; not if the cache is read-only."""
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
    """Options of an upload, with the names that the Hub's own functions give them.

    Attributes:
        private: whether a repository that is made is private.
        token: the access token; by default that of `hf auth login` or `HF_TOKEN`.
        revision: the branch to upload to, which is made if it does not exist; by default the main branch.
        commit_message: message of the commit.
    """

    private: bool
    token: str
    revision: str
    commit_message: str


def upload(folder: Path, repo: str, **options: Unpack[Upload]) -> str:
    """Upload a folder to a repository on the Hub, which is made if it does not exist.

    Args:
        folder: the folder.
        repo: name of the repository, `"owner/name"`.
        **options: see `Upload`.

    Returns:
        The address of the commit.
    """
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
        # Of an earlier chain, which this one may not have.
        delete_patterns=["backbones/*", "reconstruction.safetensors"],
    )
    return commit.commit_url
