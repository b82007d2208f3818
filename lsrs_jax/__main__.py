"""``python -m lsrs_jax COMMAND …``; see `cli`."""

from lsrs_jax.cli import main

main()
