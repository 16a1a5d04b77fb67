"""Fit maps to raw embeddings that lie in files, without a backbone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Unpack

import torch

from rd_torch.config import RDConfig
from rd_torch.levels import Level
from rd_torch.maps import basis_in
from rd_torch.modules import digest_of, modules_of
from rd_torch.moments import RunningMoments
from rd_torch.nesting import Nesting
from rd_torch.raw_files import KIND, Raw, RawFiles, cut_batches, open_raw
from rd_torch.solve import SOLVE_DEFAULTS, SolveOptions, check_options
from rd_torch.store import ProgressCallback, Window
from rd_torch.sums import Summands, Sums, record_fit


def fit_stores(
    inputs: Mapping[str, str | Path],
    *,
    progress: ProgressCallback = lambda records, before: None,
    provenance: Mapping[str, Any] | None = None,
    work_folder: str | Path | None = None,
    **options: Unpack[SolveOptions],
) -> Nesting:
    """Fit the maps of a chain to raw embeddings that lie in files, in one pass; no backbone runs.

    The embeddings may be any models' of any kind of sequence: of families whose tokens differ, or of
    sequences that are no proteins. A level is then only a name and a width. Records are matched by
    identifier, and read window by window, so that memory does not grow with their number.

    Args:
        inputs: by level, smallest first, a file or folder that `open_store` reads. All files hold means over
            residues, or all hold a row for each residue. Levels may have any names without a dot.
        progress: function that is called with a number of records that are done, and with True if an earlier
            run did them, else False.
        provenance: where the embeddings come from; it is saved with the maps.
        work_folder: folder in which the moments are saved about once a minute, when a window of records is
            in them. The same call after a kill goes on from there: it reads the files again from the start,
            compares them with what was read before, and gives the same bits. The folder is made if it does
            not exist, and stays.
        **options: `added`, `regressor`, `alpha` and `predict_from`, as in `solve_stages`; `scale`, `centre`
            and `rotate_first`, as in `change_basis`. Where widths do not grow from level to level, `added` is
            needed.

    Returns:
        The config and the maps, in float32, which `combine_stores` takes and `save_pretrained` writes.

    Raises:
        FileNotFoundError: if a file, or the folder in which `work_folder` is to be made, is not there.
        BlockingIOError: if another process works in `work_folder`.
        ValueError: for files of nested embeddings, of a way to pool that does not commute with the maps, or
            that do not fit each other; for embeddings that are not finite; for fewer than two rows; for an
            option or a level's name that cannot be; and for a folder that was begun with other embeddings.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini", level="90K")
        >>> proteins = [("one", "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEG"), ("two", "MKTAYIAKQRQISFVKSHFSRQLEE")]
        >>> proteins += [("three", "MSKGEELFTGVVPILVELDGDVNGHKFSVSGEG")]  # take a thousand or more
        >>> for level, backbone in model.backbones.items():  # raw embeddings, as people have them
        ...     alone = rd_torch.RDModel({level: backbone}, [])
        ...     _ = rd_torch.embed_to_store(alone, proteins, f"{level}.h5", pool="none")
        >>> nesting = rd_torch.fit_stores({"small": "28K.h5", "large": "90K.h5"}, regressor="ols")
        >>> nesting.config.widths
        {'small': 32, 'large': 48}
        >>> nesting.save_pretrained("my-maps")  # rd_torch.Nesting.from_pretrained reads them
    """
    if not inputs:
        raise ValueError("expected a file of embeddings for at least one level, got none")
    with open_raw(inputs) as files:
        levels = tuple(
            Level(name, None, width, None, facts=files.origins[name]) for name, width in files.widths.items()
        )
        added = check_options(list(files.widths.values()), **options)
        with Sums(_summands_of(files), files.rows_per_batch, folder=work_folder) as sums:
            _add_windows(files, sums, progress)
            _warn_of_few(files, sums.sequences, sums.moments.count)
            predict_from = options.get("predict_from", SOLVE_DEFAULTS["predict_from"])
            solved = sums.solve(**options)
            reconstructor = sums.solve_reconstruction(solved, predict_from)
            stages = [stage.to(torch.float32) for stage in solved]
            final_norm = files.final_norm
            counts = {"sequences": sums.sequences, "rows": sums.moments.count, "pool": files.pool}
    basis = basis_in(stages)
    config = RDConfig(
        levels,
        tuple(added),
        tuple(stage.explained for stage in stages[1 if basis else 0 :]),
        predict_from=predict_from,
        final_norm=final_norm,
        provenance=record_fit(provenance, counts, options),
        **(basis.facts if basis else {}),
    )
    by_level = {level.name: stage for level, stage in zip(levels[0 if basis else 1 :], stages, strict=True)}
    return Nesting(config, modules_of(by_level), reconstructor=reconstructor)


def _summands_of(files: RawFiles) -> Summands:
    """Return what the moments of files are of. Numbers and names are compared window by window."""
    return Summands(files.widths, lambda: digest_of(("stores", files.pool, files.windows), {}), KIND)


def _add_windows(files: RawFiles, sums: Sums, progress: ProgressCallback) -> None:
    """Add the records of all windows that the moments do not count yet."""
    windows = 0
    # The thread that reads ahead must end before the files are closed.
    with closing(files.read(sums.tokens_per_batch)) as read:
        for window in read:
            windows = window.number + 1
            if window in sums.done:
                progress(len(window.contents), True)
                continue
            _add_window(window, sums.moments, sums.tokens_per_batch, progress)
            sums.sequences += len(window.contents)
            sums.mark_done(window.number, window.checksum)
    sums.finish(windows)


def _add_window(window: Window[Raw], moments: RunningMoments, most: int, progress: ProgressCallback) -> None:
    """Add the rows of a window's records, at most so many at once, and report the records."""
    for places in cut_batches(window.contents, most):
        chosen = [window.contents[place] for place in places]
        rows = [torch.cat([torch.atleast_2d(raw[level]) for raw in chosen]) for level in chosen[0]]
        for parts in zip(*(each.split(most) for each in rows), strict=True):
            moments.update(torch.cat([part.double() for part in parts], dim=1))
        progress(len(places), False)


def _warn_of_few(files: RawFiles, records: int, rows: int) -> None:
    """Warn of a single record, and of so few rows that some directions of their covariance are arbitrary."""
    features = sum(files.widths.values())
    if records == 1 and files.pool == "none":
        warnings.warn(
            f"every file holds one record alone, with {rows:,} rows, which are taken for the residues of one "
            "sequence and matched by their place: a file of one vector a sequence needs a record for each",
            stacklevel=3,
        )
    if rows <= features:
        kind = "means" if files.pool == "mean" else "rows"
        warnings.warn(
            f"{rows:,} {kind} are too few to determine maps of {features:,} features in all: take more "
            f"than {features:,}" + (", or files of a row for each residue" if kind == "means" else ""),
            stacklevel=3,
        )
