"""What a run begins with: a model and its processor, prompts, pictures and videos."""
