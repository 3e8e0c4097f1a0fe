"""FLOPs and bytes: the sizes of a model, the arithmetic, and the page that explains it (cost.md)."""
