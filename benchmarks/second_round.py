"""The second round on an accelerator: two calls of a few minutes on one GPU make the rows of study "second".

  python -m benchmarks.second_round plan
  python -m benchmarks.second_round call1 --packed=runs/cifar10.packed [--to=$OUT]
  python -m benchmarks.second_round call2 --packed=runs/cifar10.packed [--to=$OUT]
  python -m benchmarks.second_round render

benchmarks/cifar10_file.py makes the packed data. Call 1 trains and certifies rows side by side, under NVIDIA's
multi-process service where there is one; its seconds mean nothing. Call 2 has the GPU for itself: it measures the speed
of the training "recipe", chooses the number of its steps by that speed, trains and certifies it, certifies the 10,000
test images with a row of call 1, and measures samples per second. Everything is below --out. What is complete is not
made again, so after an interruption, or with more --seconds, the same command resumes. At the end a call packs the
results, and the checkpoint that call 2 needs, into files of 15 MiB in --to: `cat FILES | tar xz -C runs` restores them.
--tiny runs every piece with a few steps and images, to try the script.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import jax

from benchmarks import accelerator, cifar10_file, measuring, throughput
from lsrs_jax import cli, models
from lsrs_jax.flags import config_from_flags
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import write_atomic
from lsrs_jax.runtime.rng import domain_key
from lsrs_jax.runtime.workdir import checkpoints
from studies import results
from studies.runs import RECIPE, STUDIES
from studies.second_round import KEPT, WHOLE, markdown

ROWS = STUDIES["second"].rows
SIDE_BY_SIDE = [label for label in ROWS if label != RECIPE]  # of call 1
MEASURED = (WHOLE, "LSRS, low-pass, MLP", "LSRS, learned, MLP", "LSRS, Haar, ResNet", RECIPE)
MEASURED += ("ISRS, ResNet: SmoothAdv and consistency",)
RADII = (0.25, 0.5, 0.75)  # that the staged and anytime certifications of the whole test set decide
SCHEDULES = {
    "fixed": {"schedule": "fixed"},
    "anytime-radii": {"schedule": "anytime", "radii": RADII},
    "staged-radii": {"schedule": "staged", "radii": RADII},
}
SECONDS = {"call1": 235, "call2": 295}
TRAINING = 120  # seconds of steps of the recipe
PROBE = 240  # steps that measure its speed; the last third of them has more noise samples
BUDGETS = {"speed": 80, "recipe": 230, **dict.fromkeys(SCHEDULES, 90), "rates": 90, "precision": 90}  # of call 2
FEWEST = 15  # seconds below which no piece starts
PART = 15 * 2**20  # bytes of a file in --to
TINY = ("train.steps=3", "train.warmup_steps=1", "data.batch_size=8", "certify.n=1000", "certify.tile=(4,8)")
TINY += ("certify.step=6", "certify.head_dtype=float32", "train.log_every=1", "train.head_dtype=float32")


class Round:
    """The options of a call, and the time that is left."""

    def __init__(self, options):
        self.options, self.tiny, self.out = options, options.tiny, options.out
        self.data = options.out / "cifar10.npz"
        self.whole = self.work(options.seconds)

    def work(self, seconds):
        """A `Work` that stops its commands after so many seconds."""
        return accelerator.Work(argparse.Namespace(out=self.out, tiny=self.tiny, minutes=seconds / 60))

    def run(self, label, *flags):
        """A run of the study on the unpacked data."""
        run, data = ROWS[label], f"data.name=npz:{os.path.relpath(self.data, accelerator.ROOT)}"
        last = {flag.partition("=")[0]: flag for flag in (*run.flags, data, *flags, *TINY * self.tiny)}
        return dataclasses.replace(run, flags=tuple(last.values()))  # a tuple that is given twice would be appended

    def make(self, work, run):
        """Trains and certifies a run, and keeps it."""
        folder, place = self.out / KEPT / run.name, self.place(run)
        if not (folder / "card.md").exists():
            for words in run.commands(place):
                work.command("-m", *words, path=self.out / "logs" / f"{run.name}-{words[0]}")
            results.keep(place, folder, run.shown())

    def place(self, run):
        """The workdir of a run."""
        return self.out / "runs" / run.name


@contextlib.contextmanager
def side_by_side():
    """NVIDIA's multi-process service for the processes that start inside, where the machine has it."""
    control = shutil.which("nvidia-cuda-mps-control")
    with tempfile.TemporaryDirectory() as folder:
        if control:
            os.environ.update(CUDA_MPS_PIPE_DIRECTORY=folder, CUDA_MPS_LOG_DIRECTORY=folder)
            subprocess.run([control, "-d"], check=True)
        try:
            yield
        finally:
            if control:
                subprocess.run([control], input=b"quit -t 5\n", check=False, timeout=30)


