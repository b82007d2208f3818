"""Cost of orthogonal convolutions over zero-padded plain ones, for nets of several layers: one table from one run.

  python -m benchmarks.orthogonal [--pairs=64x32,128x16,256x8 --batch=256 --layers=4 --families=adaptive,cayley]

Per pair of channels x image size all nets of a framework take turns in every round, so that drift of the machine hits
all alike; times are medians, ratios are medians of the ratios within a round. "weights" is a step that only builds the
kernels and pulls a gradient back through them. The residual is max |sigma - 1| over the layers (with zero padding,
which keeps no isometry: max sigma - 1), of the materialised net (whose report adds a margin of 1e-11) and of kernels
built in float32 as in training.

Rows of PyTorch appear where it is installed (pip install torch orthogonium einops), over a plain net in PyTorch. They
need idle cores: its OpenMP threads wait for each other, and one busy core slows small nets a hundredfold.
"""

import argparse
import importlib
import os
import time
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.measuring import load_torch, say
from lsrs_jax import cli, orthogonal
from lsrs_jax.layers import Encoder, MaxMin, OrthogonalConv
from lsrs_jax.layers.lipschitz import materialize
from lsrs_jax.orthogonal.spectrum import kernel_spectrum
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.rng import domain_key
from lsrs_jax.training.steps import compiler_options

COLUMNS = "net|c x n|train step, ms|over plain|weights, ms|of the step|peak, MiB|over plain|inference, ms|over plain"
COLUMNS = [*COLUMNS.split("|"), "residual", "residual, float32"]
KERNEL, RATE = (3, 3), 1e-3


class Case(NamedTuple):
    """One net and what is measured of it."""

    name: str
    works: dict[str, Callable]  # "train", "weights", "inference" -> a call that returns when the work is done
    peak: float | None = None  # bytes
    residual: float | None = None
    residual_float32: float | None = None


def deviation(spectra, padding):
    """The largest distance of a singular value from 1; with zero padding, how far one exceeds 1."""
    if padding == "zero":
        return max(s.sigma_max - 1 for s in spectra)
    return max(abs(sigma - 1) for s in spectra for sigma in (s.sigma_max, s.sigma_min))


def interleaved(works, repeats, label):
    """Seconds of every work, one entry per round."""
    for name, work in works.items():
        say(f"{label}: first run of {', '.join(name)}")
        work()
    times = {name: [] for name in works}
    for index in range(repeats):
        say(f"{label}: round {index + 1} of {repeats}")
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: np.array(column) for name, column in times.items()}


def print_rows(cases, pair, repeats):
    """Measures `cases`, the plain one first, and prints a row for each."""
    label, plain = f"{pair[0]} x {pair[1]}", cases[0]
    times = interleaved({(c.name, kind): work for c in cases for kind, work in c.works.items()}, repeats, label)

    def cells(own, other, form):
        if own not in times:
            return "-", "-"
        return f"{1e3 * np.median(times[own]):.1f}", form.format(np.median(times[own] / times[other]))

    for case in cases:
        row = [case.name, label, *cells((case.name, "train"), (plain.name, "train"), "{:.2f}x")]
        row += cells((case.name, "weights"), (case.name, "train"), "{:.1%}")
        row += (f"{case.peak / 2**20:.1f}", f"{case.peak / plain.peak:.2f}x") if case.peak else ("-", "-")
        row += cells((case.name, "inference"), (plain.name, "inference"), "{:.2f}x")
        row += ["-" if value is None else f"{value:.1e}" for value in (case.residual, case.residual_float32)]
        print(f"| {' | '.join(row)} |", flush=True)


def jax_call(function, *values):
    compiled = jax.jit(function, compiler_options=compiler_options()).lower(*values).compile()
    return lambda: jax.block_until_ready(compiled(*values))


