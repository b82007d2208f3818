"""The folder of a run: a local folder, or a folder in a bucket with a synchronised local copy.

Files in a bucket are written whole and cannot be locked. The commands therefore work in a local copy of all files
except the checkpoints. Changes are copied to the bucket twice a minute, before processes meet, and at the end.
Checkpoints, the only large files, are written to the bucket directly.
"""

import contextlib
import io
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from etils import epath

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import write_atomic

SCHEMES = ("gs://", "file://")  # file:// is for a mount that can do no more than a bucket
_SECONDS_PER_COPY = 30.0
_MARKER = ".bucket"
_CHECKPOINTS = "checkpoints"


def checkpoints(workdir: Path) -> epath.Path:
    """The folder of the checkpoints: in the workdir, or in the bucket if the workdir is the copy of one."""
    marker = Path(workdir) / _MARKER
    home = _remote(os.fsdecode(marker.read_bytes())) if marker.exists() else epath.Path(Path(workdir).absolute())
    return home / _CHECKPOINTS


def _remote(url: str) -> epath.Path:
    return epath.Path(url.removeprefix("file://"))


def _signature(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _files(folder: epath.Path, skipped: epath.Path) -> Iterator[epath.Path]:
    """All files except hidden ones; a bucket has neither links nor pipes, so those of a mount are left out."""
    for path in folder.iterdir() if folder.exists() else ():
        local = None if "://" in str(path) else Path(str(path))
        if local and (local.is_symlink() or not (local.is_file() or local.is_dir())):
            continue
        if path.is_dir():
            if path != skipped:
                yield from _files(path, skipped)
        elif not path.name.startswith("."):
            yield path


class Workdir:
    """A folder that all machines of a run share, or (with a `url`) this machine's copy of a folder in a bucket.

    `name` is what the user calls it. The folder of a copy must be empty.
    """

    def __init__(self, path: Path | str, url: str = "") -> None:
        self.path, self.name = Path(path), url or str(path)
        self._bucket, self._lock = _remote(url) if url else None, threading.Lock()
        self._seen: dict[str, tuple[int, int]] = {}
        if url:
            write_atomic(self.path / _MARKER, os.fsencode(url))
            self.pull()

    def push(self) -> None:
        """Copies to the bucket every file that changed here since the last copy, except hidden files."""
        with self._reached() as bucket:
            for path in sorted(self.path.rglob("*")) if bucket else ():
                name = path.relative_to(self.path).as_posix()
                hidden = any(part.startswith(".") for part in name.split("/"))
                if hidden or not path.is_file() or self._seen.get(name) == _signature(path):
                    continue
                signature, content = _signature(path), path.read_bytes()
                if self.name.startswith("gs://"):
                    (bucket / name).write_bytes(content)  # in one step
                else:
                    write_atomic(str(bucket / name), content)
                self._seen[name] = signature

    def pull(self) -> None:
        """Copies from the bucket every file that is new or has grown there, except files that were written here."""
        with self._reached() as bucket:
            for source in _files(bucket, bucket / _CHECKPOINTS) if bucket else ():
                name = source.relative_to(bucket).as_posix()
                path, known = self.path / name, self._seen.get(name)
                if path.exists() and (not known or known != _signature(path) or source.stat().length == known[0]):
                    continue
                write_atomic(path, source.read_bytes())
                self._seen[name] = _signature(path)

    @contextlib.contextmanager
    def _reached(self) -> Iterator[Any]:
        try:
            with self._lock:
                yield self._bucket
        except UserError:
            raise
        except Exception as error:  # whatever the library behind a bucket raises
            remedy = "install it" if isinstance(error, ImportError) else "the same command resumes"
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            raise UserError(f"cannot read or write {self.name} ({reason}); {remedy}") from error


class _Renamed(io.TextIOBase):
    """Writes to a stream, with the name of the workdir in place of the path of its local copy."""

    def __init__(self, stream: TextIO, path: str, name: str) -> None:
        self._stream, self._path, self._name = stream, path, name

    def write(self, text: str) -> int:
        return self._stream.write(text.replace(self._path, self._name))

    def flush(self) -> None:
        self._stream.flush()


@contextlib.contextmanager
def opened(location: Path | str) -> Iterator[Workdir]:
    """The `Workdir` of a ``--workdir``: a `pathlib.Path`, or the text of a URL."""
    if isinstance(location, Path):
        yield Workdir(location)
        return
    with tempfile.TemporaryDirectory(prefix="lsrs_jax_") as folder:
        workdir, ended = Workdir(folder, location), threading.Event()

        def keep_pushing() -> None:
            while not ended.wait(_SECONDS_PER_COPY):
                try:
                    workdir.push()
                except UserError as error:
                    print(f"note: {error}", file=sys.stderr, flush=True)

        thread = threading.Thread(target=keep_pushing, daemon=True)
        thread.start()
        try:
            with contextlib.redirect_stdout(_Renamed(sys.stdout, folder, location)):
                yield workdir
        except UserError as error:
            raise type(error)(str(error).replace(folder, location)) from error
        finally:
            ended.set()
            thread.join()
            workdir.push()
