"""Seconds: what wrapping costs, what methods cost, and how both were measured."""
