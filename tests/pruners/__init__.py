"""Tests of vtprune/pruners/."""
