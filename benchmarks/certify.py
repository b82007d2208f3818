"""Certification measured: the sampling loop against its ceilings and a peer, schedules, arithmetics. One report.

  python benchmarks/certify.py > report.md
  TFDS_DATA_DIR=... python benchmarks/certify.py --runs=runs/sigma0.25,runs/sigma0.5,runs/sigma1.0 \\
    --reference=... > report.md
  python benchmarks/certify.py --sections=b --tile=64,64         # on an accelerator
  python benchmarks/certify.py --sections=b,c --seconds=0.3      # a first look

Everything comes from one run, on one device of the default backend. What is held against each other takes turns, in
three rounds of which the best counts, so that drift of the machine and other jobs hit all alike. Shares are of ceilings
measured in the same rounds: a chain of 2048³ matrix products, and every convolution and matrix product of a network
alone, at the shapes it has there. FLOPs are those that XLA counts. Progress goes to stderr.

Sections (--sections=a,b,...; default all):
  a  ceilings of the machine: matrix products, and the layers of the heads
  b  the sampling loop, sound arithmetic: samples/s, shares of the ceilings, what noise costs; a linear head in its span
  c  the classic loop in PyTorch on the network of --config, and what split, implementation and schedule contribute
  d  fixed and staged samples of trained models (--runs) at equal accuracy; staged on published logs (--reference)
  e  the same samples on 1 and 8 simulated devices (CPU only)
  f  sound against float32 arithmetic
  g  the cost model: seconds for whole test sets on named chips, checked on this machine

PyTorch needs idle cores: its threads wait for each other, and one busy core slows it many times.
"""

import argparse
import datetime
import functools
import os
import sys
from pathlib import Path

import devices
import jax
import jax.numpy as jnp
import measure
import numpy as np
import torch_peer
import trained
from measure import say, table
from script import ended

from lsrs_jax import models
from lsrs_jax.cli import config_from_flags
from lsrs_jax.runtime.rng import domain_key
from lsrs_jax.training.plan import CHIPS

IMAGE, CLASSES = (32, 32, 3), 10
CASES = {
    "linear on 512": ("linear", (512,)),
    "convnet_light on 8x8x48": ("convnet_light", (8, 8, 48)),
    "resnet on 16x16x12": ("resnet", (16, 16, 12)),
}
TYPICAL = "convnet_light on 8x8x48"  # the cost model takes its utilisation from here
IMAGENET_HEAD = 100e6  # FLOPs per sample, assumed


class Bench:
    """What the sections share, measured when the first of them asks."""

    def __init__(self, options):
        self.options, self.model_config = options, config_from_flags([f"--config={options.config}"]).model
        self.batches = sorted({64, 256, 1024, options.tile[0] * options.tile[1]})

    def _loop(self, head, shape, **fields):
        return measure.make_sampler(head, shape, self.options.tile, **fields)

    def _head(self, case, dtype, loops):
        name, shape = CASES[case]
        head = measure.head_function(name, shape, CLASSES, dtype)
        found = measure.layers(head, shape, self.batches)
        works = {"matmul": measure.matmul(dtype)} | measure.layer_works(found)
        if loops:
            loop = self._loop(head, shape)
            works |= {
                "samples": measure.sampling(loop),
                "noise": measure.drawing(loop),
                "independent": measure.sampling(self._loop(head, shape, noise="independent")),
                "float32": measure.sampling(self._loop(head, shape, arithmetic="float32")),
            }
        rates = measure.rates(works, self.options.seconds, f"{case}, {dtype}")
        return measure.Measured(measure.flops(head, shape), found, rates, int(np.prod(self.options.tile)))

    @functools.cached_property
    def heads(self):
        """Case → `Measured`, float32."""
        return {case: self._head(case, "float32", loops=True) for case in CASES}

    @functools.cached_property
    def heads_bfloat16(self):
        """Case → `Measured`, bfloat16. On a CPU, where nobody would certify in it, the layers alone."""
        loops = jax.default_backend() != "cpu"
        return {case: self._head(case, "bfloat16", loops) for case in CASES}

    @functools.cached_property
    def spans(self):
        """Samples per second of a linear head on 8x8x48: in all dimensions, and in the span of its weights."""
        config = self.model_config.copy_and_resolve_references()
        config.update({"encoder": "deep", "head": "linear"})
        model = models.build(config, IMAGE, CLASSES)
        params = model.init(domain_key(0, "init"))
        latent = jax.eval_shape(model.encode, params, jax.ShapeDtypeStruct((1, *IMAGE), jnp.float32)).shape[1:]
        encoder, inside = model.for_certification(params)

        def whole(z):
            return model.head.apply({"params": params["head"]}, z)

        heads = {latent: whole, encoder.report.output_shape: inside}
        works = {shape: measure.sampling(self._loop(head, shape)) for shape, head in heads.items()}
        rates = measure.rates(works, self.options.seconds, "span of a linear head")
        return {shape: rate * np.prod(self.options.tile) for shape, rate in rates.items()}

    @functools.cached_property
    def peer(self):
        """The network of the config under all loops."""
        return torch_peer.Peer(self.model_config, IMAGE, CLASSES, self.options, self.batches)

    @functools.cached_property
    def runs(self):
        """The trained models."""
        return [trained.Run(path, self.options.images, self.options.n) for path in self.options.runs]

    @functools.cached_property
    def simulated(self):
        """The staged schedule on published logs."""
        if not self.options.reference:
            return []
        return list(trained.simulate_logs(self.options.reference, self.options.n, self.options.seeds))


