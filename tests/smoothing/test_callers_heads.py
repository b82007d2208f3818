"""Heads in the mesh of their caller, heads that fail, and calls with one image each, which compile once."""

import itertools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing import certify, predict
from lsrs_jax.smoothing.sampler import Sampler
from support import threefry

W = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
SETTINGS = {"sigma": 0.5, "key": threefry(0), "n0": 20, "n": 200, "tile": (2, 16)}
LATENTS = np.random.default_rng(1).standard_normal((3, 4))


def plain(z):
    return z @ W


def counts(head, **changes):
    return certify(
        head, LATENTS, **{"sigma": 0.5, "key": threefry(0), "n0": 20, "n": 200, "tile": (2, 16)} | changes
    ).counts


@pytest.fixture(scope="module")
def expected():
    return counts(plain)


def mesh_of(count, kind="Explicit"):
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType[kind],))


def constrained(z):
    return jax.lax.with_sharding_constraint(z @ W, P("data", None))


def inside_a_loop(z):
    return jax.lax.fori_loop(0, 2, lambda _, total: total + jax.jit(constrained)(z), jnp.zeros((len(z), 3)))


def logical(z):
    return nn.with_logical_constraint(z, ("batch", "embed")) @ W


def resharded(z):
    return jax.sharding.reshard(z @ W, P("data", None))


HEADS = {
    "plain": (plain, ("Explicit", "Auto")),
    "constraint": (constrained, ("Explicit", "Auto")),
    "constraint in a loop": (inside_a_loop, ("Auto",)),
    "logical axes": (logical, ("Explicit", "Auto")),
    "reshard": (resharded, ("Explicit",)),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_mesh_that_the_caller_has_set_changes_no_count(name, expected):
    head, kinds = HEADS[name]
    for count, kind in zip((1, 8), kinds, strict=False):
        mesh = mesh_of(count, kind)
        with jax.set_mesh(mesh), nn.logical_axis_rules((("batch", "data"), ("embed", None))):
            np.testing.assert_array_equal(counts(head), expected)
            assert jax.sharding.get_mesh() == mesh


def test_shardings_without_a_mesh_in_the_context_change_no_count(expected):
    automatic, explicit = mesh_of(8, "Auto"), mesh_of(8)
    weights = jax.device_put(W, NamedSharding(explicit, P()))
    np.testing.assert_array_equal(counts(lambda z: z @ weights), expected)
    divided = NamedSharding(automatic, P("data", None))
    np.testing.assert_array_equal(counts(lambda z: jax.lax.with_sharding_constraint(z @ W, divided)), expected)
    with nn.logical_axis_rules((("batch", "data"), ("embed", None))):  # Flax sees the mesh of the sampling loop
        np.testing.assert_array_equal(counts(logical), expected)
    with warnings.catch_warnings(action="ignore"), automatic:  # the old way to set a mesh
        np.testing.assert_array_equal(counts(constrained), expected)


def test_pmap_and_predictions_work_in_a_mesh(expected):
    with jax.set_mesh(mesh_of(1, "Auto")):
        np.testing.assert_array_equal(counts(constrained, spmd="pmap"), expected)
        found = predict(constrained, LATENTS, sigma=0.5, key=threefry(0), n=200, tile=(2, 16))
    assert found.tolist() == predict(plain, LATENTS, sigma=0.5, key=threefry(0), n=200, tile=(2, 16)).tolist()


# ------------------------------------------------------------------------------------------------- heads that fail


def failing(first):
    """A head that fails from one of its calls on."""
    calls = itertools.count(1)

    def head(z):
        if next(calls) >= first:
            raise KeyError("weights")
        return z @ W

    return head


def with_callback(first):
    """A head whose host callback fails from one of its calls on."""
    calls = itertools.count(1)

    def host(z):
        if next(calls) >= first:
            raise ValueError("host failed")
        return np.asarray(z) @ W

    return lambda z: jax.pure_callback(
        host, jax.ShapeDtypeStruct((len(z), 3), jnp.float32), z, vmap_method="sequential"
    )


def checked(z):
    checkify.check(jnp.all(z > -1e9), "too small")
    return z @ W


class Normalized(nnx.Module):
    def __init__(self, part):
        self.part, self.last = part, nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, z):
        return self.last(self.part(z))


