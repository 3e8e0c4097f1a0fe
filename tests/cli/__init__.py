"""Tests of vtprune/cli/."""
