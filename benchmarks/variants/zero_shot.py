"""What are zero-shot scores worth?

    python -m benchmarks.variants.zero_shot --output FILE

Variants of five deep mutational scans are scored without labels by every level of a family, in each way that
`rd-torch variants` has. A row has the Spearman correlation with the measured fitness at each level, and that
of the largest level over the smallest, with a 95 % interval of a bootstrap over variants. Two columns say
what it is compared with: letters alone, where a score is the difference of the logarithms of how often the
letters stand in natural proteins, and what a linear head on the largest level's mean embedding reached that
had learnt from half of 1,000 variants (`benchmarks/results/scaling_every_score.jsonl`; the shipped family).

Variants of one, two, and three or more mutations are apart. Of each at most `--variants` are taken.
Pseudo-likelihoods, for which every site of every variant is masked, are taken of `--few` variants of proteins
of at most 100 residues, and so is every other way, to compare.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch

import rd_torch
from benchmarks.options import add_data_option, add_model_option, data_folder, new_parser
from benchmarks.result import Row, environment, report_progress, write_result
from benchmarks.variants.assays import Assay, read_assays, spearman, supervised_scores
from rd_torch.choices import Scoring
from rd_torch.letters import Corrections, read_residues
from rd_torch.variants import SCORINGS

RESAMPLES: Final = 400
LONGEST_FOR_ALL_SITES: Final = 100


def letter_scores(data: Path, assay: Assay) -> np.ndarray:
    """Return the scores of a model that knows nothing but how often letters stand in natural proteins."""
    counts: Counter[str] = Counter()
    for protein in rd_torch.Fasta(data / "natural50_valid.fasta.xz"):
        counts.update(read_residues(protein.sequence, Corrections()))
    logs = {letter: np.log(count) for letter, count in counts.items()}
    return np.array(
        [sum(logs[each.mutant] - logs[each.wild] for each in variant[1]) for variant in assay.variants]
    )


def interval(assay: Assay, larger: np.ndarray, smaller: np.ndarray) -> str:
    """Return the difference of two correlations, with its interval of a bootstrap over variants."""
    generator, differences = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = generator.integers(len(assay.measured), size=len(assay.measured))
        measured = assay.measured[drawn]
        differences.append(spearman(larger[drawn], measured) - spearman(smaller[drawn], measured))
    low, high = np.percentile(differences, [2.5, 97.5])
    middle = spearman(larger, assay.measured) - spearman(smaller, assay.measured)
    return f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]"


def row_of(assay: Assay, scoring: str, scores: Mapping[str, np.ndarray], seconds: float) -> Row:
    """Return the row of an assay and a way to score."""
    levels = list(scores)
    columns = {level: round(spearman(scores[level], assay.measured), 3) for level in levels}
    return {
        "assay": assay.name,
        "variants": len(assay.variants),
        "scoring": scoring,
        **columns,
        f"{levels[-1]} over {levels[0]} [95 %]": interval(assay, scores[levels[-1]], scores[levels[0]]),
        "seconds, all levels": round(seconds, 1),
    }


def measure(model: rd_torch.RDModel, assay: Assay, scorings: Sequence[Scoring]) -> Iterator[Row]:
    """Yield the row of each way to score an assay's variants."""
    for scoring in scorings:
        start = time.perf_counter()
        scores = rd_torch.score_variants(
            model, assay.wild_type, assay.variants, scoring=scoring, levels=list(model.config.widths)
        )
        report_progress(f"{assay.name}: {scoring}")
        yield row_of(assay, scoring, scores, time.perf_counter() - start)


def main() -> None:
    """Run the benchmark."""
    parser = new_parser(__doc__)
    add_data_option(parser)
    add_model_option(parser)
    parser.add_argument(
        "--variants", type=int, default=10_000, help="Most variants of a set; by default 10,000."
    )
    parser.add_argument(
        "--few", type=int, default=100, help="Variants that are scored in every way; by default 100."
    )
    arguments = parser.parse_args()
    data, rows = data_folder(arguments), list[Row]()
    model = rd_torch.RDModel.from_pretrained(arguments.model)
    known = supervised_scores()
    for assay in read_assays(data, arguments.variants):
        several = max(len(each.sites) for each in assay.variants) > 1
        ways = [each for each in SCORINGS[:3] if several or each != "masked-jointly"]
        asked: list[tuple[Assay, list[Scoring]]] = [(assay, ways)]
        if len(assay.wild_type) <= LONGEST_FOR_ALL_SITES and arguments.few:
            asked.append((assay.few(arguments.few), ["masked", "pseudo-likelihood"]))
        for part, scorings in asked:
            beside = {
                "letters alone": round(spearman(letter_scores(data, part), part.measured), 3),
                "linear head that learnt": round(known[assay.name], 3) if assay.name in known else None,
            }
            rows += [{**row, **beside} for row in measure(model, part, scorings)]
    machine = environment() | {"threads": torch.get_num_threads(), "model": arguments.model}
    write_result("Zero-shot scores of variants: Spearman correlation", rows, machine, arguments.output)


if __name__ == "__main__":
    main()