NORM, DROPOUT = nn.BatchNorm(use_running_average=False), nn.Dropout(0.5, deterministic=False)
FAILING = {
    "first call": (failing(1), r"in its first call: .* it does not accept latents \(32, 4\): 'weights'"),
    "second call": (failing(2), r"in its third call, the second one for latents \(32, 4\): 'weights'"),
    "third call": (failing(3), "in its last call, when the sampling loop was compiled: 'weights'"),
    "callback": (with_callback(1), "on random latents, before any sample is drawn: ValueError: host failed"),
    "late callback": (with_callback(30), "on noisy latents, while samples were drawn: ValueError: host failed"),
    "checkify": (checked, "when its first call was compiled: .* without functionalizing it through"),
    "NNX normalization": (Normalized(nnx.BatchNorm(4, rngs=nnx.Rngs(0))), r"train mode .*: call its method eval\(\)"),
    "NNX dropout": (Normalized(nnx.Dropout(0.5, rngs=nnx.Rngs(0))), r"train mode .*: call its method eval\(\)"),
    "Linen normalization": (
        lambda z: NORM.apply(NORM.init(threefry(0), LATENTS.astype(np.float32)), z) @ W,
        "give use_running_average=True",
    ),
    "Linen dropout": (lambda z: DROPOUT.apply({}, z) @ W, "give deterministic=True"),
    "one class": (lambda z: z[:, :1], r"got \(32, 1, 'float32'\); with one class nothing can change"),
}


@pytest.mark.parametrize("name", FAILING)
def test_one_line_says_which_call_of_the_head_failed(name):
    head, why = FAILING[name]
    with pytest.raises(UserError, match=why) as caught:
        counts(head)
    assert str(caught.value).isprintable()


def test_a_module_in_eval_mode_certifies():
    head = Normalized(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    head.eval()
    assert counts(head).sum() == 600


def test_debug_flags_of_the_caller_stop_no_head(expected):
    masked = counts(lambda z: (z @ W).at[:, 2].set(-jnp.inf))
    for flag in ("jax_debug_nans", "jax_debug_infs"):
        jax.config.update(flag, True)  # also in the thread that launches
        try:
            np.testing.assert_array_equal(counts(plain), expected)
            np.testing.assert_array_equal(counts(lambda z: (z @ W).at[:, 2].set(-jnp.inf)), masked)
            with pytest.raises(UserError, match="NaN logits"):
                counts(lambda z: z @ W + jnp.nan)
        finally:
            jax.config.update(flag, False)


def test_strict_promotion_and_disabled_compilation_change_no_count(expected):
    with jax.numpy_dtype_promotion("strict"), jax.disable_jit():
        np.testing.assert_array_equal(counts(plain), expected)
        assert jax.config.jax_disable_jit


# ------------------------------------------------------------------------------------------ one call for each image


@pytest.fixture
def compiled(monkeypatch):
    """The samplers that are made, each of which compiles."""
    made, own = [], Sampler.__init__
    monkeypatch.setattr(
        Sampler, "__init__", lambda self, *args, **named: made.append(self) or own(self, *args, **named)
    )
    return made


def one_by_one(head, **changes):
    return np.concatenate([certify(head, LATENTS[i : i + 1], **SETTINGS | changes).counts for i in range(3)])


def test_calls_with_one_image_each_compile_once(compiled, expected):
    def head(z):
        return z @ W

    np.testing.assert_array_equal(one_by_one(head), expected)
    predict(head, LATENTS, sigma=0.5, key=threefry(1), n=200, tile=(2, 16))
    certify(head, LATENTS, sigma=0.5, key=threefry(1), n=100, tile=(2, 16), lipschitz=2.0, schedule="staged")
    assert len(compiled) == 1
    module = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), jax.nn.gelu, nnx.Linear(8, 3, rngs=nnx.Rngs(1)))
    one_by_one(module)
    assert len(compiled) == 2
    one_by_one(module, sigma=0.25)
    assert len(compiled) == 3


def test_a_head_that_has_changed_is_compiled_again(expected):
    weights, scale = W.copy(), [1.0]
    module = nnx.Linear(4, 3, use_bias=False, rngs=nnx.Rngs(0))
    module.kernel[...] = jnp.asarray(W)
    heads = [lambda z: z @ weights, module, lambda z: z @ W * scale[0]]
    negative = counts(lambda z: -(z @ W))
    assert (negative != expected).any()

    def negate(head):
        if head is heads[0]:
            weights[:] *= -1
        elif head is heads[1]:
            module.kernel[...] = -module.kernel[...]
        else:
            scale[0] = -1.0

    for head in heads:
        np.testing.assert_array_equal(one_by_one(head), expected)
        negate(head)
        np.testing.assert_array_equal(one_by_one(head), negative)


def test_a_head_that_calls_python_functions_is_compiled_again(compiled, expected):
    called = [lambda z: np.asarray(z) @ W]

    def head(z):
        shape = jax.ShapeDtypeStruct((len(z), 3), jnp.float32)
        return jax.pure_callback(called[0], shape, z, vmap_method="sequential")

    np.testing.assert_array_equal(counts(head), expected)
    called[0] = lambda z: -(np.asarray(z) @ W)
    assert (counts(head) != expected).any()
    assert len(compiled) == 2
