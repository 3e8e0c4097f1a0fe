"""Training of the bundled tiny LLaVA on the Shapes benchmark, from random weights."""