def section_a(bench):
    """The ceilings: matrix products, and every layer of the heads alone."""
    print("## a. Ceilings of the machine\n")
    rows = []
    for dtype, heads in (("float32", bench.heads), ("bfloat16", bench.heads_bfloat16)):
        turns = sorted(head.ceiling / 1e9 for head in heads.values())
        rows.append([dtype, f"{turns[-1]:,.0f}", f"{turns[0]:,.0f} to {turns[-1]:,.0f}"])
    table(f"{measure.SIZE}³ matrix products, precision highest|GFLOP/s|over the turns", rows)
    rows = []
    for case, measured in bench.heads.items():
        small = {layer.name: layer for layer in bench.heads_bfloat16[case].layers}
        for layer in measured.layers:
            best, half = measured.best(layer), bench.heads_bfloat16[case].best(small[layer.name])
            cells = [f"{rate / 1e9:,.0f}" for rate in measured.layer_rates(layer).values()]
            rows.append([case, layer.name, str(layer.count), f"{layer.flops / 1e6:.3f}", *cells])
            rows[-1] += [f"{best / measured.ceiling:.0%}", f"{half / 1e9:,.0f}", f"{half / best:.2f}x"]
    batches = "|".join(f"batch {batch}, GFLOP/s" for batch in bench.batches)
    columns = f"head|layer|times|MFLOP|{batches}|best, of the matmul ceiling|best in bfloat16, GFLOP/s|over float32"
    table(columns, rows)


def section_b(bench):
    """The sampling loop over its ceilings, and what its noise costs."""
    print(f"## b. The vote loop: sound arithmetic, tile {bench.options.tile}\n")
    kinds = [("float32", bench.heads)]
    if jax.default_backend() != "cpu":
        kinds.append(("bfloat16", bench.heads_bfloat16))
    rows = []
    for dtype, heads in kinds:
        for case, head in heads.items():
            rates = head.rates
            rows.append([case, dtype, f"{head.samples:,.0f}", f"{head.flops / 1e6:.3f}", f"{head.share:.0%}"])
            rows[-1] += [f"{head.layer_time * head.samples:.0%}", f"{head.noise * head.samples:.1%}"]
            rows[-1] += [f"{rates[kind] / rates['samples']:.2f}x" for kind in ("independent", "float32")]
    columns = "head|dtype|votes/s|MFLOP/vote|of the matmul ceiling|of its layers' best rates|noise, of the loop"
    table(f"{columns}|independent noise over shared|float32 arithmetic over sound", rows)
    (whole, slow), (_, fast) = bench.spans.items()
    dimensions = int(np.prod(whole))
    row = [f"{dimensions:,} dimensions: {slow:,.0f}", f"span of the weights: {fast:,.0f}", f"{fast / slow:.1f}x"]
    table(f"linear head on {'x'.join(map(str, whole))}, votes/s|sampled in the span, votes/s|ratio", [row])


