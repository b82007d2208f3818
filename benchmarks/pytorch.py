"""Compares the sampling loop with PyTorch's own loop, on the same network of PyTorch and its import.

  python -m benchmarks.pytorch [--networks=cifar_resnet20,cifar_resnet110 --batches=128,1000 --seconds=20]
  python -m benchmarks.pytorch --convolutions

PyTorch's loop takes one image at a time: a batch of copies, ``randn_like``, argmax, bincount (Cohen et al. 2019,
locuslab/smoothing), in `inference_mode`, channels last, with and without `torch.compile`, and with four batch sizes, of
which the best counts. Ours is `lsrs_jax.smoothing.Sampler` on the network that `lsrs_jax.pytorch.from_torch` returns,
with batches of the same numbers of rows, and on NHWC images too. All loops take turns. PyTorch needs idle cores: its
threads wait for each other, and one busy core slows it many times. --convolutions measures single convolutions of a
ResNet-20, and a matrix product of both libraries, which says what their convolutions can reach.
"""

import argparse
import functools
import math

import jax
import jax.numpy as jnp

from benchmarks import measuring
from benchmarks.classic_loop import compiled, sampling
from lsrs_jax import cli
from lsrs_jax.pytorch import from_torch
from studies.accelerator import table

CLASSES, OTHERS = 10, (64, 256)  # batch sizes of PyTorch besides those that are compared
SIZES = {"resnet50": 64}  # of the images; else 32


def network(torch, name):
    """A network of the field with random parameters and with the batch statistics of noisy images."""
    from lsrs_jax.pytorch.architectures import ARCHITECTURES

    made, size = ARCHITECTURES[name](CLASSES), SIZES.get(name, 32)
    with torch.no_grad():
        for _ in range(3):
            made.train()(torch.rand(16, 3, size, size) + 0.25 * torch.randn(16, 3, size, size))
    return made.eval(), size


def measure(name, batches, seconds):
    """Samples/s by name of the loop, all in turns."""
    torch, device = measuring.load_torch()
    net, size = network(torch, name)
    loops = {}
    for layout in ("NCHW", "NHWC"):
        imported = from_torch(net, torch.rand(2, 3, size, size), layout=layout)
        for batch in batches:
            sampler = measuring.make_sampler(imported, imported.input_shape, (1, batch))
            loops[f"lsrs_jax, {layout}, batch {batch}"] = measuring.sampling(sampler), math.prod(sampler.tile)
    net = net.to(device, memory_format=torch.channels_last)
    modules = {"": net, ", torch.compile": compiled(torch, net, (size, size, 3))}
    for kind, module in modules.items():
        for batch in sorted({*batches, *OTHERS}) if module is not None else ():
            work = sampling(torch, device, module, (size, size, 3), CLASSES, batch, channels_last=True)
            loops[f"PyTorch {torch.__version__}{kind}, batch {batch}"] = work, batch
    rates = measuring.rates({loop: work for loop, (work, _) in loops.items()}, seconds, name)
    return {loop: rates[loop] * rows for loop, (_, rows) in loops.items()}


def convolutions(seconds, batch=128):
    """GFLOP/s of 3x3 convolutions NHWC and of a product of 1024x1024 matrices, of XLA and of PyTorch, in turns."""
    torch, _ = measuring.load_torch()
    works, cost = {}, {}
    for size, channels, width in ((32, 3, 16), (32, 16, 16), (16, 32, 32), (8, 64, 64)):
        name = f"conv 3x3, {size}x{size}x{channels} → {size}x{size}x{width}"
        cost[name] = 2 * 9 * channels * width * size**2 * batch
        works[name, "XLA"] = _convolution(batch, size, channels, width)
        conv = torch.nn.Conv2d(channels, width, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
        x = torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last)
        works[name, "PyTorch"] = _repeated(torch, functools.partial(conv, x))
    name, square = "product of 1024x1024 matrices", torch.randn(1024, 1024)
    cost[name], works[name, "XLA"] = 2 * 1024**3, measuring.matmul(jnp.float32, 1024)
    works[name, "PyTorch"] = _repeated(torch, lambda: square @ square)
    found = measuring.rates(works, seconds, "convolutions")
    speeds = {key: rate * cost[key[0]] / 1e9 for key, rate in found.items()}
    rows = []
    for name in cost:
        xla, other = speeds[name, "XLA"], speeds[name, "PyTorch"]
        rows.append([name, f"{xla:.0f}", f"{other:.0f}", f"{xla / other:.2f}x"])
    print(table("layer, batch 128|XLA, GFLOP/s|PyTorch, GFLOP/s|XLA over PyTorch", rows))


def _convolution(batch, size, channels, width):
    kernel = jnp.full((3, 3, channels, width), 0.01, jnp.float32)
    x, names = jnp.full((batch, size, size, channels), 0.5, jnp.float32), ("NHWC", "HWIO", "NHWC")
    apply = jax.jit(lambda x: jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=names))
    return lambda k: [apply(x).block_until_ready() for _ in range(k)]


def _repeated(torch, call):
    def work(k):
        with torch.inference_mode():
            for _ in range(k):
                call()

    return work


def main(arguments):
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--networks", default="cifar_resnet20,cifar_resnet110", help="also resnet50, on 64x64")
    parser.add_argument("--batches", default="128,1000", help="rows of a batch")
    parser.add_argument("--seconds", type=float, default=20.0, help="per loop")
    parser.add_argument("--convolutions", action="store_true", help="measure single convolutions instead")
    options = parser.parse_args(arguments)
    if options.convolutions:
        convolutions(options.seconds / 10)
        return
    batches = [int(batch) for batch in options.batches.split(",")]
    for name in options.networks.split(","):
        rates = measure(name, batches, options.seconds)
        theirs = max((loop for loop in rates if loop.startswith("PyTorch")), key=rates.__getitem__)
        rows = [[loop, f"{rate:,.1f}", f"{rate / rates[theirs]:.2f}x"] for loop, rate in rates.items()]
        print(f"{name}\n\n" + table(f"loop|samples/s|over {theirs}", rows) + "\n")


if __name__ == "__main__":
    cli.execute(main)