def call1(this):
    """Makes all rows but the recipe at the same time; returns the names of those that failed."""
    jax.config.update("jax_platforms", "cpu")  # of this process, which would keep the service from ending
    found, failed, late = [this.run(label) for label in SIDE_BY_SIDE], [], False
    pool = concurrent.futures.ThreadPoolExecutor(2 if this.tiny else len(found))
    with side_by_side(), pool:
        waiting = {pool.submit(this.make, this.whole, run): run.name for run in found}
        try:
            for done in concurrent.futures.as_completed(waiting):
                if isinstance(error := done.exception(), accelerator.Deadline):
                    late = True
                elif error:
                    say(f"{waiting[done]}: {error}")
                    failed.append(waiting[done])
        except BaseException:
            this.whole.end = time.monotonic()  # each command saves its progress
            pool.shutdown(cancel_futures=True)
            raise
    if late:
        raise accelerator.Deadline("the seconds are over; the same command resumes")
    return failed


def speed(this, work):
    """Images per second of the recipe's training, in its first steps and in its last third, on this machine."""
    run = dataclasses.replace(this.run(RECIPE, *lengths(PROBE), "train.log_every=20"), name="speed")
    place = this.place(run)
    work.command("-m", *run.commands(place)[0], path=this.out / "logs" / "speed")
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["images_per_second"] for row in rows if "images_per_second" in row}
    last = max(found)
    early = [rate for step, rate in found.items() if last / 6 < step <= last * 2 / 3]
    late = [rate for step, rate in found.items() if step > last * 5 / 6]
    return {"early": sum(early) / len(early), "late": sum(late) / len(late)}


def lengths(steps):
    """The flags of the recipe for another number of steps: its warm-ups keep their shares of them."""
    shares = {"train.warmup_steps": 0.15, "train.smoothadv.warmup_steps": 0.1, "train.sigma_steps": 0.05}
    return f"train.steps={steps}", *(f"{name}={round(share * steps)}" for name, share in shares.items())


