"""Trains a split classifier under the noise with which it will be certified."""
