"""Section throughput of `benchmarks.accelerator`: sampling loop, encoder and training beside the device's ceilings."""

import collections
import functools
import math
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measuring
from lsrs_jax import data, models
from lsrs_jax.certification.ledger import Ledger
from lsrs_jax.flags import config_from_flags
from lsrs_jax.layers.lipschitz import Float64Encoder
from lsrs_jax.runtime.rng import domain_key
from lsrs_jax.smoothing.derivation import Derivation
from lsrs_jax.smoothing.engine import Engine, Images
from lsrs_jax.smoothing.schedule import make_schedule
from lsrs_jax.smoothing.status import Status
from lsrs_jax.training import steps

IMAGE, CLASSES = (32, 32, 3), 10
HEADS = {
    "resnet on 16x16x12": ("resnet", (16, 16, 12)),
    "convnet_light on 8x8x48": ("convnet_light", (8, 8, 48)),
    "resnet18_tail on 8x8x48": ("resnet18_tail", (8, 8, 48)),
    "linear on 512": ("linear", (512,)),
}
TILE, DEFAULT = (64, 512), "configs/cifar10.py"  # the tile of heads that no configuration names
VARIANTS = ("lsrs", "isometric_resnet", "free", "isrs_resnet")  # the last two smooth the image itself
DTYPES = ("float32", "bfloat16")  # the last is the smallest


def ceilings(size, seconds):
    """FLOP/s of square matrix products by precision, and bytes/s of a copy (read and written)."""
    products = {"float32": ("float32", "highest"), "tf32": ("float32", "tensorfloat32"), "bfloat16": ("bfloat16",) * 2}
    works = {name: measuring.matmul(dtype, size, flag) for name, (dtype, flag) in products.items()}
    block = jnp.zeros((16, size, size), jnp.float32)

    @jax.jit
    def copies(block, k):
        return jax.lax.fori_loop(0, k, lambda i, x: x + 1.0, block)

    works["copy"] = lambda k: copies(block, k).block_until_ready()
    rates = measuring.rates(works, seconds, "ceilings")
    return {name: rates[name] * 2 * size**3 for name in products} | {"copy": rates["copy"] * 2 * block.nbytes}


def heads():
    """Name → ``(function of a dtype, latent shape, tile)`` of every head that is measured."""
    found = {}
    for variant in VARIANTS:
        config, model = _default(variant)
        params = jax.eval_shape(model.init, domain_key(0, "init"))
        shape = jax.eval_shape(model.encode, params, jax.ShapeDtypeStruct((1, *IMAGE), jnp.float32)).shape[1:]
        name = f"{DEFAULT}:{variant} on {'x'.join(map(str, shape))}"
        found[name] = functools.partial(_certified, variant), shape, config.certify.tile
    return found | {
        name: (functools.partial(measuring.head_function, head, shape, CLASSES), shape, TILE)
        for name, (head, shape) in HEADS.items()
    }


def _certified(variant, dtype):
    return _default(variant)[1].for_certification(_params(variant), dtype)[1]


@functools.cache
def _default(variant):
    config = config_from_flags([f"--config={DEFAULT}:{variant}"])
    return config, models.build(config.model, IMAGE, CLASSES)


@functools.cache
def _params(variant):
    return _default(variant)[1].init(domain_key(0, "init"))


def sampling(name, dtype, tile, size, seconds):
    """Samples/s of a head in the loop, and FLOP/s of square matrix products of this size, in turns."""
    function, shape, own = heads()[name]
    loop = measuring.make_sampler(function(dtype), shape, tile or own)
    works = {"samples": measuring.sampling(loop), "product": measuring.matmul(dtype, size)}
    rates = measuring.rates(works, seconds, f"{name}, {dtype}")
    return {
        "flops": measuring.row_flops(function("float32"), shape),
        "votes": rates["samples"] * math.prod(loop.tile),
        "tile": loop.tile,
        "ceiling": rates["product"] * 2 * size**3,
    }


def noise(dtype, tile, seconds):
    """Speed of the default head's loop: share of the noise, independent over shared noise, exact over float32."""
    name, (function, shape, own) = next(iter(heads().items()))
    head, tile = function(dtype), tile or own
    loop = measuring.make_sampler(head, shape, tile)
    works = {"shared": measuring.sampling(loop), "drawn": measuring.drawing(loop)}
    for kind, fields in (("independent", {"noise": "independent"}), ("float32", {"arithmetic": "float32"})):
        works[kind] = measuring.sampling(measuring.make_sampler(head, shape, tile, **fields))
    rates = measuring.rates(works, seconds, f"noise of {name}, {dtype}")
    return {
        "noise_share": rates["shared"] / rates["drawn"],
        "independent_over_shared": rates["independent"] / rates["shared"],
        "exact_over_float32": rates["shared"] / rates["float32"],
    }


