"""`search_to_file`: what a search finds as a table, written so that a kill costs one window of queries."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Unpack

from rd_torch.disk import part_folder, require_folder, take_lock, write_whole
from rd_torch.model import RDModel
from rd_torch.searching.finding import Finder
from rd_torch.searching.hits import USUAL, Hit, Transferred
from rd_torch.searching.index import Index
from rd_torch.searching.jobs import SearchOptions, windows_of
from rd_torch.searching.labels import Labels, LabelTransfer
from rd_torch.store import Failure, Names, Window, failure_list, write_failures

SUFFIXES: Final = (".tsv", ".jsonl")
SETTINGS_FILE: Final = "settings.json"
DIGITS: Final = 6

Found = Hit | Transferred
Progress = Callable[[int, bool], object]


class Report(NamedTuple):
    """What there is to say of a table that was written.

    Attributes:
        failures: the queries that could not be embedded, by name.
        threshold: smallest similarity that counts as near, where labels were transferred; infinite for none.
        strangers: share of proteins of unknown labels that would be given one, where labels were transferred.
    """

    failures: dict[str, Failure]
    threshold: float | None = None
    strangers: float | None = None


def search_to_file(  # noqa: PLR0913
    model: RDModel,
    proteins: Iterable[Any],
    index: Index,
    output: str | Path,
    *,
    columns: Sequence[str] = USUAL,
    labels: Labels | None = None,
    least: float = 0.5,
    progress: Progress = lambda residues, before: None,
    **options: Unpack[SearchOptions],
) -> Report:
    """Search, and write a table of what was found. One that is there is replaced when the new one is whole.

    The same call after a kill goes on where it was: what is found of a window of queries lies in
    `<output>.part` until the table is whole. Queries that cannot be embedded are left out, and
    `<output>.failed.tsv` lists them with their lines and the reasons.

    Args:
        model: the model that made the stores of the index.
        proteins: as in `search`.
        index: the index.
        output: the table: `.tsv` with a header row, or `.jsonl` with an object in each line.
        columns: columns of the table of hits, among the fields of `Hit`; labels have those of `Transferred`.
        labels: if given, labels are transferred, as by `transfer_labels`, and the table is of them.
        least: reliability below which nothing counts as near.
        progress: function that is called with a number of residues that are done, and with True if an earlier
            run did them, else False.
        **options: as in `search`. A table that was begun goes on with the `tokens_per_batch` that it was
            begun with, unless it is given.

    Returns:
        The queries that could not be embedded, and from which similarity on proteins counted as near.

    Raises:
        FileNotFoundError: where the folder of the output does not exist.
        BlockingIOError: where another process writes the same output.
        ValueError: as in `search`; for another suffix, no queries, and an output that was begun otherwise.
    """
    output = Path(output)
    if output.suffix not in SUFFIXES:
        raise ValueError(f"expected an output that ends in {' or '.join(SUFFIXES)}, got {str(output)!r}")
    require_folder(output)
    folder = part_folder(output)
    if options.get("tokens_per_batch") is None:
        options["tokens_per_batch"] = _begun(folder).get("tokens_per_batch")
    finder = Finder(model, index, **options)
    transfer = None if labels is None else LabelTransfer(finder, labels, least)
    fields = Transferred._fields if transfer else tuple(columns)

    def found_in(window: Window[str], reasons: dict[int, str]) -> str:
        """Return the lines of a table for a window of queries."""
        found = transfer.labels(window, reasons) if transfer else finder.hits(window, reasons)
        return "".join(_line(each, fields, output.suffix) for each in found)

    folder.mkdir(exist_ok=True)
    lock = take_lock(folder, output)
    try:
        _begin(folder, output, _settings(finder, labels, least, fields))
        parts, failures = _fill(folder, windows_of(proteins, model, Names(str)), found_in, progress)
        write_whole(output, lambda path: _join(path, parts, fields if output.suffix == ".tsv" else ()))
        write_failures(failure_list(output), list(failures.items()))
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        lock.release()
    return Report(failures, transfer.threshold, transfer.strangers) if transfer else Report(failures)


def _fill(
    folder: Path,
    windows: Iterable[Window[str]],
    found_in: Callable[[Window[str], dict[int, str]], str],
    progress: Progress,
) -> tuple[list[Path], dict[str, Failure]]:
    """Write what is found of each window into a file of its own, unless an earlier run has done it.

    Returns:
        The files, and the queries that could not be embedded.

    Raises:
        ValueError: for no windows.
    """
    parts: list[Path] = []
    failures: dict[str, Failure] = {}
    for window in windows:
        part = folder / f"{window.number:06d}-{window.checksum}"
        failed = part.with_name(f"{part.name}.failed")
        is_done = part.is_file()
        if not is_done:
            reasons: dict[int, str] = {}
            text = found_in(window, reasons)
            _write(failed, json.dumps(list(reasons.items())))
            _write(part, text)
        progress(window.residues, is_done)
        failures |= _failures(window, json.loads(failed.read_text()))
        parts.append(part)
    if not parts:
        raise ValueError("expected at least one query, got none")
    return parts, failures


def _write(path: Path, text: str) -> None:
    """Write a text to a file that is whole or not there."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def _settings(finder: Finder, labels: Labels | None, least: float, fields: Sequence[str]) -> dict[str, Any]:
    """Return all that a table depends on beside the queries."""
    return {
        "model": finder.fingerprint,
        "index": finder.index.config.identity,
        "k": finder.k,
        "candidates": finder.candidates,
        "first_stage_only": finder.first_stage_only,
        "tokens_per_batch": finder.tokens_per_batch,
        "labels": None if labels is None else _digest(labels),
        "least": least,
        "columns": list(fields),
    }


