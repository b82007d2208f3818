"""Measurements of speed and precision; README.md says which question each one answers."""
