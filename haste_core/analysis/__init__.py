"""Measurements on runs: each takes runs and returns a tidy table."""
