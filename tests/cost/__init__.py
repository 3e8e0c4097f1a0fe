"""Tests of vtprune/cost/."""
