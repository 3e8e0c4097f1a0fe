"""Tests of vtprune/training/."""
