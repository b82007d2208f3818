"""Speed of an Equinox CNN (NCHW) in the sampling loop on a CPU, beside its Linen twin (NHWC) with the same weights.

  python -m benchmarks.layouts [--widths=32,64,64 --tile=32,8 --rounds=9]

The Equinox network runs twice: its own program (`channels_last=False`), and replayed with NHWC convolutions. All loops
take turns in every round; rates are medians, ratios are medians of the ratios within a round, so that other jobs of the
machine affect all alike. The images are 32x32x3; the second convolution and each after it has stride 2.
"""

import argparse
import math
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measuring
from lsrs_jax import cli
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.rng import domain_key
from studies.accelerator import table

IMAGE, CLASSES = (32, 32, 3), 10
TODAY, REPLAYED, TWIN = "Equinox, channels_last=False", "Equinox, channels_last=True", "Linen, NHWC"


class Twin(nn.Module):
    """Convolutions with ReLU, a mean over space and a dense layer, on images NHWC."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for index, width in enumerate(self.widths):
            x = nn.relu(nn.Conv(width, (3, 3), (2, 2) if index else (1, 1), padding=1, name=f"conv{index}")(x))
        return nn.Dense(CLASSES, name="dense")(x.mean(axis=(1, 2)))


def equinox_network(widths, params):
    """The function of images (B, C, H, W) of an Equinox module with the parameters of `Twin`."""
    try:
        import equinox as eqx
    except ImportError as error:
        raise UserError(f"this benchmark needs equinox ({error}): pip install equinox") from error
    key, chain, channels = domain_key(0, "init"), [], IMAGE[2]
    for index, width in enumerate(widths):
        conv = eqx.nn.Conv2d(channels, width, 3, 2 if index else 1, padding=1, key=key)
        kernel, bias = (params[f"conv{index}"][name] for name in ("kernel", "bias"))
        new = (jnp.transpose(kernel, (3, 2, 0, 1)), bias.reshape(-1, 1, 1))
        chain += [eqx.tree_at(lambda layer: (layer.weight, layer.bias), conv, new), eqx.nn.Lambda(jax.nn.relu)]
        channels = width
    dense = eqx.nn.Linear(channels, CLASSES, key=key)
    new = (params["dense"]["kernel"].T, params["dense"]["bias"])
    dense = eqx.tree_at(lambda layer: (layer.weight, layer.bias), dense, new)
    return jax.vmap(eqx.nn.Sequential([*chain, eqx.nn.Lambda(lambda x: x.mean(axis=(1, 2))), dense]))


def measure(widths, tile, rounds):
    """Samples/s by name of the loop in each round, the loops, and the difference of the two networks' logits.

    The difference is relative to the largest logit.
    """
    twin, images = Twin(widths), np.random.default_rng(0).standard_normal((math.prod(tile), *IMAGE), np.float32)
    variables = twin.init(domain_key(0, "init"), images[:1])
    network = equinox_network(widths, variables["params"])
    channels_first = (IMAGE[2], *IMAGE[:2])
    loops = {
        TODAY: measuring.make_sampler(network, channels_first, tile, channels_last=False),
        REPLAYED: measuring.make_sampler(network, channels_first, tile),
        TWIN: measuring.make_sampler(lambda z: twin.apply(variables, z), IMAGE, tile),
    }
    works, rates = {name: measuring.sampling(loop) for name, loop in loops.items()}, {name: [] for name in loops}
    for index in range(rounds + 1):  # the first one warms up
        measuring.say(f"round {index} of {rounds}")
        for name, work in works.items():
            blocks, start = 1 if name == TODAY else 8, time.perf_counter()
            work(blocks)
            rates[name].append(blocks * math.prod(tile) / (time.perf_counter() - start))
    one, other = twin.apply(variables, images), network(images.transpose(0, 3, 1, 2))
    difference = float(jnp.max(jnp.abs(one - other)) / jnp.max(jnp.abs(one)))
    return {name: np.array(each[1:]) for name, each in rates.items()}, loops, difference


def main(arguments):
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--widths", default="32,64,64", help="channels of the convolutions")
    parser.add_argument("--tile", default="32,8", help="images,samples of a batch")
    parser.add_argument("--rounds", type=int, default=9, help="in which the loops take turns")
    options = parser.parse_args(arguments)
    widths, tile = (tuple(map(int, text.split(","))) for text in (options.widths, options.tile))
    rates, loops, difference = measure(widths, tile, options.rounds)
    rows = []
    for name, each in rates.items():
        over = [np.median(each / rates[other]) for other in (TODAY, TWIN)]
        rows.append([name, loops[name].program, f"{np.median(each):,.0f}", f"{over[0]:.1f}x", f"{over[1]:.2f}x"])
    print(table("head|program|samples/s|over channels_last=False|over the Linen twin", rows))
    print(f"\nThe two networks' logits differ by {difference:.1e} of the largest logit.")


if __name__ == "__main__":
    cli.execute(main)
