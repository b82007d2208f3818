"""The experiments behind docs/results: the runs, the files that are kept of them, their tables and figures."""
