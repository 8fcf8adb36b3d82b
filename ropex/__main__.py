"""`python -m ropex` is the `ropex` command."""

from ropex.cli import main

main()
