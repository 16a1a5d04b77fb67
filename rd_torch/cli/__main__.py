"""`python -m rd_torch.cli`."""

from rd_torch.cli import main

main()
