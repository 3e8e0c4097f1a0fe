"""How the bundled models were made: a LLaVA from random weights, and a Qwen3-VL from that LLaVA's decoder."""
