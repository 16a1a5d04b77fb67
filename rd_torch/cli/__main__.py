"""Run `rd-torch` as `python -m rd_torch.cli`."""

from rd_torch.cli import main

main()