def section_c(bench):
    """The classic loop as a peer, and what makes the difference."""
    peer = bench.peer
    print(f"## c. The classic loop: encoder `{bench.model_config.encoder}`, head `{bench.model_config.head}`\n")
    classic, rates, flops = peer.classic(), peer.rates, peer.flops
    rows = [
        ["ISRS here, noise on the image", f"{rates['ISRS']:,.0f}", f"{flops['ISRS'] / 1e6:.2f}"],
        ["LSRS here, noise on the latent", f"{rates['LSRS']:,.0f}", f"{flops['LSRS'] / 1e6:.2f}"],
        ["ISRS here, the head alone on the image", f"{rates['head']:,.0f}", f"{flops['head'] / 1e6:.2f}"],
    ]
    if classic:
        form, votes = classic
        name = f"PyTorch {peer.version}: input space, one image at a time, batch {torch_peer.BATCH}, {form}"
        rows = [[name, f"{votes:,.0f}", f"{peer.torch_flops / 1e6:.2f}"], *rows]
        ratios = [1.0, *(rates[kind] / votes for kind in ("ISRS", "LSRS", "head"))]
        rows = [[*row, f"{ratio:.2f}x"] for row, ratio in zip(rows, ratios, strict=True)]
    table("loop|votes/s|MFLOP/vote" + ("|over PyTorch" if classic else ""), rows)
    if classic:
        small_form, small = peer.classic(torch_peer.SMALL_BATCH)
        print(
            f"PyTorch with plain zero-padded convolutions (ours are circular), all cores, inference mode. With batches "
            f"of {torch_peer.SMALL_BATCH} ({small_form}) it makes {small / votes:.2f}x as many votes/s.\n"
        )
    else:
        print(f"{peer.note}\n")
    split = rates["LSRS"] / rates["ISRS"]
    rows = [["the split: LSRS over ISRS, both here", f"{split:.2f}x"]]
    if classic:
        rows.append(["the implementation: ISRS here over PyTorch", f"{rates['ISRS'] / votes:.2f}x"])
        rows.append(["both: LSRS with fixed votes over PyTorch", f"{rates['LSRS'] / votes:.2f}x"])
    for run in bench.runs:
        rows.append([f"the schedule: fixed over staged votes, {run.name}", f"{run.reduction:.2f}x"])
        total = run.reduction * (rates["LSRS"] / votes if classic else split)
        against = "PyTorch" if classic else "ISRS here"
        rows.append([f"all: staged LSRS over {against} with fixed votes, {run.name}", f"{total:.1f}x"])
    table("contribution|factor", rows)
    rows = [
        [name, f"{value:.2f}x", f"{split:.2f}x", f"{split / value:.2f}"] for name, value in peer.predictions().items()
    ]
    table("speed-up of the split by the cost model|predicted|measured|measured over predicted", rows)


def section_d(bench):
    """Schedules on trained models and on published logs."""
    print("## d. Fixed and staged votes at equal certified accuracy\n")
    if not bench.runs:
        print(f"No trained models. These commands make them; then give --runs=...\n\n{trained.training_commands()}\n")
    rows = [row for run in bench.runs for row in _schedule_rows(run)]
    if rows:
        print(
            f"α {trained.ALPHA}, n0 {trained.N0}, n {bench.options.n:,}, binary bound; seconds of the loop and of all "
            "decisions, after compilation. Points of certified accuracy are lost at the radii asked for (at every 0.25 "
            "where none are), at worst. Between radii asked for, a radius says only which it reaches: ACR falls.\n"
        )
        columns = "run|images|votes|per image|fewer|seconds|faster|votes/s|points lost below 85 % of the largest radius"
        table(f"{columns}|points lost anywhere|ACR|over fixed|ACR multiclass over binary", rows)
    for run in bench.runs:
        radii = (0.0, *trained.grid(run.config.sigma))
        outcomes = {"fixed": run.fixed} | {f"staged: {name}": outcome for name, outcome in run.staged.items()}
        rows = [[name, *(f"{a:.3f}" for a in outcome.accuracy(radii))] for name, outcome in outcomes.items()]
        table(f"{run.name}, certified accuracy|" + "|".join(f"r={radius:g}" for radius in radii), rows)
    if bench.simulated:
        print(f"Simulated on published logs, mean of {bench.options.seeds} seeds:\n")
        rows = [
            [s.log, f"{s.images:,}", s.target, f"{s.reduction:.1f}x", f"{s.below:.2f}", f"{s.anywhere:.2f}"]
            for s in bench.simulated
        ]
        table("log|images|radii|fewer votes|points lost below 85 % of the largest radius|points lost anywhere", rows)


