"""Tests of vtprune/hooks/."""
