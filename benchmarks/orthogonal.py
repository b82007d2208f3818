"""Time of orthogonal convolutions over a zero-padded plain convolution: train step and materialised inference.

  python benchmarks/orthogonal.py [--channels=32 --size=32 --batch=64]

Side by side in one run on the default backend; each figure is the median of several repetitions.
"""

import argparse
import statistics
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax.keys import domain_key
from lsrs_jax.layers import OrthogonalConv


def median_time(work, repeats):
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    shape = (options.size, options.size, options.channels)
    x = jax.random.normal(domain_key(0, "probe"), (options.batch, *shape), jnp.float32)
    layers = {
        "plain, zero padding": nn.Conv(options.channels, (3, 3), use_bias=False),
        "paraunitary": OrthogonalConv(options.channels, (3, 3), method="paraunitary"),
        "cayley": OrthogonalConv(options.channels, (3, 3), method="cayley"),
    }
    print(f"jax {jax.__version__}, {jax.local_devices()[0].device_kind}, 3x3, {shape}, batch {options.batch}")
    print("| layer | train step, ms | over plain | inference, ms | over plain |\n|---|---|---|---|---|")
    base = None
    for name, layer in layers.items():
        variables = layer.init(domain_key(0, "init"), x[:1])
        step = jax.jit(jax.grad(lambda v, x, layer=layer: jnp.sum(layer.apply(v, x) ** 2), argnums=(0, 1)))
        if isinstance(layer, OrthogonalConv):
            plain = layer.materialize(variables["params"], shape)
            values = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float32), plain.params)
            forward = jax.jit(plain.apply)
        else:
            values, forward = variables, jax.jit(layer.apply)
        train = median_time(lambda step=step, variables=variables: step(variables, x), options.repeats)
        infer = median_time(lambda forward=forward, values=values: forward(values, x), options.repeats)
        base = base or (train, infer)
        print(
            f"| {name} | {1e3 * train:.1f} | {train / base[0]:.2f}x | {1e3 * infer:.1f} | {infer / base[1]:.2f}x |",
            flush=True,
        )


if __name__ == "__main__":
    main()
