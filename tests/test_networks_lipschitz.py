"""Networks that users write with our layers: what is accepted, what is refused, and whether the constant holds."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsrs_jax import layers, smoothing
from lsrs_jax.certification.platform_check import check_encoder
from lsrs_jax.layers import lipschitz_report, materialize_network
from lsrs_jax.layers.base import matrix_plain
from lsrs_jax.layers.lipschitz import Float64Encoder, LipschitzReport, materialize
from lsrs_jax.runtime.errors import UserError
from support import threefry

SHAPE = (6, 6, 4)
TIGHT = 1e-9  # relative: constants have margins of 1e-11 per layer


class Net(nn.Module):
    """A compact module whose body is a function."""

    body: Callable

    @nn.compact
    def __call__(self, x):
        return self.body(x)


def initialize(net, shape=SHAPE):
    """Random parameters, without compiling the network's own initialization."""
    rng, sizes = np.random.default_rng(0), jax.eval_shape(net.init, threefry(0), jnp.zeros((2, *shape)))
    return jax.tree.map(lambda leaf: 0.5 * rng.standard_normal(leaf.shape).astype(leaf.dtype), sizes)


def proven(body, shape=SHAPE):
    """The module, its variables and its `Materialized`."""
    net = Net(body)
    variables = initialize(net, shape)
    return net, variables, materialize_network(net, variables, shape)


def jacobian(plain, x):
    """The matrix of the derivative at one input, in float64."""
    with jax.enable_x64(True):
        function = jax.jit(jax.jacfwd(lambda x: plain.apply(plain.params, x[None])[0].ravel()))
        return np.asarray(function(jnp.asarray(x, jnp.float64))).reshape(-1, x.size)


