"""`vtprune arank`: the rank of attention maps, and the layers that gamma_mod routes by it."""
