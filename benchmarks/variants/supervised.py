"""Which embedding of a variant does a linear head learn from best?

    python -m benchmarks.variants.supervised --output FILE

Variants of five deep mutational scans are embedded by `rd_torch.embed_variants`: as the mean of all residues,
as that of the mutated ones, and as that less the wild type's at the same sites. (The mean less that of the
wild type is the mean to a linear head, for one protein.) A row has, for each, the Spearman
correlation of a ridge regression with what was measured, at the width of each level: it learns from a random
half of at most `--variants` variants, and is judged by the other half; the mean of five halves. Features are
standardised, and the penalty is chosen by generalised cross-validation. It is compared with one-hot sites and
letters, for which no model runs: which sites are mutated, to which letters, and to which letter each.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import rd_torch
from benchmarks.options import add_data_option, add_model_option, data_folder, new_parser
from benchmarks.result import Row, environment, report_progress, write_result
from benchmarks.variants.assays import Assay, read_assays, spearman
from rd_torch.variants import AMINO_ACIDS

WAYS: Final = ("mean", "sites", "sites-difference")
PENALTIES: Final = np.logspace(-3, 7, 21)
SPLITS: Final = 5


def one_hot(assay: Assay) -> np.ndarray:
    """Return mutated sites, new letters, and new letters at their sites, as ones among zeros."""
    features = np.zeros((len(assay.variants), len(assay.wild_type), len(AMINO_ACIDS)), dtype=np.float32)
    for place, variant in enumerate(assay.variants):
        for each in variant.substitutions:
            features[place, each.site, AMINO_ACIDS.index(each.mutant)] = 1
    return np.concatenate([features.sum(2), features.sum(1), features.reshape(len(features), -1)], 1)


def judge(features: np.ndarray, measured: np.ndarray) -> float:
    """Return the mean correlation over the halves that judge."""
    scores = []
    for seed in range(SPLITS):
        order = np.random.default_rng(seed).permutation(len(measured))
        teach, rest = order[: len(order) // 2], order[len(order) // 2 :]
        head = make_pipeline(StandardScaler(), RidgeCV(PENALTIES)).fit(features[teach], measured[teach])
        scores.append(spearman(head.predict(features[rest]), measured[rest]))
    return round(float(np.mean(scores)), 3)


def measure(model: rd_torch.RDModel, assay: Assay) -> Iterator[Row]:
    """Yield the row of each way to embed an assay's variants, and of one-hot letters."""
    levels = model.config.widths
    facts = {"assay": assay.name, "variants": len(assay.variants)}
    alone = judge(one_hot(assay), assay.measured)
    yield {**facts, "features": "one-hot sites and letters", **dict.fromkeys(levels, alone)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "variants.h5"
        rd_torch.embed_variants(model, assay.wild_type, assay.variants, path, pool=WAYS)
        with rd_torch.open_store(path) as store:
            vectors = np.asarray(store).reshape(len(assay.variants), len(WAYS), model.embed_dim)
    report_progress(f"{assay.name}: embedded")
    for place, way in enumerate(WAYS):
        scores = {level: judge(vectors[:, place, :width], assay.measured) for level, width in levels.items()}
        yield {**facts, "features": way, **scores}


def main() -> None:
    """Run the benchmark."""
    parser = new_parser(__doc__)
    add_data_option(parser)
    add_model_option(parser)
    parser.add_argument(
        "--variants", type=int, default=1_000, help="Most variants of a set; by default 1,000."
    )
    arguments = parser.parse_args()
    model = rd_torch.RDModel.from_pretrained(arguments.model)
    rows = [
        row
        for assay in read_assays(data_folder(arguments), arguments.variants)
        for row in measure(model, assay)
    ]
    machine = environment() | {"threads": torch.get_num_threads(), "model": arguments.model}
    write_result(
        "A linear head on embeddings of variants: Spearman correlation", rows, machine, arguments.output
    )


if __name__ == "__main__":
    main()