def recipe(this, work):
    """Trains the recipe for some `TRAINING` seconds, certifies and keeps it."""
    rates, batch = json.loads((this.out / "second.speed.json").read_text())["result"], 512
    seconds = batch * (2 / 3 / rates["early"] + 1 / 3 / rates["late"])  # of a step
    steps = max(300, min(20_000, int(TRAINING / seconds) // 100 * 100))
    this.make(work, this.run(RECIPE, *lengths(steps)))
    return {"steps": steps}


def whole_set(this, work, name):
    """Wall seconds from the checkpoint of row `WHOLE` to the table of all test images."""
    place = this.place(ROWS[WHOLE])
    if not checkpoints(place).is_dir():
        raise UserError(f"needs the checkpoint of {ROWS[WHOLE].name}: run call1 first, or restore what it packed")
    return accelerator.whole_set(work, place, f"test-{name}", SCHEDULES[name] | {"head_dtype": "bfloat16"})


def rates(this, work):
    """Samples per second of heads in the sampling loop, alone, beside matrix products that take turns with them."""
    seconds, size, found = *((0.02, 256) if this.tiny else (0.5, 8192)), {}
    for label in MEASURED[:2] if this.tiny else MEASURED:
        config = config_from_flags(
            [f"--config={ROWS[label].config}", *(f"--config.{f}" for f in this.run(label).flags)]
        )
        model = models.build(config.model, throughput.IMAGE, throughput.CLASSES)
        head = model.for_certification(model.init(domain_key(0, "init")), config.certify.head_dtype)[1]
        tile = tuple(config.certify.tile)
        loop = measuring.make_sampler(head, model.shapes()[1].shape[1:], tile)
        works = {"samples": measuring.sampling(loop), "noise": measuring.drawing(loop)}
        works["product"] = measuring.matmul("bfloat16", size)
        rate = measuring.rates(works, seconds, label)
        found[label] = {
            "votes": rate["samples"] * math.prod(tile),
            "tile": tile,
            "flops": models.cost(model).head,
            "effective_flops": models.effective_flops(model, tile[0]),
            "noise_share": rate["samples"] / rate["noise"],
            "ceiling": rate["product"] * 2 * size**3,
        }
    return found


def precision(this, work):
    """Section precision of benchmarks.accelerator, which has a folder of its own."""
    flags = ["--sections=precision", f"--minutes={(work.end - time.monotonic()) / 60}", *["--tiny"] * this.tiny]
    work.command("-m", "benchmarks.accelerator", "run", f"--out={this.out / 'precision'}", *flags)
    return {}


FIXED, ANYTIME, STAGED = ({name: functools.partial(whole_set, name=name)} for name in SCHEDULES)
# The most valuable first; `fixed` compiles what the other two schedules use.
PIECES = {"speed": speed, "recipe": recipe} | FIXED | ANYTIME | {"rates": rates} | STAGED | {"precision": precision}


def call2(this):
    """Makes the pieces that have no result yet, one after the other; returns the names of those that failed."""
    failed = []
    for name, make in PIECES.items():
        path, left = this.out / f"second.{name}.json", this.whole.end - time.monotonic()
        if path.exists():
            continue
        if left < FEWEST:
            raise accelerator.Deadline(f"no time is left for {name}; the same command resumes")
        say(name)
        start = time.monotonic()
        try:
            result = make(this, this.work(min(left, math.inf if this.tiny else BUDGETS[name])))
        except Exception as error:  # one piece that fails in any way does not stop the others
            say(f"{name}: {error}")
            failed.append(name)
            continue
        facts = {"machine": accelerator.machine(this.tiny), "seconds": time.monotonic() - start, "result": result}
        write_atomic(path, json.dumps(facts, indent=1) + "\n")
    return failed


def say(text):
    """Prints a line of progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def deliver(out, to):
    """Packs what is worth keeping into files of at most `PART` bytes."""
    names = ("*.json", KEPT, "logs", "certificates", "precision/*.json", "runs/*/metrics.jsonl")
    paths = [path for name in names for path in out.glob(name)]
    place = out / "runs" / ROWS[WHOLE].name
    if steps := [int(path.name) for path in place.glob("checkpoints/*") if path.name.isdigit()]:
        paths += [place / "config.json", place / "checkpoints" / str(max(steps))]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for path in sorted(paths):
            archive.add(path, Path(out.name) / path.relative_to(out))
    to.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, file.tell(), PART)):
        (to / f"{out.name}.tar.gz.{number}").write_bytes(file.getvalue()[start : start + PART])
    say(f"{file.tell() / 2**20:.1f} MiB in {to}")


def plan():
    """What the calls make, and how long they may take."""
    lines = [f"call1, {SECONDS['call1']} s, trained and certified at the same time:"]
    lines += ["\n    ".join([f"  {label}", *ROWS[label].shown()]) for label in SIDE_BY_SIDE]
    lines.append(f"call2, {SECONDS['call2']} s, one after the other, each for at most so many seconds:")
    lines += [f"  {name}: {BUDGETS[name]}" for name in PIECES]
    lines.append("A call saves and packs within some 20 s after that: give the machine 40 s more.")
    return "\n".join(lines)


def parse(arguments):
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("plan", "call1", "call2", "render"))
    parser.add_argument(
        "--out", type=Path, default=accelerator.ROOT / "runs" / "second_round", help="folder of results"
    )
    parser.add_argument("--packed", type=Path, help="file of benchmarks/cifar10_file.py")
    parser.add_argument("--to", type=Path, help="folder for the packed results")
    positive = cli.checked(float, lambda value: 0 < value < math.inf, "a positive number of seconds")
    parser.add_argument("--seconds", type=positive, help="after which a call saves and ends")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    options.seconds = options.seconds or SECONDS.get(options.what)
    return options


def main(arguments):
    """The command; see the module's docstring."""
    options = parse(arguments)
    if options.what in ("plan", "render"):
        print(plan() if options.what == "plan" else markdown(options.out))
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # many processes share the device
    this = Round(options)
    if not this.data.exists():
        if not options.packed or not options.packed.is_file():
            raise UserError("give the packed data: --packed=FILE, which python -m benchmarks.cifar10_file pack makes")
        cifar10_file.unpack(options.packed, this.data)
    try:
        failed = {"call1": call1, "call2": call2}[options.what](this)
    finally:
        if options.to:
            deliver(options.out, options.to)
    print(markdown(options.out))
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; the same command tries again")


if __name__ == "__main__":
    cli.execute(main)
