"""How the scripts of this folder end."""

import sys

from lsrs_jax.runtime import signals
from lsrs_jax.runtime.errors import UserError


def ended(main, *arguments):
    """Calls `main`; a mistake of the user's, or a signal, is one line and the exit code of the package's commands."""
    try:
        with signals.handled():
            main(*arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except signals.Interrupted as stop:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(stop.code)
