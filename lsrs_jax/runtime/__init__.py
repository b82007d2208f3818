"""Errors, files, signals, random keys, processes and devices. It imports no other folder of the package."""
