"""Tests of vtprune/decoder/."""
