"""`vtprune bench`: methods and budgets on tasks, written down row by row, as tables and plots."""