def largest_stretch(plain, shape=SHAPE):
    """The largest ratio of distances among pairs of near and distant inputs, in float64."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, *shape))
    step = rng.standard_normal(x.shape) * 10.0 ** rng.uniform(-4, 1, (64, *[1] * len(shape)))
    encode = Float64Encoder(plain, 64)
    apart = (encode(x + step) - encode(x)).reshape(64, -1)
    return (np.linalg.norm(apart, axis=1) / np.linalg.norm(step.reshape(64, -1), axis=1)).max()


def conv(features, **other):
    return layers.OrthogonalConv(features, (3, 3), **{"initializer": "random"} | other)


def dense(features):
    return layers.OrthogonalDense(features, method="cayley")


def coupling(x):
    """Nested splits, permuted channels, both halves changed, a layer under remat."""
    a, b = jnp.split(x, 2, axis=-1)
    a1, a2 = jnp.split(layers.MaxMin()(conv(4)(a)), [3], axis=-1)
    x = jnp.concatenate([b[..., ::-1], layers.MaxMin()(a1), a2], axis=-1)
    x = jnp.roll(jnp.moveaxis(x, -1, 1)[:, np.array([3, 0, 5, 1, 4, 2])], 1, axis=2)
    p, q = x[:, :2], x[:, 2:]
    q = nn.remat(layers.OrthogonalConv)(4, (3, 3), padding="zero")(q.transpose(0, 2, 3, 1))
    x = jnp.concatenate([jnp.moveaxis(p, 1, -1).reshape(-1, 72), q.reshape(len(q), -1)], axis=1)
    return layers.Householder()(dense(216)(x))


ACCEPTED = {
    "layer": lambda x: dense(3)(x),
    "moves only": lambda x: x.transpose(0, 3, 1, 2)[:, ::-1, 1:].reshape(x.shape[0], -1),
    "identity": lambda x: x,
    "coupling": coupling,
    "flatten by hand": lambda x: dense(5)(layers.MaxMin()(conv(6, strides=(2, 2))(x)).reshape(x.shape[0], -1)),
    "parallel": lambda x: jnp.concatenate(
        [dense(4)(half.reshape(len(x), -1)) for half in jnp.split(x, 3, axis=1)], axis=1
    ),
    "stack": lambda x: jnp.stack([layers.MaxMin()(part) for part in (*jnp.unstack(x[:, 1:], axis=1), x[:, 0])], axis=2),
    "along the batch and back": lambda x: (
        jnp.concatenate([x[..., :2], dense(2)(x[..., 2:])], axis=0).reshape(2, len(x), 72).transpose(1, 2, 0)
    ),
    "batch elsewhere": lambda x: jnp.moveaxis(jnp.concatenate(jnp.split(jnp.moveaxis(x, 0, -1), 2), 1), -1, 0),
    "sequential": lambda x: nn.Sequential([conv(4), layers.MaxMin(), layers.Flatten(), dense(4)])(x),
    "chain inside": lambda x: layers.Encoder((conv(6), layers.MaxMin(), conv(4)))(x),
    "compiled inside": lambda x: nn.jit(layers.OrthogonalConv)(4, (3, 3))(jax.jit(lambda x: jnp.flip(x, 1))(x)),
    "unused": lambda x: (nn.relu(x).sum(), layers.MaxMin()(x * 2), nn.Dense(3)(x), layers.MaxMin()(x))[-1],
    "named and compiled apart": lambda x: jax.lax.optimization_barrier(jax.lax.stop_gradient(layers.MaxMin()(x))),
    "by numbers drawn before": lambda x: x[:, jax.random.permutation(jax.random.key(0), 6)],
    "row by row": lambda x: jax.vmap(lambda row: row[::-1].T)(layers.MaxMin()(x)),
    "taken": lambda x: layers.MaxMin()(jnp.take(x, jnp.arange(3) + 1, axis=-1)),
    "sliced where a number says": lambda x: jax.lax.dynamic_slice(x, (0, 1, 2, 0), (len(x), 3, 3, 4)),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_accepted_network_runs_as_it_was_written_and_is_never_stretched(name):
    net, variables, plain = proven(ACCEPTED[name])
    x = np.random.default_rng(1).standard_normal((5, *SHAPE)).astype(np.float32)
    before, encode = np.asarray(jax.jit(net.apply)(variables, x)), Float64Encoder(plain, 3)
    latents = encode(x)
    assert latents.dtype == np.float64
    assert latents.shape[1:] == plain.report.output_shape
    np.testing.assert_allclose(latents, before, atol=3e-5)
    np.testing.assert_array_equal(jax.jit(net.apply)(variables, x), before)  # the trace has left nothing behind
    assert largest_stretch(plain) <= plain.report.constant * (1 + 1e-12) <= 1 + TIGHT
    assert check_encoder(plain, encode) <= 1
    assert LipschitzReport.from_dict(plain.report.to_dict()) == plain.report


def test_linear_networks_have_the_norm_that_is_proven():
    def couplings(x):
        for index in range(3):
            a, b = jnp.split(x, 2, axis=-1)
            x = jnp.concatenate([conv(2)(b), a], axis=-1)
            x = jnp.moveaxis(x, 1, 2)[:, :, :: (-1) ** index]
        return layers.Normalize((0.5,), (0.25,))(x).reshape(x.shape[0], -1)

    _, _, plain = proven(couplings)
    sigma = np.linalg.svd(jacobian(plain, np.zeros(SHAPE)), compute_uv=False)
    assert sigma[0] <= plain.report.constant <= sigma[0] * (1 + TIGHT)
    assert sigma[-1] == pytest.approx(4)
    with pytest.raises(AssertionError):
        assert sigma[0] <= plain.report.constant * (1 - 1e-9)


def test_a_chain_has_the_report_of_the_same_encoder():
    chain = (
        layers.Normalize((0.5, 0.4, 0.3, 0.2), (0.5, 2.0, 0.25, 1.0)), conv(8, padding="zero"), layers.L2Pool(),
        layers.GroupSort(3), layers.Flatten(), dense(5),
    )  # fmt: skip
    encoder = layers.Encoder(chain)
    variables = initialize(encoder)
    expected = materialize(encoder, variables, SHAPE)
    found = materialize_network(encoder, variables, SHAPE)
    assert found.report == expected.report
    x = np.random.default_rng(0).random((3, *SHAPE))
    np.testing.assert_array_equal(Float64Encoder(found, 3)(x), Float64Encoder(expected, 3)(x))

    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x):
            for index, layer in enumerate(chain):
                x = layer.clone(name=f"layers_{index}", parent=self)(x)
            return x

    assert lipschitz_report(Compact(), variables, SHAPE) == expected.report
    assert lipschitz_report(Compact(), variables["params"], SHAPE) == expected.report


def test_a_layer_that_is_used_twice_counts_twice():
    class Twice(nn.Module):
        def setup(self):
            self.scale, self.turn = layers.Normalize((0.0,), (0.5,)), conv(4)

        def __call__(self, x):
            return self.turn(self.scale(self.turn(self.scale(x))))

    net = Twice()
    variables = initialize(net)
    plain = materialize_network(net, variables, SHAPE)
    assert [layer.layer for layer in plain.report.layers] == [
        "0 Normalize", "1 OrthogonalConv", "2 Normalize", "3 OrthogonalConv",
    ]  # fmt: skip
    norm = np.linalg.norm(jacobian(plain, np.zeros(SHAPE)), 2)
    assert 4 * (1 - TIGHT) < norm <= plain.report.constant < 4 * (1 + TIGHT)


def scale(x, by, mean=0.0):
    return layers.Normalize((mean,), (1 / by,))(x)


@pytest.mark.parametrize(
    ("first", "second", "constant"),
    [
        ((2, 4), (4, 0.5), 8),
        ((4, 0.5), (2, 4), 8),
        ((0.5,), (0.25,), 0.5),
        ((0.5, 0.5), (), 1),
        ((4,), (4,), 4),
        ((0.25, 4, 2), (0.5,), 2),
    ],
)
def test_branches_count_the_largest_path(first, second, constant):
    def branches(x):
        parts = [x[..., :1], x[..., 1:]]
        for position, factors in enumerate((first, second)):
            for by in factors:
                parts[position] = scale(parts[position], by)
        return jnp.concatenate(parts[::-1], axis=-1)

    _, _, plain = proven(branches, (2, 2, 3))
    norm = np.linalg.norm(jacobian(plain, np.zeros((2, 2, 3))), 2)
    assert norm == pytest.approx(constant)
    assert norm <= plain.report.constant < constant * (1 + TIGHT)
    assert math.prod(layer.sigma_max for layer in plain.report.layers) <= plain.report.constant


def test_the_bound_of_the_rounding_covers_branches_of_large_offsets():
    """In the second branch an offset is scaled after the first branch has raised the constant to the same factor."""

    def branches(x):
        a, b = x[:, :2], x[:, 2:]
        return jnp.concatenate([scale(a, 4), scale(scale(b, 1, mean=-1000.0), 4)], axis=1)

    _, _, plain = proven(branches, (4,))
    report = plain.report
    assert [round(layer.sigma_max, 6) for layer in report.layers] == [4, 1, 1]
    norm = 0.0
    for layer in report.layers:
        norm = layer.sigma_max * norm + layer.offset
    value = Float64Encoder(plain, 1)(np.zeros((1, 4)))[0]
    assert np.linalg.norm(value) <= norm < np.linalg.norm(value) * (1 + 1e-6)

    x = np.random.default_rng(0).standard_normal((100, 4)) * 1e-3
    exact = Float64Encoder(plain, 100)(x)
    single = np.asarray(plain.apply(plain.params, jnp.asarray(x, jnp.float32)), np.float64)
    error = np.linalg.norm(single - exact, axis=1)
    # The bounds are proportional to the rounding unit, which is 2^29 times as large in float32.
    assert (error <= report.rounding(np.linalg.norm(x, axis=1)) * 2**29).all()
    assert error.max() > 0


class Turn(layers.Layer):
    """A layer of a user: a product with a random semi-orthogonal matrix."""

    features: int
    seed: int

    def matrix(self, rows):
        square = np.random.default_rng(self.seed).standard_normal((max(rows, self.features),) * 2)
        return np.linalg.qr(square)[0][:rows, : self.features]

    def output_shape(self, input_shape):
        return (*input_shape[:-1], self.features)

    def __call__(self, x):
        return x @ jnp.asarray(self.matrix(x.shape[-1]), x.dtype)

    def materialize(self, params, input_shape):
        return matrix_plain(lambda matrix, x: x @ matrix, self.matrix(input_shape[-1]))


class RandomProgram:
    """A random program of accepted operations, which also follows the constant of every entry."""

    def __init__(self, seed, isometric):
        self.seed, self.isometric = seed, isometric  # isometric: no layer changes distances, and nothing is dropped

    def __call__(self, x):
        rng, parts = np.random.default_rng(self.seed), [(x, np.ones(x.shape[1:]))]
        for _ in range(16):
            x, constants = parts.pop(rng.integers(len(parts)))
            parts += self.step(rng, x, constants, parts)
        flat = [(x.reshape(len(x), -1), constants.ravel()) for x, constants in parts]
        kept = rng.permutation(sum(constants.size for _, constants in flat))
        kept = kept if self.isometric else kept[: rng.integers(1, kept.size + 1)]
        self.constant = np.concatenate([constants for _, constants in flat])[kept].max()
        return jnp.concatenate([x for x, _ in flat], axis=1)[:, kept]

    def step(self, rng, x, constants, others):
        kind = rng.integers(7)
        if kind == 0 and x.shape[-1] > 1:
            cut = int(rng.integers(1, x.shape[-1]))
            return [(x[..., :cut], constants[..., :cut]), (x[..., cut:], constants[..., cut:])]
        if kind == 1:
            axes = rng.permutation(constants.ndim)
            return [(x.transpose(0, *axes + 1), constants.transpose(axes))]
        if kind == 2:
            return [(x.reshape(len(x), -1)[:, ::-1], constants.ravel()[::-1])]
        if kind == 3 and others:
            y, more = others.pop()
            joined = jnp.concatenate([x.reshape(len(x), -1), y.reshape(len(y), -1)], axis=1)
            return [(joined, np.concatenate([constants.ravel(), more.ravel()]))]
        if kind == 4 and not self.isometric:
            by = float(rng.choice([0.25, 0.5, 2.0, 4.0]))
            return [(scale(x, by), np.full(constants.shape, by * constants.max()))]
        features = x.shape[-1] + int(rng.integers(0 if self.isometric else -min(2, x.shape[-1] - 1), 3))
        turned = Turn(features, int(rng.integers(100)))(x)
        return [(turned, np.full((*constants.shape[:-1], features), constants.max()))]


@pytest.mark.parametrize("isometric", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_random_programs_have_the_constant_of_their_largest_path(seed, isometric):
    body, shape = RandomProgram(seed, isometric), (2, 3, 4)
    net, variables, plain = proven(body, shape)
    assert len(plain.report.layers) >= 2
    assert plain.report.constant == pytest.approx(body.constant, rel=TIGHT)
    x = np.concatenate([np.eye(24), np.random.default_rng(0).standard_normal((2, 24))]).reshape(-1, *shape)
    matrix = Float64Encoder(plain, 26)(x)  # the network is linear: its values at the unit vectors are its matrix
    np.testing.assert_allclose(matrix, jax.jit(net.apply)(variables, x.astype(np.float32)), rtol=1e-4, atol=1e-4)
    sigma = np.linalg.svd(matrix[:24], compute_uv=False)
    assert sigma[0] <= plain.report.constant
    if isometric:
        np.testing.assert_allclose(sigma, 1, atol=1e-9)


def mixed_rows(x):
    return layers.MaxMin()(x.reshape(-1, 2, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape))


def scanned(x):
    layer = layers.MaxMin()
    return jax.lax.scan(lambda x, _: (layer(x), None), x, None, length=2)[0]


def looped(x):
    return jax.lax.while_loop(lambda carry: carry[0] < 2, lambda carry: (carry[0] + 1, carry[1][:, ::-1]), (0, x))[1]


def rolled_by_row(x):
    rows = np.arange(len(x))[:, None]
    return x[rows, (rows + np.arange(6)) % 6]


def by_size(x):
    return layers.MaxMin()(x) if len(x) == 2 else layers.GroupSort(4)(x)


REFUSED = {
    "dense": (lambda x: dense(3)(nn.Dense(4)(layers.MaxMin()(x))), r"operation dot_general in Net/Dense_0 \(Dense\)"),
    "convolution": (lambda x: nn.Conv(3, (1, 1), name="mine")(x), r"conv_general_dilated in Net/mine \(Conv\)"),
    "relu": (lambda x: conv(4)(nn.relu(x)), r"operation max in Net/relu .*only reshapes, transposes, slices and the"),
    "residual": (lambda x: x + conv(4)(x), "operation add in Net has no proven"),
    "scale": (lambda x: conv(4)(x) * 2, "operation mul in Net"),
    "sum": (lambda x: layers.MaxMin()(x).sum(axis=-1), "operation reduce_sum"),
    "sort": (lambda x: jnp.sort(conv(4)(x), axis=-1), "operation sort"),
    "where": (lambda x: jnp.where(jnp.arange(4) > 1, x, 0.0), "operation select_n"),
    "overlap": (lambda x: jnp.concatenate([x[..., :3], x[..., 2:]], -1), "concatenate in Net reads an entry twice"),
    "used twice": (
        lambda x: jnp.concatenate([x, layers.MaxMin()(x)], -1),
        "layer 0 MaxMin and the output both read an entry of the input",
    ),
    "overlap behind layers": (
        lambda x: jnp.concatenate([dense(2)(dense(4)(x)[..., :3]), dense(2)(dense(4)(x)[..., 2:])], -1),
        "layer 0 OrthogonalDense and layer 2 OrthogonalDense both read an entry of the input",
    ),
    "overlap in a later layer": (
        lambda x: (lambda y: jnp.concatenate([dense(2)(y[..., :3]), y[..., 2:]], -1))(dense(4)(x)),
        "layer 1 OrthogonalDense and the output both read an entry of the output of layer 0 OrthogonalDense",
    ),
    "repeat": (lambda x: jnp.repeat(x, 2, axis=-1), "reads an entry twice"),
    "broadcast": (lambda x: jnp.broadcast_to(x[:, None], (len(x), 2, *SHAPE)), "broadcast_in_dim in Net.*entry twice"),
    "picked twice": (lambda x: layers.MaxMin()(x[..., np.array([0, 2, 0])]), "operation gather .*reads an entry twice"),
    "beyond the edge": (lambda x: jnp.take(x, jnp.array([1, 9]), axis=-1), "or one that does not exist"),
    "picked by the input": (lambda x: x[:, jnp.argmax(x[0, 0, 0])], "operation argmax"),
    "padding": (lambda x: jnp.concatenate([x, jnp.zeros_like(x)], -1), "values that do not depend on the input"),
    "padded": (lambda x: jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0))), "operation pad"),
    "batch reversed": (lambda x: layers.MaxMin()(x)[::-1], "the output of the module mixes or moves the rows"),
    "batch rolled": (lambda x: layers.MaxMin()(jnp.roll(x, 1, axis=0)), "input of the layer MaxMin mixes or moves"),
    "batch mixed": (mixed_rows, "Net cannot be traced for inputs \\(3|mixes or moves the rows"),
    "batch as feature": (lambda x: layers.MaxMin()(jnp.moveaxis(x, 0, -1)), "mixes or moves the rows of the batch"),
    "another order in each row": (rolled_by_row, "mixes or moves the rows of the batch"),
    "batch in one row": (lambda x: x.reshape(1, -1), "mixes or moves the rows of the batch"),
    "row of another": (lambda x: x[:1], "mixes or moves the rows of the batch"),
    "batch size": (by_size, "Net is another function for batches of 2 and of 3"),
    "bfloat16": (
        lambda x: layers.MaxMin()(x.astype(jnp.bfloat16)),
        "casts float32 to bfloat16, and only casts to wider floats keep",
    ),
    "integers": (lambda x: x.astype(jnp.int32), "casts float32 to int32"),
    "tuple": (lambda x: (x, x), "must return one array, whose constant is to be proven, got tuple"),
    "constant": (lambda x: jnp.zeros((len(x), 3)), "does not depend on its input"),
    "scan": (scanned, "operation scan"),
    "cond": (lambda x: jax.lax.cond(jnp.array(True), jnp.flip, jnp.negative, x), "operation cond"),
    "while": (
        lambda x: jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1][:, ::-1]), (0, x))[1],
        "while",
    ),
    "rows by vmap": (lambda x: jax.vmap(layers.MaxMin())(x), "cannot be traced .*'lsrs_layer'"),
    "derivative": (lambda x: jax.grad(lambda x: layers.MaxMin()(x).sum())(x), "cannot be traced .*'lsrs_layer'"),
    "own kernel": (lambda x: conv(4)(x, jnp.zeros((3, 3, 4, 4))), "OrthogonalConv is called with more than"),
    "batch norm": (lambda x: nn.BatchNorm(use_running_average=True)(x), r"operation sub in Net/BatchNorm_0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_by_its_name(name):
    body, match = REFUSED[name]
    net = Net(body)
    with pytest.raises(UserError, match=match):
        lipschitz_report(net, initialize(net), SHAPE)


def test_modules_and_parameters_that_do_not_fit_are_refused():
    net, variables, _ = proven(lambda x: conv(4)(x))
    for module, given, shape, match in (
        (lambda x: x, variables, SHAPE, "a module of Linen or NNX, got function"),
        (net, None, SHAPE, "Net needs its variables, a mapping, got NoneType"),
        (net, variables, (), "input_shape must be the shape of one input"),
        (net, variables, (6, 0, 4), "input_shape must be the shape of one input"),
        (net, {}, SHAPE, "layer 0 OrthogonalConv of the encoder finds no parameters that fit"),
        (net, jax.tree.map(lambda leaf: leaf * np.nan, variables), SHAPE, "non-finite parameters"),
        (net, variables, (5, 6), r"takes images \(B, H, W, C\)"),
        (nn.Dropout(0.5, deterministic=False), {}, SHAPE, "Dropout cannot be traced .*PRNG"),
    ):
        with pytest.raises(UserError, match=match):
            materialize_network(module, given, shape)
    masked = jax.tree.map(lambda leaf: np.ma.masked_greater(np.asarray(leaf), 0.1), variables)
    with pytest.raises(UserError, match="masked"):
        materialize_network(net, masked, SHAPE)
    plain = materialize_network(net, variables, SHAPE)
    with pytest.raises(UserError, match=r"materialized for inputs \(6, 6, 4\), got \(5, 6, 4\)"):
        plain.apply(plain.params, jnp.zeros((1, 5, 6, 4)))


def test_parameters_may_be_computed_from_variables_but_not_from_the_input():
    def halved(x):
        class Halved(nn.Module):
            @nn.compact
            def __call__(self, x):
                return layers.Householder()(x)

        changed = nn.map_variables(Halved, "params", lambda tree: jax.tree.map(lambda leaf: leaf / 2, tree), init=True)
        return changed()(x)

    net, variables, plain = proven(halved)
    x = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)
    np.testing.assert_allclose(Float64Encoder(plain, 3)(x), net.apply(variables, x), atol=1e-5)
    np.testing.assert_allclose(plain.params[0], jax.tree.leaves(variables)[0] / 2)

    class Hyper(nn.Module):
        def __call__(self, x):
            return layers.Householder(parent=None).apply({"params": {"theta": x[0, 0, 0, :2]}}, x)

    with pytest.raises(UserError, match="parameters of the layer Householder depend on the input"):
        lipschitz_report(Hyper(), {}, SHAPE)


class Images(nnx.Module):
    """Linen layers inside NNX; MaxMin has no parameters and needs no bridge."""

    def __init__(self, rngs):
        self.turn = nnx.bridge.ToNNX(conv(8, strides=(2, 2)), rngs=rngs)
        self.last = nnx.bridge.ToNNX(dense(5), rngs=rngs)

    def __call__(self, x):
        x = layers.MaxMin()(self.turn(x))
        a, b = jnp.split(x, 2, axis=-1)
        x = jnp.concatenate([b, layers.MaxMin()(a)], axis=-1)
        return self.last(x.reshape(x.shape[0], -1))


def test_a_module_of_nnx_has_the_constant_and_values_of_its_twin_in_linen():
    net = nnx.bridge.lazy_init(Images(nnx.Rngs(0)), jnp.zeros((1, *SHAPE)))
    plain = materialize_network(net, None, SHAPE)
    assert [layer.layer for layer in plain.report.layers] == [
        "0 OrthogonalConv", "1 MaxMin", "2 MaxMin", "3 OrthogonalDense",
    ]  # fmt: skip
    x = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)
    np.testing.assert_allclose(Float64Encoder(plain, 3)(x), net(x), atol=1e-5)
    assert largest_stretch(plain) <= plain.report.constant < 1 + TIGHT
    with pytest.raises(UserError, match="pass None"):
        lipschitz_report(net, nnx.state(net), SHAPE)

    class Free(Images):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.free = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return super().__call__(self.free(x))

    other = nnx.bridge.lazy_init(Free(nnx.Rngs(0)), jnp.zeros((1, *SHAPE)))
    with pytest.raises(UserError, match="operation dot_general has no proven"):
        lipschitz_report(other, None, SHAPE)


def test_the_flags_and_the_mesh_of_the_caller_do_not_matter():
    net, variables, plain = proven(coupling)
    x = np.random.default_rng(0).standard_normal((3, *SHAPE))
    expected = Float64Encoder(plain, 2)(x)
    with jax.set_mesh(jax.make_mesh((8,), ("data",))):
        meshed = materialize_network(net, variables, SHAPE)
        np.testing.assert_array_equal(Float64Encoder(meshed, 2)(x), expected)
    with jax.enable_x64(True):
        wide = materialize_network(Net(lambda x: coupling(x.astype(jnp.float64))), variables, SHAPE)
        assert wide.apply(wide.params, jnp.asarray(x)).dtype == jnp.float64
        narrow = Net(lambda x: coupling(x.astype(jnp.float64).astype(jnp.float32)))
        with pytest.raises(UserError, match="casts float64 to float32"):
            lipschitz_report(narrow, variables, SHAPE)
    assert wide.report == meshed.report == plain.report
    np.testing.assert_array_equal(Float64Encoder(wide, 2)(x), expected)


def test_a_coupling_network_is_certified_from_images_to_radii():
    _, _, plain = proven(lambda x: scale(coupling(x), 2))
    x = np.random.default_rng(0).standard_normal((4, *SHAPE))
    latents, weights = Float64Encoder(plain, 4)(x), np.random.default_rng(1).standard_normal((216, 3))

    def head(z):
        return z @ jnp.asarray(weights, jnp.float32)

    slack = 2 * plain.report.rounding(np.linalg.norm(x.reshape(4, -1), axis=1) + 10)
    found = smoothing.certify(
        head, latents, sigma=0.5, key=threefry(2), n=2_000, lipschitz=plain.report.constant, slack=slack, tile=(4, 64)
    )
    logits = latents @ weights
    assert found.predict.tolist() == logits.argmax(axis=1).tolist()
    assert (found.radius > 0).all()
    # The distance in pixels at which a linear head can change: no certificate may exceed it.
    first, second = np.sort(logits, axis=1)[:, -1], np.sort(logits, axis=1)[:, -2]
    top, other = logits.argsort(axis=1)[:, -1], logits.argsort(axis=1)[:, -2]
    assert (found.radius <= (first - second) / np.linalg.norm(weights[:, top] - weights[:, other], axis=0) / 2).all()


class Louder(layers.MaxMin):
    def __call__(self, x):
        return 7 * x


class Twice(layers.OrthogonalConv):
    @nn.compact
    def __call__(self, x):
        return 2 * layers.OrthogonalConv.__call__(self, x)


@pytest.mark.parametrize("layer", [Louder(), Twice(4, (3, 3))])
def test_a_subclass_that_only_computes_something_else_is_refused(layer):
    encoder = layers.Encoder((layer,))
    variables = encoder.init(threefry(0), jnp.zeros((1, 4, 4, 4)))
    with pytest.raises(UserError, match="a __call__ of its own"):
        materialize(encoder, variables, (4, 4, 4))
    with pytest.raises(UserError, match="a __call__ of its own"):
        materialize_network(encoder, variables, (4, 4, 4))
