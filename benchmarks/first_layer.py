"""Speed of the sampling loop with the free first layer, beside the same head with its first layer in float32.

  python -m benchmarks.first_layer [--tile=64,8 --seconds=20 --heads=mlp512x192,convnet]

The loops of a head take turns, so that other jobs of the machine affect all alike. A profile follows: the time of one
sample block of the free loop, by what the loop computes up to there. Case `free` is input smoothing, for comparison.
"""

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measuring
from lsrs_jax import cli
from lsrs_jax.models.first_layer import first_layer_flops, split_head
from lsrs_jax.models.heads import HEADS, BlocksHead, MLPHead
from lsrs_jax.runtime.rng import domain_key, pinned
from lsrs_jax.smoothing.first_layer import put
from studies.accelerator import table

CLASSES = 10
CASES = {  # head and shape of the latent
    "mlp512x192": (MLPHead(CLASSES, (512,)), (8, 8, 3)),
    "mlp512x768": (MLPHead(CLASSES, (512,)), (16, 16, 3)),
    "mlp512x3072": (MLPHead(CLASSES, (512,)), (32, 32, 3)),
    "convnet_light": (HEADS["convnet_light"](CLASSES), (16, 16, 12)),
    "convnet": (HEADS["convnet"](CLASSES), (16, 16, 12)),
    # The free network of configs/cifar10_small.py, smoothed in input space.
    "free": (BlocksHead(CLASSES, (12, 12, 24, 24, 24, 24, 48), (2, 1, 2, 1, 1, 2, 1)), (32, 32, 3)),
}


def parts(sampler, head):
    """Works that repeat one sample block of the free loop up to some place in it, by the name of that place."""
    blocks, latents = sampler.blocks, np.zeros((sampler.tile[0], *sampler.latent_shape), np.int32)

    def noise(key, tables, prepared):
        return blocks.noise(key, None, 0, tables)

    def product(key, tables, prepared):
        return blocks.integer.product(noise(key, tables, prepared).reshape(-1, *sampler.latent_shape), tables[1])

    def rows(key, tables, prepared):
        return blocks.rows(prepared, noise(key, tables, prepared), tables)

    def logits(key, tables, prepared):
        return head.rest(rows(key, tables, prepared))

    def repeated(function):
        @jax.jit
        def chain(key, tables, k):
            prepared = blocks.prepared(latents, tables)

            def step(i, total):
                found = function(jax.random.fold_in(key, i), tables, prepared)
                found = jax.lax.optimization_barrier(found)  # all of it is computed
                return total + found[(0,) * found.ndim].astype(jnp.float32)

            return jax.lax.fori_loop(0, k, step, jnp.float32(0))

        with pinned():
            tables = put(blocks.tables, jax.local_devices()[0])

        def work(k):
            with pinned(), jax.default_matmul_precision("highest"):
                chain(domain_key(0, "probe"), tables, k).block_until_ready()

        return work

    places = {"noise": noise, "W·noise": product, "sums to float32": rows, "rest of the head": logits}
    return {name: repeated(function) for name, function in places.items()}


def measure(name, tile, seconds):
    """Rows of the two tables for one case: speeds and FLOPs, and the profile."""
    module, shape = CASES[name]
    params = module.init(domain_key(0, "init"), jnp.zeros((1, *shape)))["params"]
    whole = measuring.row_flops(lambda z: module.apply({"params": params}, z), shape)
    head = split_head(module, params, shape, lambda z: module.apply({"params": params}, z), "float32", None)
    loops = {free: measuring.make_sampler(head, shape, tile, integer_first_layer=free) for free in (True, False)}
    if loops[True].first_layer is None:  # the head does not begin with a linear layer
        rate = measuring.rates({"loop": measuring.sampling(loops[False])}, seconds, name)["loop"]
        return [name, f"{whole / 1e6:.3f}", *"--", f"{rate * math.prod(tile):,.0f}", *"--"], [name, *"-----"]
    effective = whole - first_layer_flops(module, params, shape) * (1 - 1 / tile[0])
    works = {free: measuring.sampling(loop) for free, loop in loops.items()}
    rates = measuring.rates(works | parts(loops[True], head), seconds, name)
    free, plain = (rates[key] * math.prod(tile) for key in (True, False))
    profile = [name, *(f"{1e6 / rates[part]:,.0f}" for part in (*list(rates)[2:], True))]
    speeds = [name, f"{whole / 1e6:.3f}", f"{effective / 1e6:.3f}", f"{whole / effective:.1f}x"]
    return [*speeds, f"{plain:,.0f}", f"{free:,.0f}", f"{free / plain:.2f}x"], profile


def main(arguments):
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tile", default="64,8", help="images,samples of a batch")
    parser.add_argument("--seconds", type=float, default=5, help="for each loop")
    parser.add_argument("--heads", default=",".join(CASES), help="some of these cases")
    options = parser.parse_args(arguments)
    tile = tuple(map(int, options.tile.split(",")))
    speeds, profiles = zip(*(measure(name, tile, options.seconds) for name in options.heads.split(",")), strict=True)
    columns = "head|MFLOP per sample|effective|fewer|samples/s in float32|samples/s|speed-up"
    print(table(columns, speeds))
    print("\nMicroseconds per sample block, up to and with this part of the loop:\n")
    print(table("head|noise|W·noise|sums to float32|rest of the head|whole loop", profiles))


if __name__ == "__main__":
    cli.execute(main)
