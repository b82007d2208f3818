"""Orbax checkpoints, hidden behind this file.

A checkpoint has three items: ``model`` (parameters; enough to certify), ``train`` (optimizer state) and ``meta``
(JSON: step, digest of the parameters, what they were trained on). Restoring takes a target of shapes and puts every
array on the devices asked for, so a checkpoint written on eight devices opens on one.
"""

import contextlib
import hashlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from lsrs_jax.errors import OthersLost, UserError
from lsrs_jax.workdir import checkpoints as folder_of


def digest(params):
    """SHA-256 over names, dtypes, shapes and bytes of a parameter tree."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def _digest_if_whole(tree):
    """`digest`; None of a tree that is divided over several processes, none of which holds all of it."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    whole = all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in leaves)
    return digest(tree) if whole else None


class Checkpoints:
    """The checkpoints of one workdir, saved asynchronously."""

    def __init__(self, workdir, keep=2):
        self._folder = folder_of(workdir)
        if self._folder.exists() and not self._folder.is_dir():
            raise UserError(f"{self._folder} is not a folder; move it away, or use another --workdir")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        with _all_readable(self._folder):
            self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=_ITEMS)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            with self._writing():
                self._manager.close()
        except UserError:
            if kind is None:  # else the error on its way says more
                raise

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise whatever their writers raise, often a save later
            line = " ".join(str(error).split())[-160:]
            of_device = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
            if of_device and jax.process_count() > 1:
                raise OthersLost(
                    f"another process of this run ended while a checkpoint was written ({line}); the same command "
                    "resumes"
                ) from error
            raise UserError(
                f"cannot write a checkpoint into {self._folder} ({type(error).__name__}: ...{line}); once that is "
                "mended, room made where a disk is full, the same command goes on from the last one"
            ) from error

    def latest(self):
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step, params, opt_state, **trained_on):
        """Starts saving; the arrays are copied to the host before this returns.

        Args:
          trained_on: plain values about the data, for `trained_on`.
        """
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(params),
            train=ocp.args.StandardSave(opt_state),
            meta=ocp.args.JsonSave(
                {"step": int(step), "digest": digest(params), "optimizer": _digest_if_whole(opt_state)} | trained_on
            ),
        )
        with self._writing():
            self._manager.save(step, args=items)

    def wait(self):
        """Blocks until everything is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def restore(self, step, params, opt_state):
        """Parameters and optimizer state of `step`, shaped and placed like the two targets.

        Raises:
          UserError: for a damaged or foreign checkpoint; the digests of what was read must match.
        """
        restored = _restore(
            self._manager,
            self._folder,
            step,
            model=ocp.args.StandardRestore(_abstract(params)),
            train=ocp.args.StandardRestore(_abstract(opt_state)),
        )
        saved, read = restored["meta"].get("optimizer"), _digest_if_whole(restored["train"])
        if None not in (saved, read) and saved != read:
            where = self._folder / str(step)
            raise UserError(f"checkpoint {where} is damaged, the digest of its optimizer differs; {_REMEDY}")
        return restored["model"], restored["train"]


def restore_model(workdir, target, step=None):
    """Parameters of a workdir, without the optimizer.

    Args:
      target: a tree of arrays or `jax.ShapeDtypeStruct` with the expected shapes.
      step: of the checkpoint; the newest where None.

    Returns:
      ``(params, meta)``: NumPy-convertible arrays on the default device, and ``{"step", "digest", …}``.

    Raises:
      UserError: for a missing, truncated or foreign checkpoint; the digest of what was read must match.
    """
    with _opened(workdir) as (manager, folder):
        step = manager.latest_step() if step is None else step
        restored = _restore(manager, folder, step, model=ocp.args.StandardRestore(_abstract(target)))
    return restored["model"], restored["meta"]


def trained_on(workdir):
    """What `Checkpoints.save` was told about the data, from the newest checkpoint; {} in one that says nothing."""
    with _opened(workdir) as (manager, folder), _checkpoint_readable(folder / str(manager.latest_step())):
        meta = manager.restore(manager.latest_step(), args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        return {name: value for name, value in meta.items() if name not in ("step", "digest", "optimizer")}


@contextlib.contextmanager
def _opened(workdir):
    """The manager of a workdir that has a complete checkpoint, and its folder."""
    folder = folder_of(workdir)
    if not folder.is_dir():
        raise UserError(f"no checkpoint in {workdir}: train first (python -m lsrs_jax.train --workdir={workdir} ...)")
    options = ocp.CheckpointManagerOptions(read_only=True)
    with _all_readable(folder), ocp.CheckpointManager(folder, options=options, item_names=_ITEMS) as manager:
        if manager.latest_step() is None:
            raise UserError(f"no complete checkpoint in {folder}: let the training finish or resume it")
        yield manager, folder


def _abstract(target):
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def describe(leaf):
        sharding = getattr(leaf, "sharding", None) or device
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(describe, target)


def _restore(manager, folder, step, **items):
    where = folder / str(step)
    with _checkpoint_readable(where):
        restored = manager.restore(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonRestore()))
        meta = restored["meta"]
        intact = digest(restored["model"]) == meta["digest"] and meta["step"] == step
    if not intact:
        raise UserError(f"checkpoint {where} is damaged, its digest or its step differs; {_REMEDY}")
    return restored


@contextlib.contextmanager
def _readable(what, remedy):
    """Turns whatever is raised inside into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore raise whatever their readers raise
        line = " ".join(str(error).split()).partition(" See full TensorStore")[0][:160]
        raise UserError(f"cannot read {what} ({type(error).__name__}: {line}); {remedy}") from error


def _checkpoint_readable(where):
    return _readable(f"checkpoint {where}: it is damaged, or made for another network or image size", _REMEDY)


def _all_readable(folder):
    return _readable(f"the checkpoints in {folder}: one is damaged", "restore it from a copy, or move its folder away")


_ITEMS = ("model", "train", "meta")
_REMEDY = "restore it from a copy, or move that folder away to fall back to an older one"
