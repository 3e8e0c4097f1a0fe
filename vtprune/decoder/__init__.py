"""One forward of the decoder: its prompt and images, which tokens each layer computes, what it packs and revives."""