def _schedule_rows(run):
    fixed, images = run.fixed, len(run.indices)
    outcomes = {"fixed": fixed} | {f"staged: {name}": outcome for name, outcome in run.staged.items()}
    for name, outcome in outcomes.items():
        cells = [f"{outcome.samples:,.0f}", f"{fixed.samples / outcome.samples:.1f}x"]
        cells += [f"{outcome.seconds:,.1f}", f"{fixed.seconds / outcome.seconds:.1f}x"]
        cells.append(f"{outcome.samples * images / outcome.seconds:,.0f}")
        if outcome is fixed:
            cells += ["-", "-"]
        else:
            asked = outcome.derivation.radii or trained.grid(run.config.sigma)
            cells += [f"{points:.2f}" for points in trained.losses(fixed, outcome, asked)]
        cells += [f"{outcome.acr:.4f}", _ratio(outcome.acr, fixed.acr, 3)]
        cells.append(_ratio(fixed.under(bound="multiclass").acr, fixed.acr, 3) if outcome is fixed else "-")
        yield [run.name, str(images), name, *cells]


def _ratio(value, base, digits):
    return f"{value / base:.{digits}f}" if base > 0 else "-"


def section_e(bench):
    """The same samples on 1 and 8 simulated devices."""
    print("## e. The same votes on simulated devices\n")
    if jax.default_backend() != "cpu":
        print(f"Left out on {jax.default_backend()}: the devices are simulated on a CPU.\n")
        return
    say("the same samples on 1 and 8 devices")
    samples, equal, ratios = devices.compare(bench.options.tile, 2 * bench.options.seconds, rounds=5)
    rows = [
        [
            str(count),
            f"{samples:,}",
            "yes" if equal else "NO",
            f"{np.median(times):.2f}x ({times[0]:.2f} to {times[-1]:.2f})",
        ]
        for count, times in ratios.items()
    ]
    table("devices|votes|all counts equal|time over 1 device, median of 5 rounds (range)", rows)


def section_f(bench):
    """What the sound arithmetic costs in speed and in radius."""
    print("## f. Sound against float32 arithmetic\n")
    rows = [[case, f"{head.rates['samples'] / head.rates['float32']:.2f}x"] for case, head in bench.heads.items()]
    table("head|votes/s, sound over float32", rows)
    rows = []
    for run in bench.runs:
        sound, plain = run.arithmetics
        radii = [float(outcome.certificates.radius.mean()) for outcome in (sound, plain)]
        rows.append([run.name, str(len(sound.images)), f"{radii[0]:.4f}", f"{radii[1]:.4f}", _ratio(*radii, 4)])
        rows[-1].append(f"{trained.radius_share(sound):.3%}")
    if rows:
        columns = "run|images|mean certified radius, sound|float32|sound over float32"
        table(f"{columns}|slack charged, of the sound radii", rows)


def section_g(bench):
    """Seconds on named chips from counted FLOPs, and how well the reckoning does here."""
    typical, half = bench.heads[TYPICAL], bench.heads_bfloat16[TYPICAL]
    reductions = [run.reduction for run in bench.runs]
    source = "mean of the runs of section d"
    if not reductions:
        reductions, source = _logged_reductions(bench), "mean of the published logs of section d, radii every 0.25"
    reduction = float(np.mean(reductions)) if reductions else None
    tasks = {
        f"10,000 CIFAR-10 images, {typical.flops / 1e6:.2f} MFLOP/vote": (10_000, typical.flops),
        f"50,000 ImageNet images, {IMAGENET_HEAD / 1e6:.0f} MFLOP/vote (assumed)": (50_000, IMAGENET_HEAD),
    }
    chips = {name: {"bfloat16": 1e12 * chip.bfloat16, "float32": 1e12 * chip.float32} for name, chip in CHIPS.items()}
    chips |= {"this machine, measured ceilings": {"bfloat16": half.ceiling, "float32": typical.ceiling}}
    print("## g. The cost model\n")
    print(
        f"Seconds of votes = images · (n0 + n) · FLOPs / (peak · utilisation), n0 {trained.N0}, n {bench.options.n:,}. "
        f"Assumed everywhere: the utilisation of {TYPICAL} in the loop here, {typical.share:.0%} of this machine's "
        "matmul ceiling (float32); it was not measured on those chips. Encoding, once per image, and data are left "
        "out. Peaks are dense, of one chip, from data sheets; float32 on a TPU is six products in bfloat16. "
        + (f"Staged: {reduction:.1f}x fewer votes ({source}).\n" if reduction else "Staged needs --runs.\n")
    )
    rows = []
    for chip, peaks in chips.items():
        for dtype, peak in peaks.items():
            rows.append([chip, dtype, f"{peak / 1e12:,.4g}"])
            for images, flops in tasks.values():
                seconds = images * (trained.N0 + bench.options.n) * flops / (peak * typical.share)
                rows[-1] += [_seconds(seconds), _seconds(seconds / reduction) if reduction else "-"]
    table("chip|dtype|TFLOP/s|" + "|".join(f"{task}: fixed, s|staged, s" for task in tasks), rows)
    print(
        f"Check: FLOPs at the rate of {TYPICAL} without its noise, and noise as it is drawn alone. Beside it a "
        "certification fills its last tiles partly, and books and decides.\n"
    )
    table("on this machine|predicted|measured|measured over predicted", list(_checks(bench, typical)))


