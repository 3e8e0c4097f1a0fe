"""Tests of vtprune/shapes/."""
