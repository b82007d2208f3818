"""Random NCHW networks replayed as NHWC are the same function, convolve in the fast order, and keep few transposes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.extend.core import jaxpr_as_fun

from lsrs_jax.smoothing.channels_last import channels_last, other_layouts
from lsrs_jax.smoothing.replay import parts
from support.hostile import examples

BATCH, CHANNELS, SIZE = 3, 4, 7
FAST = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def convolve(rng, x, width, kernel=(3, 3), stride=(1, 1), padding="SAME", groups=1, dilation=(1, 1), spread=(1, 1)):
    """A convolution of images (B, C, H, W) with random kernels OIHW."""
    shape = (width, x.shape[1] // groups, *kernel)
    weights = (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(x.dtype)
    named = {"lhs_dilation": spread, "rhs_dilation": dilation, "feature_group_count": groups}
    y = lax.conv_general_dilated(x, weights, stride, padding, dimension_numbers=("NCHW", "OIHW", "NCHW"), **named)
    return y + rng.standard_normal((width, 1, 1)).astype(x.dtype)


def drawn_convolution(draw, rng, x):
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(2))
    padding = draw(st.sampled_from(["SAME", [(1, 1), (2, 0)], [(2, 2), (2, 2)]]))
    two = st.sampled_from([(1, 1), (2, 1), (2, 2)])
    stride, dilation, spread = draw(two), draw(two), draw(st.sampled_from([(1, 1), (1, 1), (2, 2)]))
    groups = draw(st.sampled_from([groups for groups in (1, 1, 2, x.shape[1]) if x.shape[1] % groups == 0]))
    width = groups * draw(st.integers(1, max(1, 16 // groups)))
    padding = [(3, 3), (3, 3)] if padding != "SAME" and spread != (1, 1) else padding
    return convolve(rng, x, width, kernel, stride, padding, groups, dilation, spread if padding != "SAME" else (1, 1))


def pool(draw, rng, x):
    window = (1, 1, *draw(st.sampled_from([(2, 2), (3, 2)])))
    padding = ((0, 0), (0, 0), (1, 1), (0, 1))
    zero, function = draw(st.sampled_from([(-jnp.inf, lax.max), (jnp.inf, lax.min), (0.0, lax.add)]))
    return lax.reduce_window(x, jnp.asarray(zero, x.dtype), function, window, (1, 1, 2, 1), padding)


def residual(draw, rng, x):
    return x + jax.nn.gelu(convolve(rng, x, x.shape[1]))


def excite(draw, rng, x):
    means = x.mean(axis=(2, 3)) @ rng.standard_normal((x.shape[1],) * 2).astype(x.dtype)
    return x * jax.nn.sigmoid(means)[:, :, None, None]


def normalize(draw, rng, x):
    groups = x.reshape(x.shape[0], 1 if x.shape[1] % 2 else 2, -1, *x.shape[2:])
    centred = groups - groups.mean(axis=(2, 3, 4), keepdims=True)
    return (centred / jnp.sqrt(jnp.square(centred).mean(axis=(2, 3, 4), keepdims=True) + 0.1)).reshape(x.shape)


def gate(draw, rng, x):
    first, second = jnp.split(jnp.concatenate([x, x[:, ::-1]], axis=1), 2, axis=1)
    return jnp.where(first > 0, first, jnp.tanh(second)) * jnp.clip(second, -1, 1)


def resize(draw, rng, x):
    wide = jnp.broadcast_to(x[:, :, :, None, :, None], (*x.shape[:3], 2, x.shape[3], 2))
    return wide.reshape(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])[:, :, 1:9:2, 1:9]


def attend(draw, rng, x):
    tokens = x.reshape(*x.shape[:2], -1).transpose(0, 2, 1)
    weights = jax.nn.softmax(tokens @ tokens.transpose(0, 2, 1) / np.sqrt(x.shape[1]), axis=-1)
    return (weights @ tokens).transpose(0, 2, 1).reshape(x.shape)


def swap(draw, rng, x):
    return jnp.pad(jnp.swapaxes(x, 2, 3), ((0, 0), (0, 1), (1, 0), (0, 0)))


def most(draw, rng, x):
    x = x + x.max(axis=2)[:, :, None] * x.mean(axis=3)[..., None]
    return x + (x.argmax(axis=1) == 0)[:, None].astype(x.dtype) + lax.cummax(x, axis=2) + jnp.sort(x, axis=1)


def loop(draw, rng, x):
    width = x.shape[1]
    kernels = (rng.standard_normal((2, width, width, 3, 3)) / np.sqrt(9 * width)).astype(x.dtype)

    def body(carry, kernel):
        numbers = ("NCHW", "OIHW", "NCHW")
        return jax.nn.relu(lax.conv_general_dilated(carry, kernel, (1, 1), "SAME", dimension_numbers=numbers)), ()

    return lax.cond(x.shape[0] > 0, lambda y: lax.scan(body, y, kernels)[0], lambda y: y, x)


def wrapped(draw, rng, x):
    return jax.checkpoint(jax.jit(lambda y: jax.nn.silu(convolve(rng, y, 6))))(x)


LAYERS = [drawn_convolution, drawn_convolution, pool, residual, excite, normalize, gate, resize, attend, swap, most]
LAYERS += [loop, wrapped]


def network(draw, dtype):
    """A function images (B, C, H, W) → logits of random layers, with the shape of one image."""
    layers = draw(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=4))
    flat, seed, choices = draw(st.booleans()), draw(st.integers(0, 9)), {}

    def remembered(index):
        """`draw`, which draws in the first trace and repeats its answers in later ones."""
        answers, place = choices.setdefault(index, []), iter(range(99))

        def again(strategy):
            number = next(place)
            if number == len(answers):
                answers.append(draw(strategy))
            return answers[number]

        return again

    def head(x):
        rng = np.random.default_rng(seed)
        x = jax.nn.relu(convolve(rng, x.astype(dtype), 16, padding=[(1, 1), (2, 2)]))
        for index, layer in enumerate(layers):
            x = layer(remembered(index), rng, x)
        x = x.reshape(x.shape[0], -1) if flat else x.mean(axis=(2, 3))
        return (x @ (rng.standard_normal((x.shape[1], 5)) / np.sqrt(x.shape[1])).astype(dtype)).astype(jnp.float32)

    return head


def compared(head, shape):
    """The largest difference of the replayed logits, relative to the largest logit, and the replayed program."""
    program = jax.make_jaxpr(head)(jax.ShapeDtypeStruct(shape, jnp.float32))
    assert other_layouts(program)
    replayed = channels_last(program)
    images = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    before, after = (np.asarray(jax.jit(jaxpr_as_fun(one))(images)[0]) for one in (program, replayed))
    assert before.dtype == after.dtype
    assert before.shape == after.shape
    return np.abs(before - after).max() / np.abs(before).max(), replayed


@examples(25)
@given(st.data(), st.sampled_from(["batched", "vmapped", "NHWC outside"]))
def test_a_replayed_network_is_the_same_function(data, form):
    batched = network(data.draw, jnp.float32)
    shape = (BATCH, CHANNELS, SIZE, SIZE)
    if form == "vmapped":
        head = jax.vmap(lambda x: batched(x[None])[0])
    elif form == "NHWC outside":
        head, shape = (lambda x: batched(jnp.moveaxis(x, -1, 1))), (BATCH, SIZE, SIZE, CHANNELS)
    else:
        head = batched
    error, replayed = compared(head, shape)
    assert error <= 1e-5
    assert not other_layouts(replayed)


@examples(4)
@given(st.data())
def test_a_replayed_network_in_bfloat16_is_the_same_up_to_its_rounding(data):
    error, _ = compared(network(data.draw, jnp.bfloat16), (BATCH, CHANNELS, SIZE, SIZE))
    assert error <= 0.05


def equations(program, name):
    return [equation for jaxpr, _ in parts(program) for equation in jaxpr.eqns if equation.primitive.name == name]


def chain(x):
    """What stands between the convolutions of residual networks: nothing in it needs a transpose."""
    rng = np.random.default_rng(0)
    x = jax.nn.relu(convolve(rng, x, 16))
    for layer in (residual, normalize, excite, gate, residual):
        x = layer(None, rng, x)
    x = jnp.concatenate([x, jax.nn.silu(convolve(rng, x, 4, groups=4))], axis=1)
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    return jax.nn.softmax(convolve(rng, jnp.pad(x, ((0, 0), (0, 0), (1, 0), (0, 1))), 5).mean(axis=(2, 3)))


@pytest.mark.parametrize("form", ["batched", "vmapped"])
def test_the_layout_is_carried_from_convolution_to_convolution(form):
    head = chain if form == "batched" else jax.vmap(lambda x: chain(x[None])[0])
    error, replayed = compared(head, (BATCH, 4, 8, 8))
    assert error <= 1e-5
    large = [e for e in equations(replayed, "transpose") if e.invars[0].aval.size >= BATCH * 4 * 8 * 8]
    assert len(large) == 1  # of the images, at the start
    assert not any(e.invars[0].aval.shape[2:] == (3, 3) for e in equations(replayed, "transpose"))  # kernels


def test_kernels_are_transposed_before_the_program_runs_and_small_groups_stay_as_they_are():
    def head(x):
        rng = np.random.default_rng(0)
        x = convolve(rng, convolve(rng, x, 32), 32, groups=32)
        return convolve(rng, convolve(rng, x, 32, groups=16), 32, groups=4).mean(axis=(2, 3))

    program = jax.make_jaxpr(head)(jnp.zeros((BATCH, 4, 8, 8)))
    given, found = (
        [tuple(e.params["dimension_numbers"]) for e in equations(one, "conv_general_dilated")]
        for one in (program, channels_last(program))
    )
    assert set(given) == {((0, 1, 2, 3),) * 3}
    small = (FAST[0], (0, 1, 2, 3), FAST[2])  # fewer than 8 channels per group: kernels OIHW
    assert found == [FAST, small, small, FAST]
    replayed = channels_last(program)
    sources = {id(variable) for variable in replayed.jaxpr.constvars}
    assert all(id(e.invars[1]) in sources for e in equations(replayed, "conv_general_dilated"))
    assert not other_layouts(jax.make_jaxpr(lambda x: convolve(np.random.default_rng(0), x, 4, groups=4))(
        jnp.zeros((BATCH, 4, 8, 8))
    ))  # fmt: skip


def test_convolutions_of_other_ranks_and_fast_ones_are_left():
    def nhwc(x):
        return nn.Conv(4, (3, 3), feature_group_count=2).init_with_output(jax.random.key(0), x)[0]

    def line(x):
        return lax.conv_general_dilated(x, np.ones((4, 4, 3), np.float32), (1,), "SAME")

    def solid(x):
        return lax.conv_general_dilated(x, np.ones((4, 4, 3, 3, 3), np.float32), (1, 1, 1), "SAME")

    for head, shape in ((nhwc, (2, 8, 8, 4)), (line, (2, 4, 8)), (solid, (2, 4, 5, 5, 5))):
        program = jax.make_jaxpr(head)(jnp.zeros(shape))
        assert equations(program, "conv_general_dilated")
        assert not other_layouts(program)
