"""The Python interface: certified classifiers as objects, with files, attacks and export."""
