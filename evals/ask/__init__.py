"""`vtprune ask`: one picture or video, one question, and what was kept of it."""
