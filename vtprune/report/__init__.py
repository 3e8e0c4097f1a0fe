"""What was kept, computed and cached: the record of a generation, and the report made of it."""
