"""Attacks on certificates: the attacks, the predictions that judge them, and the table of results."""
