"""Training of the bundled tiny Qwen3-VL, whose decoder starts as the bundled LLaVA's."""