def _digest(labels: Labels) -> str:
    """Return a digest of labels."""
    content = sorted((name, *sorted(each)) for name, each in labels.by_name.items())
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _begun(folder: Path) -> dict[str, Any]:
    """Return the settings of a table that was begun; none where there is no such."""
    path = folder / SETTINGS_FILE
    return json.loads(path.read_text()) if path.is_file() else {}


def _begin(folder: Path, output: Path, settings: dict[str, Any]) -> None:
    """Note the settings of a table that is begun; refuse to go on with others."""
    begun = _begun(folder)
    for name, value in settings.items() if begun else ():
        if begun.get(name) != value:
            raise ValueError(
                f"expected {name} {begun.get(name)}, with which {output} was begun, got {value}: use "
                "what it was begun with, or choose another output"
            )
    write_whole(folder / SETTINGS_FILE, lambda part: part.write_text(json.dumps(settings)))


def _line(found: Found, fields: Sequence[str], suffix: str) -> str:
    """Return the line of a table for what was found."""
    values = {
        name: round(value, DIGITS) if isinstance(value := getattr(found, name), float) else value
        for name in fields
    }
    if suffix == ".jsonl":
        return json.dumps(values, ensure_ascii=False) + "\n"
    cells = (f"{value:.{DIGITS}f}" if isinstance(value, float) else str(value) for value in values.values())
    return "\t".join(cell.replace("\t", " ") for cell in cells) + "\n"


def _join(path: Path, parts: Sequence[Path], header: Sequence[str]) -> None:
    """Write parts one after the other, behind a header row if there is one."""
    with path.open("w", encoding="utf-8", newline="") as whole:
        if header:
            csv.writer(whole, delimiter="\t", lineterminator="\n").writerow(header)
        for part in parts:
            with part.open(encoding="utf-8", newline="") as file:
                shutil.copyfileobj(file, whole)


def _failures(window: Window[str], reasons: Sequence[tuple[int, str]]) -> dict[str, Failure]:
    """Return what could not be embedded of a window, by name."""
    found = {}
    for place, reason in reasons:
        source, line = window.origins[place]
        found[window.names[place]] = Failure(window.lengths[place] or 0, reason, source, line)
    return found
