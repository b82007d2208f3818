"""Detects the execution of code; and payloads that would execute some."""

import contextlib
import os
import sys

EXECUTIONS = (
    "ctypes.dlopen",
    "exec",
    "marshal.loads",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "pickle.find_class",
    "subprocess.Popen",
)
heard = None  # the list of executions while a test listens, otherwise None


def listen(event, arguments):
    if heard is not None and event in EXECUTIONS:
        heard.append((event, arguments))


sys.addaudithook(listen)  # also notices C code, unlike patched functions; a hook cannot be removed


@contextlib.contextmanager
def nothing_executed(canary):
    global heard
    heard = []
    try:
        yield
        assert heard == []
        assert not canary.exists()
    finally:
        heard = None


class Payload:
    """An object whose unpickling runs a command."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def payloads(canary):
    touch = f"touch {canary}"
    return [
        f"__import__('os').system({touch!r})",
        f'__import__("pathlib").Path("{canary}").touch()',
        f"exec('import os; os.system(\"{touch}\")')",
        f"!!python/object/apply:os.system ['{touch}']",
        f"$({touch})",
        f"`{touch}`",
        f"cos\nsystem\n(S'{touch}'\ntR.",
    ]
