"""Tests of vtprune/encoder/."""
