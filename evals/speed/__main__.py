"""`python -m vtprune.evals.speed`."""

import typer

from vtprune.evals.speed.speed import main

typer.run(main)
