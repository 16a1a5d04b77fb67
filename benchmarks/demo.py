"""What do nested embeddings of a few protein families look like?

    python -m benchmarks.demo --output demo

The script embeds the proteins of `benchmarks/demo.fasta` with the shipped family, prints two tables and draws
a picture. The sequences are of five families from UniProtKB/Swiss-Prot (The UniProt Consortium), CC BY 4.0.
Cosines are of mean-pooled embeddings, centred on the mean of all proteins shown.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import rd_torch
from benchmarks.options import new_parser
from rd_torch.reading import Fasta

FASTA = Path(__file__).with_name("demo.fasta")
FAMILIES = {
    "GRPE": "GrpE, heat-shock cofactor",
    "ATPF": "ATP synthase subunit b",
    "RNPA": "ribonuclease P protein",
    "KTHY": "thymidylate kinase",
    "GLRX1": "glutaredoxin 1",
}


def cosines(vectors: np.ndarray) -> np.ndarray:
    """Return the `(n, n)` cosine similarities of rows, centred on their mean."""
    centred = vectors - vectors.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    return unit @ unit.T


def nearest(similarity: np.ndarray) -> np.ndarray:
    """Return the most similar other row of each row."""
    return np.argmax(similarity - 3 * np.eye(len(similarity)), axis=1)


def print_tables(
    names: list[str], families: list[str], lengths: list[int], by_level: dict[str, np.ndarray]
) -> None:
    """Print each protein's neighbour at the narrowest and the widest level, then each level as a whole.

    Args:
        names: Names of the proteins.
        families: Family of each protein.
        lengths: Number of residues of each protein.
        by_level: Cosine similarities of all proteins at each level.
    """
    first, *_, last = by_level
    print(f"{'protein':<12} {'residues':>8}   nearest at {first:<14} nearest at {last}")
    columns = [(by_level[level], nearest(by_level[level])) for level in (first, last)]
    for i, name in enumerate(names):
        cells = [
            f"{names[near[i]]:<12} {similarity[i, near[i]]:5.2f} {' *'[families[near[i]] == families[i]]}"
            for similarity, near in columns
        ]
        print(f"{name:<12} {lengths[i]:>8}   {'      '.join(cells)}")
    print("\n* The neighbour is of the same family.\n")
    same = np.equal.outer(families, families) & ~np.eye(len(names), dtype=bool)
    other = ~np.equal.outer(families, families)
    print(f"{'level':>6} {'width':>5} {'cosine in family':>17} {'between':>8} {'neighbours in family':>21}")
    model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
    for level, similarity in by_level.items():
        hits = sum(families[j] == family for j, family in zip(nearest(similarity), families, strict=True))
        print(
            f"{level:>6} {model.config.widths[level]:>5} {similarity[same].mean():>17.2f} "
            f"{similarity[other].mean():>8.2f} {f'{hits} of {len(names)}':>21}"
        )


def draw(names: list[str], families: list[str], by_level: dict[str, np.ndarray], path: Path) -> None:
    """Draw cosine similarities at the narrowest and the widest level, side by side.

    Args:
        names: Names of the proteins.
        families: Family of each protein.
        by_level: Cosine similarities of all proteins at each level.
        path: File of the picture.
    """
    from matplotlib.figure import Figure

    first, *_, last = by_level
    figure = Figure(figsize=(12.5, 6.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    starts = [families.index(family) for family in dict.fromkeys(families)]
    for axis, level in zip(axes, (first, last), strict=True):
        image = axis.imshow(by_level[level], vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set_title(f"level {level}")
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        for start in starts[1:]:
            axis.axhline(start - 0.5, color="black", linewidth=0.8)
            axis.axvline(start - 0.5, color="black", linewidth=0.8)
    figure.colorbar(image, ax=axes, label="cosine similarity, centred", shrink=0.8)
    figure.suptitle("The same 22 proteins in the first and in all features of one nested embedding")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run the command line."""
    parser = new_parser(__doc__, output="Folder to write the picture to, by default demo.")
    parser.set_defaults(output=Path("demo"))
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    proteins = list(Fasta(FASTA))
    model = rd_torch.RDModel.from_pretrained("esm2-rd-mini")
    vectors = np.asarray(rd_torch.embed(model, [protein.sequence for protein in proteins]))
    by_level = {level: cosines(vectors[:, :width]) for level, width in model.config.widths.items()}
    names = [protein.identifier.split("|")[-1] for protein in proteins]
    families = [name.split("_")[0] for name in names]
    print("\n".join(f"{family:<6} {meaning}" for family, meaning in FAMILIES.items()), end="\n\n")
    print_tables(names, families, [len(protein.sequence) for protein in proteins], by_level)
    draw(names, families, by_level, output / "similarity.png")
    print(f"\nThe picture is in {output / 'similarity.png'}.")


if __name__ == "__main__":
    main()
