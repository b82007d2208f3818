"""Checkpoints of a training. No other file uses Orbax.

A checkpoint has three items: ``model`` (parameters; enough to certify), ``train`` (optimizer state) and ``meta``
(JSON: step, digests, description of the data). Restoring takes a target of shapes and puts every array on the devices
of the target, so that one device can open a checkpoint of eight.
"""

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from lsrs_jax.models.split import Model, Params
from lsrs_jax.runtime.errors import OthersLost, UserError
from lsrs_jax.runtime.logs import ignore_leftovers, quiet
from lsrs_jax.runtime.rng import pinned
from lsrs_jax.runtime.workdir import checkpoints

_ITEMS = ("model", "train", "meta")
_REMEDY = "restore it from a copy, or move its folder away to use an older checkpoint"


def digest(params: Any) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a tree of arrays."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def _digest_if_whole(tree: Any) -> str | None:
    """`digest`, or None for a tree that is divided over several processes: no process holds all of it."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    whole = all(array.is_fully_addressable or array.is_fully_replicated for array in arrays)
    return digest(tree) if whole else None


class Checkpoints:
    """The checkpoints of one workdir, saved asynchronously."""

    def __init__(self, workdir: Path, keep: int = 2) -> None:
        self._folder = checkpoints(workdir)
        if self._folder.exists() and not self._folder.is_dir():
            raise UserError(f"{self._folder} is not a folder; move it away, or use another --workdir")
        self._silence = contextlib.ExitStack()  # of the newest save
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        with _all_readable(self._folder):
            self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=_ITEMS)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            with self._writing():
                self._manager.close()
            self._silence.close()
        except UserError:
            if kind is None:  # otherwise let the exception of the block go on, which says more
                raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with quiet():
                yield
        except Exception as error:  # any error of Orbax's and TensorStore's writers, often in a later save
            line = " ".join(str(error).split())[-160:]
            of_device = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
            if of_device and jax.process_count() > 1:
                raise OthersLost(
                    f"another process of this run ended while it wrote a checkpoint ({line}); the same command resumes"
                ) from error
            raise UserError(
                f"cannot write a checkpoint into {self._folder} ({type(error).__name__}: ...{line}); remove the "
                "cause, for example free space on a full disk; then the same command resumes from the last checkpoint"
            ) from error

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, params: Any, opt_state: Any, **trained_on: Any) -> None:
        """Copies the arrays to the host and starts to write them. `trained_on` describes the data."""
        meta = {"step": int(step), "digest": digest(params), "optimizer": _digest_if_whole(opt_state)} | trained_on
        items = {"model": ocp.args.StandardSave(params), "train": ocp.args.StandardSave(opt_state)}
        self._silence = contextlib.ExitStack()
        self._silence.enter_context(quiet())
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)))
        threading.Thread(target=self._end_silence, args=(self._silence, step), daemon=True).start()

    def _end_silence(self, silence: contextlib.ExitStack, step: int) -> None:
        """Lets warnings and logs be seen again when Orbax has written the checkpoint in its threads.

        If that fails, as on a full disk, the threads print tracebacks until the error is raised in the next call here.
        """
        while self._manager.is_saving_in_progress():
            time.sleep(0.05)
        if (self._folder / str(step)).exists():
            silence.close()

    def wait(self) -> None:
        """Blocks until everything is on disk."""
        with self._writing():
            self._manager.wait_until_finished()
        self._silence.close()

    def restore(self, step: int, params: Any, opt_state: Any) -> tuple[Any, Any]:
        """Parameters and optimizer state of `step`, with the shapes and shardings of the two targets.

        Raises UserError for a damaged checkpoint (its digests differ), or one of another network.
        """
        restored = _restore(self._manager, self._folder, step, model=params, train=opt_state)
        saved, read = restored["meta"].get("optimizer"), _digest_if_whole(restored["train"])
        if None not in (saved, read) and saved != read:
            what = f"checkpoint {self._folder / str(step)} is damaged, the digest of its optimizer differs"
            raise UserError(f"{what}; {_REMEDY}")
        return restored["model"], restored["train"]


def restore_model(workdir: Path, target: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Parameters of a checkpoint, the newest by default, on the default device; and ``{"step", "digest", …}``.

    `target` is a tree of arrays or `jax.ShapeDtypeStruct` with the expected shapes. Raises UserError for a missing or
    damaged checkpoint (its digest differs), or one of another network.
    """
    with _opened(workdir) as (manager, folder, newest):
        if step is not None and step not in (saved := sorted(manager.all_steps())):
            raise UserError(f"no checkpoint of step {step} in {workdir}, only of {', '.join(map(str, saved))}")
        restored = _restore(manager, folder, newest if step is None else step, model=target)
    return restored["model"], restored["meta"]


def restore(workdir: Path, model: Model, step: int | None = None) -> tuple[Params, dict[str, Any]]:
    """`restore_model` for the parameters of a model."""
    with pinned():
        return restore_model(workdir, model.shapes()[0], step)


def trained_on(workdir: Path) -> dict[str, Any]:
    """The description of the data that `Checkpoints.save` put into the newest checkpoint."""
    with _opened(workdir) as opened:
        meta = _restore(*opened)["meta"]
    return {name: value for name, value in meta.items() if name not in ("step", "digest", "optimizer")}


@contextlib.contextmanager
def _opened(workdir: Path) -> Iterator[tuple[ocp.CheckpointManager, epath.Path, int]]:
    """The Orbax manager of a workdir, the folder of its checkpoints, and the newest complete step."""
    folder = checkpoints(workdir)
    if not folder.is_dir():
        raise UserError(f"no checkpoint in {workdir}: train first (python -m lsrs_jax.train --workdir={workdir} ...)")
    with (
        _all_readable(folder),  # silences the warnings of the options as well
        ocp.CheckpointManager(
            folder, options=ocp.CheckpointManagerOptions(read_only=True), item_names=_ITEMS
        ) as manager,
    ):
        newest = manager.latest_step()
        if newest is None:
            raise UserError(f"no complete checkpoint in {folder}: let the training finish or resume it")
        yield manager, folder, newest


def _restore(manager: ocp.CheckpointManager, folder: epath.Path, step: int, **targets: Any) -> Any:
    """Reads ``meta`` and the items that have a target; checks the step, and the digest of the parameters if read."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def describe(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or device)

    items = {name: ocp.args.StandardRestore(jax.tree.map(describe, tree)) for name, tree in targets.items()}
    where = f"checkpoint {folder / str(step)}"
    with _readable(f"{where}: it is damaged, or made for another network or image size", _REMEDY):
        restored = manager.restore(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonRestore()))
        meta = restored["meta"]
        if meta["step"] != step or (targets and digest(restored["model"]) != meta["digest"]):
            raise UserError(f"{where} is damaged: its digest or step is not the one that it names; {_REMEDY}")
    return restored


@contextlib.contextmanager
def _readable(what: str, remedy: str) -> Iterator[None]:
    """Turns every exception of the block into a UserError of one line."""
    with quiet():
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # any error of Orbax's and TensorStore's readers
            ignore_leftovers()
            line = " ".join(str(error).split()).partition(" See full TensorStore")[0][:160]
            raise UserError(f"cannot read {what} ({type(error).__name__}: {line}); {remedy}") from error


def _all_readable(folder: epath.Path) -> contextlib.AbstractContextManager[None]:
    return _readable(f"the checkpoints in {folder}: one is damaged", "restore it from a copy, or move its folder away")
