"""vtprune as a model of lmms-eval, and the bundled task."""
