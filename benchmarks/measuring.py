"""What the benchmarks share: timing in turns, the ceiling of matrix products, and heads in the sampling loop."""

import importlib
import math
import os
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax.models.flops import flops
from lsrs_jax.models.heads import HEADS
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.rng import domain_key, pinned
from lsrs_jax.smoothing import Sampler

ROUNDS, START = 3, time.perf_counter()


def say(text):
    """Prints a line of progress to stderr, with the seconds since the start."""
    print(f"{time.perf_counter() - START:6.0f} s  {text}", file=sys.stderr, flush=True)


def rates(works, seconds, label):
    """The best rate of each work, in repetitions per second.

    A work is a function of k that does k repetitions and waits for their end. All works take turns in each of three
    rounds, so that a drift of the machine affects all of them. Each takes about `seconds` in total; a work that is too
    slow for that gets fewer rounds.
    """
    target, repeats, best, spent = seconds / ROUNDS, {}, {}, dict.fromkeys(works, 0.0)

    def run(name, count):
        start = time.perf_counter()
        works[name](count)
        took = time.perf_counter() - start
        best[name] = max(best.get(name, 0.0), count / took)
        spent[name] += took
        return took

    for number, (name, work) in enumerate(works.items(), start=1):
        say(f"{label}: first run {number} of {len(works)}")
        work(1)  # compiles
        repeats[name], took = 1, run(name, 1)
        while took < target / 4:
            repeats[name] = max(repeats[name] + 1, int(repeats[name] * min(16, target / max(took, 1e-6))))
            took = run(name, repeats[name])
        repeats[name] = max(1, round(repeats[name] * target / took))
    for index in range(ROUNDS):
        say(f"{label}: round {index + 1} of {ROUNDS}")
        for name in works:
            if spent[name] < 2 * seconds:
                run(name, repeats[name])
    return best


def load_torch():
    """The module torch, on all cores, and the name of the device that JAX uses; UserError where it cannot be used."""
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise UserError(f"No rows of PyTorch ({error}): pip install torch orthogonium einops") from error
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"No rows of PyTorch: {torch.__version__} does not reach the {jax.default_backend()}")
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    return torch, device


def matmul(dtype, size, precision="highest"):
    """A work whose repetition is one product of two square matrices: 2·size³ FLOPs."""
    a = (jax.random.normal(domain_key(0, "probe"), (size, size), jnp.float32) / size**0.5).astype(dtype)

    @jax.jit
    def chain(a, k):
        with jax.default_matmul_precision(precision):
            return jax.lax.fori_loop(0, k, lambda _, b: b @ a, a)

    return lambda k: chain(a, k).block_until_ready()


def row_flops(function, shape):
    """FLOPs of a function of float32 rows ``(B, *shape)``, for one row."""
    return flops(function, jax.ShapeDtypeStruct((1, *shape), jnp.float32))


def head_function(name, shape, classes, dtype):
    """A head of `HEADS` with fresh parameters, as it is certified: latents → logits, both float32."""
    module = HEADS[name](classes)
    params = module.init(domain_key(0, "init"), jnp.zeros((1, *shape)))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return lambda z: module.apply(params, z.astype(dtype)).astype(jnp.float32)


def make_sampler(head, shape, tile, **fields):
    """A `Sampler` on one device, because its rate is compared with the ceiling of one device."""
    return Sampler(head, shape, sigma=0.25, tile=tile, devices=jax.local_devices()[:1], **fields)


def sampling(sampler):
    """A work whose repetition is one sample block for a full batch of images."""
    images, samples = sampler.tile
    batch = sampler.put(sampler.quantize(np.zeros((images, *sampler.latent_shape))), range(images))
    key = sampler.keys(domain_key(0, "probe"))["estimation"]
    return lambda k: sampler.collect(sampler.launch(batch, key, 0, k, k * samples), images)


def drawing(sampler):
    """A work whose repetition draws the noise of one sample block, in a loop like that of the sampler."""
    size, arithmetic = (sampler.tile[1], *sampler.latent_shape), sampler.arithmetic

    @jax.jit
    def chain(key, tables, k):
        first = jnp.zeros(size, arithmetic.dtype)
        draw = arithmetic.draw
        return jax.lax.fori_loop(0, k, lambda i, _: draw(jax.random.fold_in(key, i), size, tables), first)

    with pinned():
        key, tables = domain_key(0, "probe"), jax.device_put(arithmetic.tables, jax.local_devices()[0])

    def work(k):
        with pinned():
            chain(key, tables, k).block_until_ready()

    return work


class Layer(NamedTuple):
    """A convolution or matrix product, with the shapes that it has in a network."""

    name: str
    count: int  # how many of them the network has
    flops: float  # of one of them, for one row
    work: Callable  # a work whose repetition is one pass over a batch


def layers(function, shape, batch):
    """The `Layer`s of a function of float32 rows ``(batch, *shape)``, found in its jaxpr."""
    with jax.default_matmul_precision("highest"):
        jaxpr = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((batch, *shape), jnp.float32))
    equations = list(_products(jaxpr.jaxpr))
    names = [_name(equation) for equation in equations]
    found = []
    for name, equation in dict(zip(names, equations, strict=True)).items():
        operands = [jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype) for variable in equation.invars]
        row = flops(lambda *x, equation=equation: _apply(equation, *x), *operands) / batch
        found.append(Layer(name, names.count(name), row, _repeated(equation)))
    return found


def _products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            yield equation
        for part in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _products(part)


def _name(equation):
    x, weights = (variable.aval.shape for variable in equation.invars)
    y = equation.outvars[0].aval.shape
    if equation.primitive.name != "conv_general_dilated":
        return f"dense {'x'.join(map(str, x[1:]))} → {'x'.join(map(str, y[1:]))}"
    numbers = equation.params["dimension_numbers"]
    window = "x".join(str(weights[axis]) for axis in numbers.rhs_spec[2:])
    before, after = (
        f"{'x'.join(str(sizes[axis]) for axis in spec[2:])}x{sizes[spec[1]]}"
        for sizes, spec in ((x, numbers.lhs_spec), (y, numbers.out_spec))
    )
    return f"conv {window}, {before} → {after}"


def _apply(equation, *operands):
    return equation.primitive.bind(*operands, **equation.params)


def _repeated(equation):
    """A work of passes through one layer, whose weights are a constant of the program as in the sampling loop.

    A number is added to the input and the output is reduced to one, as in a network: XLA's CPU back end would run a
    convolution whose output is the next input on a single core.
    """
    x, weights = (variable.aval for variable in equation.invars)
    spread = 1 / math.sqrt(np.prod(weights.shape) + 1)
    weights = np.asarray(spread * jax.random.normal(domain_key(0, "probe"), weights.shape, jnp.float32), weights.dtype)

    @jax.jit
    def chain(x, k):
        def step(_, last):
            return 1e-3 * jnp.max(_apply(equation, x + last, jnp.asarray(weights)))

        return jax.lax.fori_loop(0, k, step, jnp.zeros((), x.dtype))

    x = jnp.ones(x.shape, x.dtype)
    return lambda k: chain(x, k).block_until_ready()
