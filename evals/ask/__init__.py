"""`vtprune ask`: one picture, one question, and what was kept of it."""
