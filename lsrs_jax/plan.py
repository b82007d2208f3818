"""What a training and its certification will need, before either is started: memory, FLOPs, time on named chips."""

import dataclasses
import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax import distributed, models
from lsrs_jax.flops import flops, held, traffic
from lsrs_jax.keys import domain_key, pinned
from lsrs_jax.training import loop

# Of a chip's peak: what the votes of configs/cifar10.py took of an H200's (docs/results/accelerator.md).
USED = 0.3
FREE = 0.9  # of a chip's memory: the rest is the runtime's and fragments


class Chip(NamedTuple):
    """From the vendors' data sheets: dense peaks, without sparsity."""

    memory: float  # GiB
    bandwidth: float  # TB/s
    bfloat16: float  # TFLOP/s of matrix products; training's float32 as well on a TPU, by default
    float32: float  # TFLOP/s in true float32: of votes. A TPU takes six products in bfloat16
    training: float  # TFLOP/s of float32 at JAX's default precision: TF32 or bfloat16


CHIPS = {
    "A100 (80 GB)": Chip(80, 2.0, 312, 19.5, 156),
    "H100": Chip(80, 3.35, 989, 67, 495),
    "H200": Chip(141, 4.8, 989, 67, 495),
    "TPU v4": Chip(32, 1.2, 275, 275 / 6, 275),
    "TPU v5e": Chip(16, 0.82, 197, 197 / 6, 197),
    "TPU v5p": Chip(95, 2.77, 459, 459 / 6, 459),
    "TPU v6e": Chip(32, 1.64, 918, 918 / 6, 918),
}


@dataclasses.dataclass(frozen=True)
class Need:
    """Of one compiled program, per device.

    Attributes:
      memory: bytes of arguments, results and temporaries.
      flops: of convolutions and matrix products.
      moved: bytes that these read and write.
    """

    memory: int
    flops: float
    moved: float

    def fits(self, chip):
        """Whether a chip's memory is enough."""
        return self.memory <= FREE * chip.memory * 2**30

    def seconds(self, chip, dtype, times=1):
        """Of so many calls, by arithmetic and memory traffic; launches and the host come on top."""
        peak = {"float32": chip.float32, "bfloat16": chip.bfloat16, "training": chip.training}[dtype]
        return times * max(self.flops / (USED * peak * 1e12), self.moved / (chip.bandwidth * 1e12))


def training(model, config):
    """The `Need` of an optimizer step of `config` on all devices of this run, memory as XLA lays it out for them."""
    mesh = distributed.global_mesh()
    rows, whole = distributed.split(mesh), distributed.replicated(mesh)
    with pinned():
        fresh, shardings, train_step = loop.parts(model, config, mesh)
        key = domain_key(config.seed, "train")
        shapes = jax.eval_shape(fresh, domain_key(config.seed, "init"))

        def placed(leaf, sharding):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        def arguments(size):
            return (
                jax.tree.map(placed, shapes, shardings),
                jax.ShapeDtypeStruct((size, *model.input_shape), jnp.float32, sharding=rows),
                jax.ShapeDtypeStruct((size,), jnp.int32, sharding=rows),
                jax.device_put(key, whole),
                np.uint32(0),
            )

        size = config.data.batch_size
        found = train_step.lower(*arguments(size)).compile().memory_analysis()
        memory = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
        counts = []
        for count in (flops, traffic):
            one, two = (count(train_step, *arguments(times * size)) for times in (1, 2))
            # What does not grow with the batch, the building of kernels, every device does.
            counts.append(2 * one - two + (two - one) / mesh.size)
        return Need(memory - found.alias_size_in_bytes, *counts)


def votes(model, config):
    """The `Need` of one tile of votes on one device.

    Counted as written: what XLA says of a program without gradients leaves out what it merges on a CPU.
    """
    images, samples = config.certify.tile
    model = dataclasses.replace(model, head_dtype=config.certify.head_dtype)
    with pinned():
        params = jax.eval_shape(model.init, domain_key(config.seed, "init"))
        image = jax.ShapeDtypeStruct((images, *model.input_shape), jnp.float32)
        latent = jax.eval_shape(model.encode, params, image).shape[1:]

        def cast(params, latents, noise):
            noisy = (latents[:, None] + noise).reshape(images * samples, *latent)
            return jnp.argmax(model.classify(params, noisy), axis=-1)

        spec = jax.ShapeDtypeStruct
        noise = (samples, *latent) if config.certify.noise == "shared" else (images, samples, *latent)
        arguments = (params, spec((images, *latent), jnp.float32), spec(noise, jnp.float32))
        return Need(*(count(cast, *arguments) for count in (held, flops, traffic)))


def _here():
    """Bytes of memory of a device of this machine; None where nobody says."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def _gib(size):
    return f"{size / 2**30:,.2f} GiB"


def _time(seconds):
    return f"{seconds * 1000:,.3g} ms" if seconds < 1 else f"{seconds:,.1f} s"


def report(model, config):
    """The plan as text: sizes, memory per device, time on every one of `CHIPS`, and warnings where it cannot fit."""
    certify, smoothed = config.certify, config.certify.certificate == "smoothed"
    n = certify.n0 + certify.n
    # (column, what one unit of it is called, its need, how often, in which arithmetic, what helps)
    parts = [("training", "a step", training(model, config), 1, "training", _REMEDIES)]
    if smoothed:
        tile, calls = votes(model, config), n / math.prod(certify.tile)
        parts.append(("certification", "a certificate", tile, calls, certify.head_dtype, "a smaller certify.tile"))
    step = parts[0][2]
    lines = [
        models.describe(model),
        f"training on {distributed.devices()}: {config.data.batch_size:,} images a step, on each device "
        f"{step.flops / 1e12:,.3g} TFLOP and {_gib(step.memory)}",
        f"certification: {n:,} votes an image at most, {calls * tile.flops / 1e12:,.3g} TFLOP; on each device "
        f"{_gib(tile.memory)} for a tile of {certify.tile[0]} images x {certify.tile[1]} votes"
        if smoothed
        else "certification: deterministic, without votes",
        "",
        f"{'chip':<14}{'memory':>9}" + "".join(f"{name:>16}{unit:>16}" for name, unit, *_ in parts),
    ]
    for name, chip in CHIPS.items():
        cells = "".join(
            f"{'fits' if need.fits(chip) else 'does not fit':>16}{_time(need.seconds(chip, dtype, times)):>16}"
            for _, _, need, times, dtype, _ in parts
        )
        lines.append(f"{name:<14}{chip.memory:>5.0f} GiB{cells}")
    lines += [
        "",
        f"Memory as XLA lays it out for {jax.default_backend()}; other platforms fuse otherwise. Times: a step on as",
        "many chips as there are devices here (JAX_NUM_CPU_DEVICES=8 plays eight), a certificate on one;",
        f"products at {USED:.0%} of the peak, or memory traffic at the full rate where that takes longer.",
        "Communication, and the many launches of small networks, come on top.",
    ]
    here = _here()
    for what, _, need, _, _, remedy in parts:
        none = [name for name, chip in CHIPS.items() if not need.fits(chip)]
        if here and need.memory > FREE * here:
            lines.append(
                f"warning: {what} needs {_gib(need.memory)} per device, this machine has {_gib(here)}: take {remedy}"
            )
        if none:
            few = f"{what} on {jax.device_count()} device(s)"
            lines.append(f"warning: {few} does not fit {', '.join(none)}: take {remedy}")
    return "\n".join(lines)


_REMEDIES = "more devices, a smaller data.batch_size or train.shard_parameters=true"
