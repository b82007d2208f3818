"""The folder of a run: a local folder, or a folder in a bucket with a synchronised local copy.

Files in a bucket are written whole and cannot be locked. The commands therefore work in a local copy of all files
except the checkpoints. Changes are copied to the bucket twice a minute, before processes meet, and at the end.
Checkpoints, the only large files, are written to the bucket directly.
"""

import contextlib
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

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
    home = _remote(marker.read_text()) if marker.exists() else epath.Path(Path(workdir).absolute())
    return home / _CHECKPOINTS


def _remote(url: str) -> epath.Path:
    return epath.Path(url.removeprefix("file://"))


def _signature(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


class Workdir:
    """A folder on a disk of this machine, or shared by all machines of a run; `name` is what the user calls it."""

    def __init__(self, path: Path | str) -> None:
        self.path, self.name = Path(path), str(path)

    def push(self) -> None:
        """Shows other machines what was written here; nothing to do."""

    def pull(self) -> None:
        """Gets what other machines have written; nothing to do."""


class Bucket(Workdir):
    """The local folder `copy`, at first empty, as a copy of ``gs://bucket/folder`` or ``file:///folder``."""

    def __init__(self, url: str, copy: str) -> None:
        super().__init__(copy)
        self.name, self._url, self._lock = url, _remote(url), threading.Lock()
        self._seen: dict[str, tuple[int, int]] = {}
        write_atomic(self.path / _MARKER, url)
        self.pull()

    def push(self) -> None:
        """Copies to the bucket every file that changed here since the last copy, except hidden files."""
        with self._reached():
            for path in sorted(self.path.rglob("[!.]*")):
                name = path.relative_to(self.path)
                if any(part.startswith(".") for part in name.parts) or not path.is_file():
                    continue
                signature = _signature(path)
                if self._seen.get(name.as_posix()) == signature:
                    continue
                if self.name.startswith("gs://"):
                    (self._url / name).write_bytes(path.read_bytes())  # in one step
                else:
                    write_atomic(str(self._url / name), path.read_bytes())
                self._seen[name.as_posix()] = signature

    def pull(self) -> None:
        """Copies from the bucket every file that is new or has grown there, except files that were written here."""
        with self._reached():
            for source in self._files(self._url):
                name = source.relative_to(self._url).as_posix()
                path, known = self.path / name, self._seen.get(name)
                if path.exists() and (not known or known != _signature(path) or source.stat().length == known[0]):
                    continue
                write_atomic(path, source.read_bytes())
                self._seen[name] = _signature(path)

    def _files(self, folder: epath.Path) -> Iterator[epath.Path]:
        for path in folder.iterdir() if folder.exists() else ():
            if path.is_dir():
                if path != self._url / _CHECKPOINTS:
                    yield from self._files(path)
            elif not path.name.startswith("."):
                yield path

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        except UserError:
            raise
        except Exception as error:  # whatever the library behind a bucket raises
            remedy = "install it" if isinstance(error, ImportError) else "the same command resumes"
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            raise UserError(f"cannot read or write {self.name} ({reason}); {remedy}") from error

    def keep_pushing(self, ended: threading.Event) -> None:
        """Copies to the bucket again and again, until an event."""
        while not ended.wait(_SECONDS_PER_COPY):
            try:
                self.push()
            except UserError as error:
                print(f"note: {error}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def opened(location: Path | str) -> Iterator[Workdir]:
    """The `Workdir` of a ``--workdir``: a `pathlib.Path`, or the text of a URL."""
    if isinstance(location, Path):
        yield Workdir(location)
        return
    with tempfile.TemporaryDirectory(prefix="lsrs_jax_") as folder:
        bucket, ended = Bucket(location, folder), threading.Event()
        thread = threading.Thread(target=bucket.keep_pushing, args=(ended,), daemon=True)
        thread.start()
        try:
            yield bucket
        finally:
            ended.set()
            thread.join()
            bucket.push()
