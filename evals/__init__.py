"""What measures methods and models: benchmarks, searches, timings, and how the bundled models were made."""
