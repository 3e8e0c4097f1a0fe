"""Random models, prompts and methods, and what must hold for each of them."""
