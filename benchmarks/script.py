"""How the scripts of this folder end."""

import sys

from lsrs_jax import interrupt
from lsrs_jax.errors import UserError


def ended(main, *arguments):
    """Calls `main`; a mistake of the user's, or a signal, is one line and the exit code of the package's commands."""
    try:
        with interrupt.handled():
            main(*arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except interrupt.Interrupted as stop:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(stop.code)
