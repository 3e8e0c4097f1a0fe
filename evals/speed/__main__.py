"""`python -m vtprune.evals.speed`."""

from vtprune.evals.speed.speed import main

main()