def layers(dtype, rows, seconds):
    """Every layer of the default head alone: FLOPs for a row, and FLOP/s in batches of `rows`."""
    name, (function, shape, _) = next(iter(heads().items()))
    found = measuring.layers(function(dtype), shape, rows)
    rates = measuring.rates({layer.name: layer.work for layer in found}, seconds, f"layers of {name}, {dtype}")
    return [
        {"layer": one.name, "count": one.count, "flops": one.flops, "rate": rates[one.name] * rows * one.flops}
        for one in found
    ]


def encoder(batch, seconds):
    """Images/s of the default encoder in float64, as it is certified, and in float32; and its FLOPs."""
    model = _default("lsrs")[1]
    frozen, _ = model.for_certification(_params("lsrs"))
    images = np.random.default_rng(0).random((batch, *IMAGE))
    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), frozen.params)
    plain, single = jax.jit(frozen.apply), jnp.asarray(images, jnp.float32)
    double = Float64Encoder(frozen, batch)

    def repeated(call):
        def work(k):
            for _ in range(k):
                out = call()
            jax.block_until_ready(out)

        return work

    works = {"float64": repeated(lambda: double(images)), "float32": repeated(lambda: plain(weights, single))}
    rates = measuring.rates(works, seconds, "encoder")
    return {"flops": models.cost(model).encoder} | {name: rate * batch for name, rate in rates.items()}


class _Drawn:
    """A sampler of the engine that draws on the host: multinomial, with different probabilities for each image."""

    tile, until_packed = (64, 512), (math.inf, 0.0)

    def __init__(self, images):
        self._rng = np.random.default_rng(0)
        top = self._rng.beta(2, 0.5, (images, 1))
        self._p = np.concatenate([top, np.repeat((1 - top) / (CLASSES - 1), CLASSES - 1, axis=1)], axis=1)

    def keys(self, key):
        return collections.defaultdict(lambda: key)

    def put(self, quantized, ids):
        return ids

    def launch(self, ids, key, first, stop, n):
        samples = self.tile[1]
        return self._rng.multinomial(min(stop * samples, n) - first * samples, self._p[ids])

    def collect(self, counts, images):
        return counts

    def together(self, counts):
        return 1

    def width(self, images):
        return 1


def bookkeeping(images):
    """Seconds that the host takes for a staged certification: it writes counts to a ledger and decides at the looks."""
    schedule = make_schedule("staged", 100, 100_000, _Drawn.tile[1])
    decided = functools.partial(Derivation(0.25, 0.001).decided, schedule)
    some = Images(range(images), [0] * images, [0.0] * images, np.zeros((images, 1)))
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "votes.0.tsv", schedule, CLASSES) as ledger:
        start = time.perf_counter()
        Engine(_Drawn(images), None, ledger, decided, Status(schedule, images, measuring.say)).run(some)
        seconds = time.perf_counter() - start
        looks = sum(len(image.looks) for image in ledger.images.values())
        return {"images": images, "looks": looks, "seconds": seconds}


def _seconds_of_a_batch(count):
    """Seconds in which `data.training_batches` makes one batch on the host."""
    config, size = _default("lsrs")[0], 50_000
    rng = np.random.default_rng(0)
    images, labels = rng.integers(256, size=(size, *IMAGE), dtype=np.uint8), rng.integers(CLASSES, size=size)
    dataset = data.Arrays("probe", "1", "train", images, labels, tuple(map(str, range(CLASSES))))
    batches = data.training_batches(dataset, config.data, 0, 0, count + 1)
    next(batches)  # permutes
    start = time.perf_counter()
    collections.deque(batches, maxlen=0)
    return (time.perf_counter() - start) / count


def _training(variant, flags):
    """A compiled function of k that takes k training steps of a variant and waits."""
    config = config_from_flags([f"--config={DEFAULT}:{variant}", *flags])
    model = models.build(config.model, IMAGE, CLASSES)
    transformation = steps.make_optimizer(config.train)
    params = model.init(domain_key(0, "init"))
    state = steps.State(params, transformation.init(params), jax.tree.map(jnp.copy, params))
    step = steps.step_function(steps.make_step(model, config, transformation.update))
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.random((config.data.batch_size, *IMAGE)), jnp.float32)
    labels = jnp.asarray(rng.integers(CLASSES, size=len(images)), jnp.int32)

    def run(count):
        nonlocal state
        for index in range(count):
            state, metrics = step(state, images, labels, domain_key(0, "probe"), np.uint32(index))
        jax.block_until_ready(metrics)

    measuring.say(f"training step of {variant}")
    run(1)
    return run


def train_steps(variants, count):
    """Seconds of a training step of some variants of the default configuration, and of a batch on the host.

    The host makes the next batches while the device works, so the slower of the two decides the speed of a training.
    """
    found = {"a batch on the host": _seconds_of_a_batch(count)}
    for variant, flags in variants.items():
        run = _training(variant, flags)
        start = time.perf_counter()
        run(count)
        found[variant] = (time.perf_counter() - start) / count
    return found
