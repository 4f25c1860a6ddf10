"""`python -m loraplus`, the same as the `loraplus` command (torchrun and accelerate launch start modules)."""

from loraplus.cli import main

main()
