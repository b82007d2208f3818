"""Attacks on certificates: what tries to break them, who judges it, and the table of what was found."""
