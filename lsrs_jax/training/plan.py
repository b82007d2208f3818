"""Estimates memory, FLOPs and time of a training and its certification, on the chips of `CHIPS`."""

import dataclasses
import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsrs_jax.data import Dataset
from lsrs_jax.models import Model, describe
from lsrs_jax.models.flops import flops, peak_memory, traffic
from lsrs_jax.models.heads import Latents
from lsrs_jax.models.split import Params
from lsrs_jax.runtime.mesh import global_mesh, replicated, split
from lsrs_jax.runtime.processes import devices
from lsrs_jax.runtime.rng import domain_key, pinned
from lsrs_jax.runtime.types import Config
from lsrs_jax.smoothing.derivation import BLOCK_BYTES
from lsrs_jax.smoothing.schedule import make_schedule
from lsrs_jax.training.feeds import accelerator_bytes, on_device
from lsrs_jax.training.steps import parts, step_function

LATENT_BYTES = 2**30  # `certification.encode` keeps as many latents in memory
USED = 0.3  # share of the peak FLOP/s, as measured for configs/cifar10.py on an H200 (docs/results/accelerator.md)
FREE = 0.9  # share of a chip's memory that a program can use; the runtime and fragmentation take the rest
_REMEDIES = "more devices, a smaller --config.data.batch_size or --config.train.shard_parameters=true"


class Chip(NamedTuple):
    """Peaks without sparsity, from the vendor's data sheet."""

    memory: float  # GiB
    bandwidth: float  # TB/s
    bfloat16: float  # TFLOP/s of matrix products
    float32: float  # TFLOP/s in true float32, for sampling; a TPU computes one product as six in bfloat16
    training: float  # TFLOP/s of float32 at JAX's default precision: TF32, or bfloat16 on a TPU


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
    """Resources of one compiled program, per device."""

    memory: int  # bytes of arguments, results and temporaries
    flops: float  # of convolutions and matrix products
    moved: float  # bytes that these read and write

    def fits(self, chip: Chip) -> bool:
        """True if the chip has enough memory."""
        return self.memory <= FREE * chip.memory * 2**30

    def seconds(self, chip: Chip, dtype: str, times: float = 1) -> float:
        """Time of `times` calls: the longer of arithmetic and memory traffic, without launches and the host."""
        peak = {"float32": chip.float32, "bfloat16": chip.bfloat16, "training": chip.training}[dtype]
        return times * max(self.flops / (USED * peak * 1e12), self.moved / (chip.bandwidth * 1e12))


def training_need(model: Model, config: Config) -> Need:
    """The `Need` of an optimizer step on all devices of this run, with the memory that XLA allocates for it."""
    mesh, size = global_mesh(), config.data.batch_size
    with pinned():
        fresh, shardings, step = parts(model, config, mesh)
        train_step = step_function(step, (shardings, replicated(mesh)))
        key = jax.device_put(domain_key(config.seed, "train"), replicated(mesh))
        state = jax.tree.map(lambda leaf, s: leaf.update(sharding=s), jax.eval_shape(fresh, key), shardings)

        def arguments(size: int) -> tuple[Any, ...]:
            images = jax.ShapeDtypeStruct((size, *model.input_shape), jnp.float32, sharding=split(mesh))
            labels = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=split(mesh))
            return state, images, labels, key, np.uint32(0)

        found: Any = train_step.lower(*arguments(size)).compile().memory_analysis()
        memory = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
        counts = []
        for count in (flops, traffic):
            one, two = (count(train_step, *arguments(times * size)) for times in (1, 2))
            # Every device does all work that does not grow with the batch, such as the building of kernels.
            counts.append(2 * one - two + (two - one) / mesh.size)
        return Need(memory - found.alias_size_in_bytes, *counts)


def sampling_need(model: Model, config: Config) -> Need:
    """The `Need` of one batch (images x samples) of certification on one device."""
    # Counted in the jaxpr, because XLA's analysis on a CPU leaves out the operations that it fuses.
    images, samples = config.certify.tile
    model = dataclasses.replace(model, head_dtype=config.certify.head_dtype)

    def sample(params: Params, latents: Latents, noise: Latents) -> jax.Array:
        noisy = (latents[:, None] + noise).reshape(images * samples, *latents.shape[1:])
        return jnp.argmax(model.classify(params, noisy), axis=-1)

    with pinned():
        params, latents = model.shapes(images)
        shape = latents.shape[1:]
        noise = (samples, *shape) if config.certify.noise == "shared" else (images, samples, *shape)
        arguments = params, *(jax.ShapeDtypeStruct(size, jnp.float32) for size in ((images, *shape), noise))
        return Need(*(count(sample, *arguments) for count in (peak_memory, flops, traffic)))