def _logged_reductions(bench):
    return [s.reduction for s in bench.simulated if s.target == next(iter(trained.targets(1.0)))]


def _seconds(seconds):
    return f"{float(f'{seconds:.3g}'):,g}"


def _checks(bench, typical):
    """The model against this machine: other heads in the loop, and whole certifications of trained models.

    Here the noise is known as well: a sample takes its FLOPs at the rate of the typical head, and its noise.
    """
    rate = typical.flops / (1 / typical.samples - typical.noise)
    for case, head in bench.heads.items():
        if case != TYPICAL:
            predicted = 1 / (head.flops / rate + head.noise)
            both = (f"{number:,.0f}" for number in (predicted, head.samples))
            yield [f"b: {case}, votes/s", *both, f"{head.samples / predicted:.2f}"]
    for run in bench.runs:
        shape = run.latents.shape[1:]
        noise = typical.noise * np.prod(shape) / np.prod(CASES[TYPICAL][1])
        sample = measure.flops(run.head, shape) / rate + noise
        for name, outcome in (("fixed", run.fixed), ("staged", next(iter(run.staged.values())))):
            predicted = len(run.indices) * outcome.samples * sample
            cells = [f"{predicted:,.1f}", f"{outcome.seconds:,.1f}", f"{outcome.seconds / predicted:.2f}"]
            yield [f"d: {run.name}, {name}, seconds", *cells]


SECTIONS = {
    "a": section_a,
    "b": section_b,
    "c": section_c,
    "d": section_d,
    "e": section_e,
    "f": section_f,
    "g": section_g,
}


def parse():
    """The options, checked before anything is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="such as a,b,c")
    parser.add_argument("--seconds", type=float, default=1.0, help="per rate that is measured")
    parser.add_argument("--tile", default="32,8", help="images,samples of a batch in the loop")
    home = Path(__file__).resolve().parents[1]
    parser.add_argument(
        "--config", default=f"{home / 'configs' / 'cifar10_small.py'}:deep", help="network of section c"
    )
    parser.add_argument("--runs", default="", help="workdirs of trainings, separated by commas")
    parser.add_argument("--images", type=int, default=200, help="of each run, evenly spaced")
    parser.add_argument("--n", type=int, default=100_000, help="estimation samples of the fixed schedule")
    parser.add_argument("--reference", default="", help="folder of published logs")
    parser.add_argument("--seeds", type=int, default=5, help="of the simulation on published logs")
    options = parser.parse_args()
    options.sections = options.sections.split(",")
    options.runs = [path for path in options.runs.split(",") if path]
    unknown = [name for name in options.sections if name not in SECTIONS]
    missing = [path for path in options.runs if not (Path(path) / "config.json").is_file()]
    if unknown:
        parser.error(f"no section {unknown[0]!r}")
    if missing:
        parser.error(f"{missing[0]} holds no training")
    if options.reference and not Path(options.reference).is_dir():
        parser.error(f"no folder {options.reference}")
    options.tile = tuple(int(part) for part in options.tile.split(","))
    return options


def main():
    """Prints the report."""
    options = parse()
    bench = Bench(options)
    if not {"c", "d", "f", "g"}.isdisjoint(options.sections):
        _ = bench.runs  # what cannot be read fails before anything is measured
    device, load = jax.local_devices()[0], os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(
        f"jax {jax.__version__}, {jax.default_backend()} {device.device_kind}, {os.cpu_count()} cores, "
        f"{datetime.date.today()}; load at the start {load:.1f}; `benchmarks/certify.py {' '.join(sys.argv[1:])}`\n"
    )
    for section in options.sections:
        SECTIONS[section](bench)
    say("done")


if __name__ == "__main__":
    ended(main)
