import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib import image

from rd_torch.reading import Fasta

ROOT = Path(__file__).parents[1]


def test_demo_prints_every_protein_and_draws_both_levels(tmp_path):
    command = [sys.executable, "-m", "benchmarks.demo", "--output", tmp_path]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    for protein in Fasta(ROOT / "benchmarks" / "demo.fasta"):
        assert any(line.startswith(protein.identifier.split("|")[-1]) for line in printed.splitlines())
    assert [line.split()[:2] for line in printed.splitlines()[-6:-2]] == [
        ["28K", "32"],
        ["90K", "48"],
        ["207K", "64"],
        ["1M", "128"],
    ]
    picture = image.imread(tmp_path / "similarity.png")
    left, right = np.array_split(picture[150:-150], 2, axis=1)
    assert len(np.unique(left.reshape(-1, 4), axis=0)) > 50
    assert len(np.unique(right.reshape(-1, 4), axis=0)) > 50


def test_demo_proteins_are_swiss_prot_families_of_several_members():
    identifiers = [protein.identifier for protein in Fasta(ROOT / "benchmarks" / "demo.fasta")]
    families = [identifier.split("|")[2].split("_")[0] for identifier in identifiers]
    assert all(identifier.startswith("sp|") for identifier in identifiers)
    assert len(identifiers) == 22
    assert min(families.count(family) for family in families) >= 4
