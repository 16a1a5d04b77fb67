"""Fine-tuning of a chain on labelled proteins: a frozen chain with a head, LoRA, and full fine-tuning."""
