"""`rd-torch fit`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rd_torch.cli.reading import (
    list_failures,
    proteins_argument,
    reading_options,
    records_of,
    strict_option,
    take_proteins,
)
from rd_torch.cli.shared import (
    backbone_option,
    budget_option,
    by_level,
    cluster_options,
    device_option,
    joined,
    load,
    on_all_machines,
    option,
    plainly,
    print_levels,
)

if TYPE_CHECKING:
    from rd_torch.model import RDModel
    from rd_torch.reading import Proteins
    from rd_torch.sequences import Entry


@click.command()
@proteins_argument
@option("-o", "--output", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder.")
@option("--backbones", metavar="MODEL", help="Checkpoint that has them.  [default: the shipped family]")
@backbone_option
@option("--levels", metavar="A,B,...", help="Use only these levels, smallest first.")
@option("--regressor", type=click.Choice(["pcr", "ols", "ridge"]), default="pcr", help="Kind of prediction.")
@option("--alpha", type=float, default=1.0, help="Penalty of ridge.")
@option(
    "--added", metavar="N,...|all", help="Directions each stage adds.  [default: to the backbone's width]"
)
@option("--predict-from", type=click.Choice(["nested", "previous"]), default="nested", help="W's input.")
@budget_option
@reading_options
@strict_option
@device_option
@cluster_options
@plainly
def fit(
    proteins: tuple[str, ...],
    output: Path,
    backbones: str | None,
    sources: tuple[str, ...],
    levels: str | None,
    added: str | None,
    strict: bool,
    device: str | None,
    **options: Any,
) -> None:
    """Fit a reverse-distilled chain on the proteins of FASTA files and tables, in one pass.

    PROTEINS are what rd-torch embed takes. A record that cannot be read without doubt is left out and listed
    with its line and the reason in OUTPUT.failed.tsv, and the exit status is 3.

    Run again after a kill, it goes on from the moments in OUTPUT.part.

    \b
      rd-torch fit proteins.fasta -o my-chain
      rd-torch fit proteins.fasta -o ridge --regressor ridge --alpha 10
      rd-torch fit proteins.fasta -o small --backbone 8M=facebook/esm2_t6_8M_UR50D \\
          --backbone 35M=facebook/esm2_t12_35M_UR50D
    """
    from rd_torch.cli.progress import Progress
    from rd_torch.config import check_choice
    from rd_torch.sums import clear_folder

    counts = _added(added)
    file = take_proteins(proteins, options)
    left_out: list[Entry] = []
    work_folder = output.resolve().with_name(f"{output.resolve().name}.part")
    work_folder.parent.mkdir(parents=True, exist_ok=True)
    workers = joined(options, device)
    family, origin = _family(backbones, sources, "cpu" if workers else device)
    wanted = levels.split(",") if levels else list(family)
    for level in wanted:
        check_choice("level", level, tuple(family))
    with Progress(file) as progress:
        options |= {
            "progress": progress,
            "provenance": {
                "backbones": origin,
                "fasta": ", ".join(Path(source).name for source in file.sources),
            },
            "work_folder": work_folder,
            "added": counts,
        }
        if workers:
            named = (f"{level}={on_all_machines(source)}" for level, source in by_level(sources).items())
            again = partial(_chosen, backbones and on_all_machines(backbones), tuple(named), wanted)
            chain = _on_cluster(again, file, strict, workers=workers, left_out=left_out, **options)
        else:
            chain = _here({level: family[level] for level in wanted}, file, strict, left_out, **options)
    chain.save_pretrained(output)
    clear_folder(work_folder)
    print_levels(chain.config)
    click.echo(f"Written to {output}", err=True)
    _list(left_out, output.with_name(f"{output.name}.failed.tsv"))


def _list(left_out: list[Entry], path: Path) -> None:
    """Lists what could not be read, and ends the command with the status for that."""
    from rd_torch.store.failures import write_failures
    from rd_torch.store.folder import failure_of

    write_failures(path, [(entry.identifier, failure_of(entry)) for entry in left_out])
    list_failures(path, len(left_out))


def _here(
    family: dict[str, Any], file: Proteins, strict: bool, left_out: list[Entry], **options: Any
) -> RDModel:
    """Fits in this process."""
    from rd_torch.fitting import fit_entries
    from rd_torch.letters import Corrections
    from rd_torch.sequences import keep_sound, normalize_entries

    corrections = Corrections()
    entries = keep_sound(normalize_entries(file.entries(), corrections, strict=strict), left_out)
    chain = fit_entries(family, options["progress"].counted(entries), **options)
    corrections.warn()
    return chain


def _on_cluster(again: Any, file: Proteins, strict: bool, **options: Any) -> RDModel:
    """Fits on a cluster; `again` loads the family in every worker."""
    from rd_torch.cluster import fit as fit_chain

    return fit_chain(again, records_of(file, strict=strict), **options)


def _chosen(
    checkpoint: str | None, sources: tuple[str, ...], wanted: list[str], device: str
) -> dict[str, Any]:
    """The wanted backbones, on any machine."""
    family, _ = _family(checkpoint, sources, device)
    return {level: family[level] for level in wanted}


def _family(
    checkpoint: str | None, sources: tuple[str, ...], device: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Backbones by level, from a checkpoint or from one source each, and what is known of their origin."""
    from rd_torch.weights import DEFAULT_MODEL

    if not sources:
        model = load(checkpoint or DEFAULT_MODEL, None, "float32", device)
        return dict(model.backbones.items()), dict(model.config.provenance)
    if checkpoint:
        raise ValueError("expected --backbones or --backbone, got both")
    named = by_level(sources)
    models = {level: load(source, None, "float32", device) for level, source in named.items()}
    return {level: next(iter(model.backbones.values())) for level, model in models.items()}, named


def _added(text: str | None) -> Any:
    """The numbers of `--added`."""
    if text is None or text == "all":
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"expected --added as numbers like 16,16 or 'all', got {text!r}") from error