def jax_train(net, variables, x):
    """A call that makes one step of SGD, and the bytes its program needs (None where the backend does not tell)."""
    optimizer = optax.sgd(RATE)

    def step(state, x):
        variables, moments = state
        loss, gradient = jax.value_and_grad(lambda variables: jnp.mean(net.apply(variables, x) ** 2))(variables)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(variables, updates), moments), loss

    state = jax.tree.map(jnp.copy, (variables, optimizer.init(variables)))  # donated: `variables` lives on
    compiled = jax.jit(step, donate_argnums=0, compiler_options=compiler_options()).lower(state, x).compile()

    def work():
        nonlocal state
        state, loss = compiled(state, x)
        jax.block_until_ready((state, loss))

    memory = compiled.memory_analysis()
    moved = memory and memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return work, memory and memory.temp_size_in_bytes + moved


def alternate(layers):
    return tuple(part for layer in layers for part in (layer, MaxMin()))


def plain_case(x, layers):
    net = nn.Sequential(alternate(nn.Conv(x.shape[-1], KERNEL, use_bias=False) for _ in range(layers)))
    variables = net.init(domain_key(0, "init"), x[:1])
    train, peak = jax_train(net, variables, x)
    return Case("plain, zero padding", {"train": train, "inference": jax_call(net.apply, variables, x)}, peak)


def family_case(method, x, layers, padding):
    """The net of one family; raises UserError where the family does not take the shape."""
    channels, family = x.shape[-1], orthogonal.family(method)
    shape = orthogonal.ConvShape(KERNEL, (1, 1), channels, channels, x.shape[1:3], padding)
    family.check(shape)
    fields = {"method": method, "initializer": "random", "padding": padding}
    net = Encoder(alternate(OrthogonalConv(channels, KERNEL, **fields) for _ in range(layers)))
    variables = net.init(domain_key(0, "init"), x[:1])
    train, peak = jax_train(net, variables, x)
    raws = [family.init(key, shape, "random") for key in jax.random.split(domain_key(0, "probe"), layers)]

    def build(raws):
        return orthogonal.build_kernels([(method, shape, raw) for raw in raws])

    weights = jax_call(jax.value_and_grad(lambda raws: optax.tree.norm(build(raws), squared=True)), raws)
    say(f"{channels} x {x.shape[1]}: materialising {method}")
    frozen = materialize(net, variables, x.shape[1:])
    values = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), frozen.params)
    built = jax.jit(build, compiler_options=compiler_options())(raws)
    spectra = [family.spectrum(jax.tree.map(np.asarray, kernel), shape) for kernel in built]
    works = {"train": train, "weights": weights, "inference": jax_call(frozen.apply, values, x)}
    return Case(method, works, peak, deviation(frozen.report.layers, padding), deviation(spectra, padding))


def jax_cases(pair, options, notes):
    channels, size = pair
    x = jax.random.normal(domain_key(0, "probe"), (options.batch, size, size, channels), jnp.float32)
    cases = [plain_case(x, options.layers)]
    for method in options.families:
        say(f"{channels} x {size}: compiling {method}")
        try:
            cases.append(family_case(method, x, options.layers, options.padding))
        except UserError as error:
            notes.append(f"{method} has no row for {channels} x {size}: {error}.")
    return cases


# Module of orthogonium, layer, its padding. The kernel of AdaptiveSOCConv2d grows to 7x7, which "same" does not follow.
TORCH_LAYERS = (
    ("layers.conv.AOC", "AdaptiveOrthoConv2d", "same"),
    ("layers.conv.adaptiveSOC.ortho_conv", "AdaptiveSOCConv2d", 3),
    ("legacy.cayley_ortho_conv", "Cayley", None),
)


