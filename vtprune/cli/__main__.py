"""`python -m vtprune.cli`."""

from vtprune.cli.app import main

main()