def host_memory(config: Config, images: int, classes: int, latent: tuple[int, ...]) -> tuple[int, int]:
    """Bytes of the host: for latents and counts while `images` images are certified, and for deriving certificates."""
    certify = config.certify
    looks = len(make_schedule(certify.schedule, certify.n0, certify.n, certify.tile[1]).looks)
    counts = images * classes * (2 + looks) * 8  # int64, of both streams, and at every look
    latents = min(LATENT_BYTES, 4 * images * math.prod(latent))
    return counts + latents, images * classes * 8 + BLOCK_BYTES


def _memory_here() -> int | None:
    """Bytes of memory of one device of this machine, or None if unknown."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _cells(need: Need, chip: Chip, dtype: str, calls: float) -> str:
    seconds = need.seconds(chip, dtype, calls)
    time = f"{seconds * 1000:,.3g} ms" if seconds < 1 else f"{seconds:,.1f} s"
    return f"{'fits' if need.fits(chip) else 'does not fit':>16}{time:>16}"


def report(model: Model, config: Config, dataset: Dataset, images: int) -> str:
    """The estimate as text: sizes, memory, time on every chip of `CHIPS`; warnings if memory is short.

    `dataset` is what the model is trained on, `images` the number of images that are certified.
    """
    certify, step = config.certify, training_need(model, config)
    held = accelerator_bytes(dataset, global_mesh())
    need = dataclasses.replace(step, memory=step.memory + held)
    # (name, unit that is timed, need of a program, calls per unit, field of `Chip`, remedy if memory is short)
    columns = [("training", "a step", need, 1, "training", _REMEDIES)]
    lines = [
        describe(model),
        f"training on {devices()}: {config.data.batch_size:,} images a step, on each device "
        f"{step.flops / 1e12:,.3g} TFLOP and {_gib(step.memory)}"
        + (f"; a GPU or TPU holds the images too, {_gib(held)}" if held else ""),
    ]
    if certify.certificate == "smoothed":
        n, tile = certify.n0 + certify.n, sampling_need(model, config)
        calls = n / math.prod(certify.tile)
        columns.append(
            ("certification", "a certificate", tile, calls, certify.head_dtype, "a smaller --config.certify.tile")
        )
        lines.append(
            f"certification: at most {n:,} samples an image, {calls * tile.flops / 1e12:,.3g} TFLOP; on each device "
            f"{_gib(tile.memory)} for a batch of {certify.tile[0]} images x {certify.tile[1]} samples"
        )
        params, latents = model.shapes()
        classes = jax.eval_shape(model.classify, params, latents).shape[1]
        sampled, derived = host_memory(config, images, classes, latents.shape[1:])
        lines.append(
            f"certification of {images:,} images x {classes:,} classes: on the host at most {_gib(sampled)} for "
            f"latents and counts, and {_gib(derived)} more while certificates are derived"
        )
    else:
        lines.append("certification: deterministic, without samples")
    lines += ["", f"{'chip':<14}{'memory':>9}" + "".join(f"{name:>16}{unit:>16}" for name, unit, *_ in columns)]
    for name, chip in CHIPS.items():
        cells = "".join(_cells(need, chip, dtype, calls) for _, _, need, calls, dtype, _ in columns)
        lines.append(f"{name:<14}{chip.memory:>5.0f} GiB{cells}")
    lines += [
        "",
        f"Memory: as XLA allocates it for {jax.default_backend()}; other platforms differ. Times: a step on as many",
        "chips as there are devices here (JAX_NUM_CPU_DEVICES=8 simulates eight), a certificate on one chip. They are",
        f"the longer of arithmetic at {USED:.0%} of the peak and memory traffic at the full rate. Communication and",
        "the launches of kernels, which matter for small networks, come in addition.",
    ]
    here, elsewhere = _memory_here(), 0 if on_device(dataset, global_mesh()) else held
    for name, _, need, _, _, remedy in columns:
        memory = need.memory - elsewhere * (name == "training")
        if here and memory > FREE * here:
            needed = f"needs {_gib(memory)} per device, this machine has {_gib(here)}"
            lines.append(f"warning: {name} {needed}: use {remedy}")
        if small := ", ".join(chip for chip, peaks in CHIPS.items() if not need.fits(peaks)):
            lines.append(f"warning: {name} on {jax.device_count()} device(s) does not fit {small}: use {remedy}")
    return "\n".join(lines)
