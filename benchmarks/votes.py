"""Speed of the vote loop as a share of this machine's matmul ceiling, and of latent over input smoothing.

  python benchmarks/votes.py [--seconds=3] [--tile=16,16]

Everything is measured side by side in one run, on the default backend: the matmul ceiling (float32, 2048³), votes per
second of CIFAR-10-shaped models, and the FLOPs XLA counts for their heads. On a GPU give a larger tile, such as 64,64.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax import models
from lsrs_jax.config import default
from lsrs_jax.keys import domain_key
from lsrs_jax.smoothing.votes import Votes

MODELS = {
    "linear head, latent": {"encoder": "shallow", "head": "linear"},
    "convnet, latent (LSRS)": {"encoder": "shallow", "head": "convnet"},
    "convnet, image (ISRS)": {"encoder": "identity", "head": "convnet"},
    "LSRS network, noise on the image": {"encoder": "shallow", "head": "convnet", "noise": "input"},
}


def rate(work, seconds):
    """Calls of `work(k)` (k repetitions) per second, after a warm-up, the best of three."""
    work(1)
    repeat, spent = 1, 0.0
    while spent < seconds / 6:
        start = time.perf_counter()
        work(repeat)
        spent = time.perf_counter() - start
        repeat = max(repeat + 1, int(repeat * min(8, seconds / 3 / max(spent, 1e-6))))
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        work(repeat)
        best = max(best, repeat / (time.perf_counter() - start))
    return best


def matmul_ceiling(seconds, size=2048):
    """FLOP/s of a chain of float32 matrix products at the highest precision."""
    a = jax.random.normal(domain_key(0, "probe"), (size, size), jnp.float32) / size**0.5

    @jax.jit
    def chain(a, k):
        with jax.default_matmul_precision("highest"):
            return jax.lax.fori_loop(0, k, lambda _, b: b @ a, a)

    return 2 * size**3 * rate(lambda k: chain(a, k).block_until_ready(), seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement")
    parser.add_argument("--tile", default="16,16", help="images,samples")
    options = parser.parse_args()
    tile = tuple(int(part) for part in options.tile.split(","))
    ceiling = matmul_ceiling(options.seconds)
    print(f"jax {jax.__version__}, {jax.local_device_count()} x {jax.local_devices()[0].device_kind}, tile {tile}")
    print(f"matmul ceiling (float32, highest): {ceiling / 1e9:.0f} GFLOP/s")
    print("| model | votes/s | MFLOP/vote | share of ceiling | over noise on the image |\n|---|---|---|---|---|")
    rows = {}
    for name, fields in MODELS.items():
        config = default().model
        config.update(fields)
        model = models.build(config, (32, 32, 3), 10)
        encoder, head = model.for_certification(model.init(domain_key(0, "init")))
        shape = encoder.report.output_shape
        loop = Votes(head, shape, sigma=0.25, key=domain_key(0, "certify"), tile=tile)
        latents = loop.put(np.zeros((tile[0], *shape)))

        def work(k, loop=loop, latents=latents):
            loop.collect(loop.launch(latents, "estimation", 0, k, k * tile[1]), tile[0])

        batch = jax.ShapeDtypeStruct((tile[0] * tile[1], *shape), jnp.float32)
        flops = jax.jit(head).lower(batch).compile().cost_analysis()["flops"] / (tile[0] * tile[1])
        rows[name] = (tile[0] * tile[1] * rate(work, options.seconds), flops)
    base = rows["LSRS network, noise on the image"][0]
    for name, (votes, flops) in rows.items():
        print(f"| {name} | {votes:,.0f} | {flops / 1e6:.2f} | {votes * flops / ceiling:.0%} | {votes / base:.2f}x |")


if __name__ == "__main__":
    main()
