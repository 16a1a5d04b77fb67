"""How well is the melting temperature predicted: frozen head, LoRA and full fine-tuning at every level?

    python -m benchmarks.finetuning.finetune_sequence --output FILE --plot PICTURE

`benchmarks/finetuning/melting_temperature.py` says what the data, the baselines and the scores are.
"""

from __future__ import annotations

from benchmarks.finetuning.command import run_study
from benchmarks.finetuning.melting_temperature import MeltingTemperature

if __name__ == "__main__":
    run_study(MeltingTemperature(), __doc__)
