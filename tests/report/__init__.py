"""Tests of vtprune/report/."""
