"""Nest raw embeddings that lie in files, without a transformer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import torch

from rd_torch.matching import require_level
from rd_torch.nesting import Nesting
from rd_torch.raw_files import Raw, RawFiles, count_rows, cut_batches, open_raw
from rd_torch.store import Facts, Names, ProgressCallback, Row, SaveDtype, Window, Work, format_of


def combine_stores(
    nesting: Nesting,
    inputs: Mapping[str, str | Path],
    path: str | Path,
    *,
    width: int | None = None,
    form: str | None = None,
    save_dtype: SaveDtype = "float32",
    progress: ProgressCallback = lambda records, before: None,
) -> None:
    """Nest raw embeddings that lie in files, and write them to a store; no backbone runs.

    Records are matched by identifier, and keep the order of the first file. They are read window by window,
    so that memory does not grow with their number. The same call after a kill goes on where it was: it reads
    the inputs again from the start, compares them with what was read before, and nests what is missing.

    Args:
        nesting: config and maps of the chain; `Nesting.from_pretrained` reads them.
        inputs: by level, a file or folder that `open_store` reads. It holds the raw final embeddings of that
            level's backbone; all files hold means over residues, or all hold a row for each residue.
        path: the store; its suffix names the format.
        width: number of features to keep; files of levels that are not needed for them may be left out, and
            are not opened. By default all features of the levels in `inputs`.
        form: `"h5"`, `"parquet"` or `"pt"`, in place of the suffix.
        save_dtype: type of the numbers in the store; only `"pt"` takes bfloat16.
        progress: function that is called with a number of records that are done, and with True if an earlier
            run did them, else False.

    Raises:
        FileNotFoundError: if a file, or the folder of `path`, is not there.
        BlockingIOError: if another process writes the same store.
        ValueError: for levels that are not the family's first; for files that do not fit their level or each
            other; for a width, dtype or format that does not exist; and for a store that was begun with other
            embeddings, another model or other choices.

    Examples:
        >>> model = rd_torch.RDModel.from_pretrained("esm2-rd-mini", level="90K")
        >>> for level, backbone in model.backbones.items():  # raw embeddings, as people have them
        ...     alone = rd_torch.RDModel({level: backbone}, [])
        ...     _ = rd_torch.embed_to_store(alone, [("one", "MQIFVK"), ("two", "MKV")], f"{level}.h5")
        >>> nesting = rd_torch.Nesting.from_pretrained("esm2-rd-mini", level="90K")
        >>> rd_torch.combine_stores(nesting, {"28K": "28K.h5", "90K": "90K.h5"}, "nested.h5")
        >>> rd_torch.open_store("nested.h5")["one"].shape
        (48,)
    """
    names_of_levels = nesting.config.first_levels(inputs, width)
    nesting = nesting.until(names_of_levels[-1])
    levels = {level.name: level for level in nesting.config.levels}
    final_norm = nesting.config.final_norm
    needed = {level: path for level, path in inputs.items() if level in levels}
    with (
        open_raw(needed, lambda level, store: require_level(levels[level], store, final_norm)) as files,
        Work(Path(path), format_of(path, form), _facts(nesting, files, width, save_dtype)) as work,
    ):
        names = Names(work.format.key)

        def nest_window(window: Window[Raw], _: dict[int, str]) -> Iterator[list[Row]]:
            """Nest the records of a window, batch by batch."""
            return _nest_batches(nesting, window, work.facts)

        with closing(files.read(work.facts.tokens_per_batch, names)) as windows:
            work.fill(windows, nest_window, progress, count=len)
    if names.renamed:
        warnings.warn(
            f"records whose name an earlier record has in {work.format.name}, stored as IDENTIFIER#2 and so "
            f"on: {names.renamed:,}",
            stacklevel=2,
        )


def _facts(nesting: Nesting, files: RawFiles, width: int | None, save_dtype: SaveDtype) -> Facts:
    """State what the nested store holds, as `rd_torch.embedding.facts_of` does for embeddings."""
    config = nesting.config
    prefixes = config.prefixes(width or list(config.widths.values())[-1])
    return Facts(
        model=nesting.name,
        fingerprint=nesting.fingerprint(),
        levels=tuple(prefixes),
        widths=tuple(prefixes.values()),
        num_layers=config.levels[-1].depth,
        pool=files.pool,
        backbone_dtype=files.dtype,
        save_dtype=save_dtype,
        tokens_per_batch=files.rows_per_batch,
        windows=files.windows,
        final_norm=config.hidden_norm,
    )


@torch.inference_mode()
def _nest_batches(nesting: Nesting, window: Window[Raw], facts: Facts) -> Iterator[list[Row]]:
    """Nest the records of a window; yield their places and embeddings, as they are saved, in batches."""
    dtype = getattr(torch, facts.save_dtype)
    for places in cut_batches(window.contents, facts.tokens_per_batch):
        chosen = [window.contents[place] for place in places]
        batch = {level: torch.cat([torch.atleast_2d(raw[level]) for raw in chosen]) for level in chosen[0]}
        nested = nesting.combine(batch)[:, : facts.width].to(dtype)
        parts = nested if facts.pool == "mean" else nested.split([count_rows(raw) for raw in chosen])
        yield list(zip(places, parts, strict=True))
