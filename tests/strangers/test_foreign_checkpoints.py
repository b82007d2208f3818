"""Checkpoints from strangers give the same parameters, or an error of one line; nothing in them is executed."""

import contextlib
import json
import pickle
import sys

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsrs_jax.training import checkpoint
from support.executions import Payload, nothing_executed
from support.hostile import JSON, answer, examples, json_text

PARAMS = {
    "encoder": {},
    "head": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)},
}
MOMENTUM = {"momentum": np.zeros(1, np.float32)}
TARGET = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)


@pytest.fixture(scope="module")
def trained(folder):
    with checkpoint.Checkpoints(folder / "run") as checkpoints:
        checkpoints.save(2, PARAMS, MOMENTUM)
        checkpoints.wait()
    # Orbax leaves unfinished tasks behind when a checkpoint is damaged. The commands ignore their errors, too.
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    yield folder / "run"
    sys.unraisablehook = hook


def restore(workdir):
    """Whether the checkpoint of a workdir was restored exactly; otherwise it must be refused in one line."""
    restored = answer(checkpoint.restore_model, workdir, TARGET)
    if restored is None:
        return False
    params, meta = restored
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    digests = {"digest": checkpoint.digest(PARAMS), "optimizer": checkpoint.digest(MOMENTUM)}
    assert meta == {"step": 2} | digests
    return True


@contextlib.contextmanager
def replaced(path, content):
    """Puts another file in the place of one; a file that a thread of TensorStore still reads does not change."""

    def put(text):
        other = path.with_name(".other")
        other.write_bytes(text)
        other.replace(path)

    before = path.read_bytes()
    put(content)
    try:
        yield
    finally:
        put(before)


def test_no_checkpoint_is_unpickled(trained, tmp_path):
    canary = tmp_path / "canary"
    files = [path for path in sorted((trained / "checkpoints").rglob("*")) if path.is_file()]
    assert restore(trained)
    refusals = set()
    with nothing_executed(canary):
        for path in files:
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
                with replaced(path, pickle.dumps(Payload(canary), protocol)):
                    if not restore(trained):
                        refusals.add(path.relative_to(trained / "checkpoints/2").parts[0])
    assert refusals == {"model", "meta"}
    assert restore(trained)


@examples(150)
@given(st.data())
def test_a_damaged_checkpoint_gives_the_same_parameters_or_one_line(trained, data):
    files = [path for path in sorted((trained / "checkpoints").rglob("*")) if path.is_file()]
    names = sorted({path.name for path in files if len(path.name) < 32})
    name = data.draw(st.sampled_from([*names, "data"]))  # every training gives its data files new random names
    some = [path for path in files if path.name == name or (name == "data" and len(path.name) >= 32)]
    path = some[data.draw(st.integers(0, len(some) - 1))]
    content = data.draw(
        st.binary(max_size=30)
        | JSON.map(lambda value: json_text(value).encode())
        | st.integers(0, 300).map(lambda size: path.read_bytes()[:size])
        | st.sampled_from([b"[" * 100_000, b"1" * 5000, b"[]", b"NaN"])
    )
    with replaced(path, content):
        restore(trained)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"1" * 5000])
def test_damaged_metadata_of_orbax_is_one_line_for_both_commands(trained, content):
    with replaced(trained / "checkpoints" / "2" / "_CHECKPOINT_METADATA", content):
        assert answer(checkpoint.Checkpoints, trained) is None
        assert not restore(trained)


@pytest.mark.parametrize("step", [3, "2", None, 1e999, [2]])
def test_a_checkpoint_of_another_step_is_refused(trained, step):
    path = trained / "checkpoints" / "2" / "meta" / "metadata"
    with replaced(path, json.dumps(json.loads(path.read_text()) | {"step": step}).encode()):
        assert not restore(trained)
