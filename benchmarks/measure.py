"""What benchmarks/certify.py and its neighbours share: turns, tables, counted FLOPs, a network's layers one by one."""

import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax.models.heads import HEADS
from lsrs_jax.runtime.rng import domain_key, pinned
from lsrs_jax.smoothing.sampler import Sampler

ROUNDS, START = 3, time.perf_counter()
SIZE = 2048  # of the matrices whose product is the ceiling
PRODUCTS = ("conv_general_dilated", "dot_general")


def say(text):
    """A line of progress, apart from the report."""
    print(f"{time.perf_counter() - START:6.0f} s  {text}", file=sys.stderr, flush=True)


def table(columns, rows):
    """Prints a Markdown table; `columns` are separated by bars."""
    names = columns.split("|")
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def rates(works, seconds, label):
    """Best repetitions per second of every work, a function of k that makes k repetitions and waits for them.

    All works take turns in each of three rounds, about `seconds` for each work. One that is too slow for that gets
    fewer rounds, at least the one that found it out.
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


def flops(function, shape, batch=256):
    """FLOPs of a row of `function` by the count of XLA, before it optimises: the same on every backend."""
    return _counted(function, jax.ShapeDtypeStruct((batch, *shape), jnp.float32)) / batch


def _counted(function, *operands):
    # On the CPU: other back ends do not count before they compile.
    with _highest(), jax.default_device(jax.local_devices(backend="cpu")[0]):
        return jax.jit(function).lower(*operands).cost_analysis()["flops"]


def _highest():
    return jax.default_matmul_precision("highest")


def matmul(dtype, size=SIZE, precision="highest"):
    """A work whose repetition is a product of two square matrices, 2·size³ FLOPs."""
    a = (jax.random.normal(domain_key(0, "probe"), (size, size), jnp.float32) / size**0.5).astype(dtype)

    @jax.jit
    def chain(a, k):
        with jax.default_matmul_precision(precision):
            return jax.lax.fori_loop(0, k, lambda _, b: b @ a, a)

    return lambda k: chain(a, k).block_until_ready()


class Layer(NamedTuple):
    """A convolution or matrix product with the shapes it has in a network."""

    name: str
    count: int  # how many of them the network has
    flops: float  # of one of them for one row
    works: dict[int, Callable]  # batch -> a work whose repetition is one pass over a batch


def layers(function, shape, batches):
    """The `Layer`s of a function of float32 rows ``(batch, *shape)``, found in its jaxpr."""
    found = {}
    for batch in batches:
        with _highest():
            jaxpr = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((batch, *shape), jnp.float32))
        equations = list(_products(jaxpr.jaxpr))
        names = [_name(equation) for equation in equations]
        for name, equation in dict(zip(names, equations, strict=True)).items():
            layer = found.setdefault(name, Layer(name, names.count(name), _flops(equation) / batch, {}))
            layer.works[batch] = _repeated(equation)
    return list(found.values())


def layer_works(found):
    """(name, batch) → work, for `rates`."""
    return {(layer.name, batch): work for layer in found for batch, work in layer.works.items()}


def _products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _products(inner)


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


def _flops(equation):
    operands = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
    return _counted(lambda *x: _apply(equation, *x), *operands)


def _repeated(equation):
    """A work of passes through one layer, its weights a constant of the program as in the sampling loop.

    Something is added to the input and the output is reduced, as a network does. XLA's CPU back end runs a convolution
    straight from one pass of a loop to the next on a single core.
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


class Measured(NamedTuple):
    """A head in the sampling loop, and what it is held against. Rates of `rates`."""

    flops: float  # per sample
    layers: list[Layer]
    rates: dict[Any, float]
    block: int  # samples per repetition of the loop

    @property
    def samples(self):
        """Samples per second."""
        return self.block * self.rates["samples"]

    @property
    def noise(self):
        """Seconds of noise per sample, drawn alone."""
        return 1 / (self.block * self.rates["noise"])

    @property
    def ceiling(self):
        """FLOP/s of matrix products."""
        return 2 * SIZE**3 * self.rates["matmul"]

    @property
    def share(self):
        """FLOP/s of the loop over those of matrix products."""
        return self.samples * self.flops / self.ceiling

    @property
    def layer_time(self):
        """Seconds of a sample if every layer ran at its best rate and nothing else were to do."""
        return sum(layer.count * layer.flops / self.best(layer) for layer in self.layers)

    def layer_rates(self, layer):
        """Batch → FLOP/s of a layer alone."""
        return {batch: self.rates[layer.name, batch] * batch * layer.flops for batch in layer.works}

    def best(self, layer):
        """The highest of `layer_rates`."""
        return max(self.layer_rates(layer).values())


def head_function(name, shape, classes, dtype):
    """A head of `HEADS` with fresh parameters, as the certification runs it: latents → logits, both float32."""
    module = HEADS[name](classes)
    params = module.init(domain_key(0, "init"), jnp.zeros((1, *shape)))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return lambda z: module.apply(params, z.astype(dtype)).astype(jnp.float32)


def make_sampler(head, shape, tile, **fields):
    """`Sampler` on one device: a rate per device is what a ceiling of one device can be held against."""
    return Sampler(head, shape, sigma=0.25, tile=tile, devices=jax.local_devices()[:1], **fields)


def sampling(loop):
    """A work whose repetition is a sample block on a full tile."""
    images, samples = loop.tile
    on_device = loop.put(loop.quantize(np.zeros((images, *loop.latent_shape))), range(images))
    key = loop.keys(domain_key(0, "probe"))["estimation"]

    def work(k):
        loop.collect(loop.launch(on_device, key, 0, k, k * samples), images)

    return work


def drawing(loop):
    """A work whose repetition draws the noise of a block and does nothing with it, in a loop like the sampler's."""
    size, arithmetic = (loop.tile[1], *loop.latent_shape), loop.arithmetic

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
