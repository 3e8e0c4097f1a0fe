"""Tests of vtprune/loading/."""
