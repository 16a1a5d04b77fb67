"""How well is secondary structure predicted: frozen head, LoRA and full fine-tuning at every level?

    python -m benchmarks.finetuning.finetune_residue --output FILE --plot PICTURE

`benchmarks/finetuning/secondary_structure.py` says what the data, the baselines and the scores are.
"""

from __future__ import annotations

from benchmarks.finetuning.command import run_study
from benchmarks.finetuning.secondary_structure import SecondaryStructure

if __name__ == "__main__":
    run_study(SecondaryStructure(), __doc__)
