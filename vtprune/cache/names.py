"""The names of what lies in a cache, so that no two things are ever called the same."""

from __future__ import annotations

# The attribute of a cache that holds the record of its generation.
GENERATION = "_vtprune_generation"

# Aux tensors of layer 0. Which row of the prompt each row was.
ROWS = "rows"
# How far positions in space run ahead of the text's, on models with M-RoPE.
ROPE_DELTA = "rope_delta"
# The number of the image at each place, 0 for none and for those that were cut (places after the last one hold no
# image); and how often a row was cut since its prompt.
IMAGES, CUTS = "images to cut", "cuts"

# Aux tensors of each layer. How many tokens were dropped before each place, where positions are renumbered.
SHIFT = "position_shift"
# What is added to the vision tokens of a prompt after a layer, by place, where tokens may return.
PLANES = "planes"
# How dense the attention to a prompt was; and, followed by a name, what a method that cuts caches remembers.
DENSITY, STATE = "density", "eviction: "

# Values of a layer's entries: the attention that each has got, and how many others flowed into it.
SCORES, MERGED = "scores", "merged"
