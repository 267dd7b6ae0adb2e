"""`python -m ernietune` is the `ernietune` command."""

from ernietune.cli import main

main()