def torch_case(torch, name, convolutions, x, padding):
    """The net of these layers; kernels that a layer builds are frozen into nn.Conv2d for inference."""
    from orthogonium.layers import MaxMin as Halves

    def chain(layers):
        return torch.nn.Sequential(*(part for layer in layers for part in (layer, Halves()))).to(x.device)

    net = chain(convolutions)
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)

    def descend(loss, update=lambda: None):
        optimizer.zero_grad()
        loss().backward()
        update()
        wait()

    def infer():
        with torch.inference_mode():
            forward(x)
        wait()

    works = {"train": lambda: descend(lambda: net(x).square().mean(), optimizer.step), "inference": infer}
    forward = net
    if not torch.nn.utils.parametrize.is_parametrized(convolutions[0]):
        return Case(name, works)
    works["weights"] = lambda: descend(lambda: sum(conv.weight.square().sum() for conv in convolutions))
    forward = chain(torch_frozen(torch, conv) for conv in convolutions)
    kernels = [conv.weight.detach().cpu().double().numpy().transpose(2, 3, 1, 0) for conv in convolutions]
    say(f"{x.shape[1]} x {x.shape[2]}: spectra of {name}")
    spectra = [kernel_spectrum(kernel, tuple(x.shape[2:]), padding=padding) for kernel in kernels]
    return Case(name, works, residual_float32=deviation(spectra, padding))


def torch_frozen(torch, conv):
    """nn.Conv2d with the kernel that `conv` has now."""
    sizes = conv.in_channels, conv.out_channels, tuple(conv.weight.shape[2:])
    plain = torch.nn.Conv2d(*sizes, padding=conv.padding, padding_mode=conv.padding_mode, bias=False)
    plain.weight.data = conv.weight.detach()
    return plain


def torch_cases(pair, options, notes):
    """Cases of PyTorch, or a note why there are none."""
    try:
        (torch, device), _ = load_torch(), importlib.import_module("orthogonium")
    except (UserError, ImportError) as error:
        notes.append(str(error))
        return []
    channels, size = pair
    x = torch.randn(options.batch, channels, size, size, device=device)
    version = f"(PyTorch {torch.__version__})"
    plain = [torch.nn.Conv2d(channels, channels, KERNEL, padding="same", bias=False) for _ in range(options.layers)]
    cases = [torch_case(torch, f"plain, zero padding {version}", plain, x, options.padding)]
    mode = "zeros" if options.padding == "zero" else "circular"
    for module, name, around in TORCH_LAYERS:
        if around is None and options.padding == "zero":
            continue
        fields = {} if around is None else {"padding": around, "padding_mode": mode}
        say(f"{channels} x {size}: building {name}")
        try:
            make = getattr(importlib.import_module(f"orthogonium.{module}"), name)
            convolutions = [make(channels, channels, 3, bias=False, **fields) for _ in range(options.layers)]
            case = torch_case(torch, f"orthogonium {name} {version}", convolutions, x, options.padding)
            for work in case.works.values():  # what does not run fails here, not in the middle of the measurement
                work()
            cases.append(case)
        except (ImportError, RuntimeError, ValueError) as error:
            notes.append(f"orthogonium {name} does not run ({error}).")
    notes.append(
        f"orthogonium {metadata.version('orthogonium')}, {torch.get_num_threads()} threads: AdaptiveOrthoConv2d and "
        "AdaptiveSOCConv2d infer as nn.Conv2d with the kernel copied; Cayley (its legacy module) has no frozen form: "
        "it builds its matrices in every pass."
    )
    return cases


def main(arguments):
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="64x32,128x16,256x8", help="channels x image size, ...")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    families = sorted(orthogonal.FAMILIES, key=lambda name: (name != "adaptive", name))
    parser.add_argument("--families", default=",".join(families))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--padding", choices=("circular", "zero"), default="circular", help="of the orthogonal nets")
    options = parser.parse_args(arguments)
    options.pairs = [tuple(int(part) for part in pair.split("x")) for pair in options.pairs.split(",")]
    options.families, notes = options.families.split(","), []
    print(
        f"jax {jax.__version__}, {jax.local_devices()[0].device_kind}, {os.cpu_count()} cores; {options.layers} layers "
        f"of 3x3 + MaxMin, {options.padding} padding, batch {options.batch}, float32, {options.repeats} rounds\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for pair in options.pairs:
        for cases in (jax_cases, torch_cases):
            if found := cases(pair, options, notes):
                print_rows(found, pair, options.repeats)
    for note in dict.fromkeys(notes):
        print(f"\n{note}")


if __name__ == "__main__":
    cli.execute(main)
