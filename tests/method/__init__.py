"""Tests of vtprune/method/."""
