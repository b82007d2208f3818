"""Measures precision, throughput, whole test sets and the full CIFAR-10 table on the device of this machine.

  python -m benchmarks.accelerator run --out=runs/accelerator --data=$TFDS_DATA_DIR --minutes=8
  python -m benchmarks.accelerator run --out=runs/accelerator --sections=precision,throughput.encoder   # needs no data
  python -m benchmarks.accelerator render --out=runs/accelerator    # prints the results as Markdown
  python -m benchmarks.accelerator pack --out=runs/accelerator      # results.tar.gz, to unpack in another clone

A section consists of pieces; --sections=SECTION.PIECE runs one piece. Each piece writes its result to a JSON file in
--out, and a piece that has a file is not run again, so after an interruption the same command resumes. No piece starts
after --minutes. A training or certification that still runs then is told to save and stop; the exit code is then 75.
All results in a folder are from one kind of device. --tiny makes every piece run in seconds, to try the script.

Sections, the most valuable first:
  precision   singular values of every family under each matmul precision; the float64 encoder and the noise against
              NumPy; one model certified on this device and on the CPU
  throughput  ceilings (matrix products, copies); samples/s of heads and of their layers; noise; encoder; training
  whole       trains configs/cifar10.py:smoothadv and certifies the 10,000 test images: staged for three radii, staged
              for the radius itself, fixed
  table       trains and certifies the runs of study "full" (studies/runs.py) and keeps them in docs/results/cifar10
"""

import argparse
import datetime
import functools
import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from importlib import metadata
from pathlib import Path

import jax
import numpy as np

from benchmarks import precision, throughput
from lsrs_jax import cli
from lsrs_jax.certification import ledger, store
from lsrs_jax.certification.identity import schedule_of
from lsrs_jax.certification.table import read_table
from lsrs_jax.config import load_config
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import write_atomic
from lsrs_jax.runtime.workdir import checkpoints
from studies import render, results
from studies.accelerator import device_name, load, markdown
from studies.runs import STUDIES

ROOT = render.ROOT
SECTIONS = ("precision", "throughput", "whole", "table")
DEFAULT = "LSRS: SmoothAdv and consistency"  # row of study "full": the model of section whole
SCHEDULES = {
    "radii": {"schedule": "staged", "radii": (0.25, 0.5, 0.75)},
    "staged": {"schedule": "staged"},
    "fixed": {"schedule": "fixed"},
}
NARROW = "model.widths=(8,8,8,8,12,8,8,8)"  # at tiny size
RESULTS = ROOT / "docs" / "results" / "accelerator"


class Deadline(UserError):
    """The minutes are over; the same command resumes."""

    code = 75


class Work:
    """Options of the command line, and commands that are stopped at the deadline."""

    def __init__(self, options):
        self.options, self.tiny = options, options.tiny
        self.end = time.monotonic() + 60 * options.minutes

    def command(self, *words, environment=None, path=None):
        """Runs a command of the package or a script and returns its wall seconds; its output goes to `path`.

        Raises:
          Deadline: when it was stopped; what it saved stays.
          UserError: with the last line of a command that failed.
        """
        print(" ".join(map(str, words)), file=sys.stderr, flush=True)
        start, pipe = time.monotonic(), subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            env=os.environ | (environment or {}),
            stdout=pipe,
            stderr=pipe if path else subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = self._ended(process)
        except BaseException as error:  # after a signal too, the command saves and ends before this script does
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise Deadline("stopped at the deadline; the same command resumes") from None
            raise
        if process.returncode:
            lines = (errors or output).strip().splitlines() or [f"ended with code {process.returncode}"]
            raise UserError(lines[-1])
        if path:
            write_atomic(path, output)
        return time.monotonic() - start

    def _ended(self, process):
        """The output of a process; raises TimeoutExpired at the deadline, which another thread may bring forward."""
        while True:
            try:
                return process.communicate(timeout=1.0)
            except subprocess.TimeoutExpired:
                if time.monotonic() > self.end:
                    raise


def same_counts(work):
    """Trains a model of the digits, certifies it on this device and on the CPU, and compares the certificates."""
    place = work.options.out / "runs" / "digits"
    flags = ["--config.train.steps=50", "--config.certify.n=1000", "--config.certify.stop=40"] if work.tiny else []
    work.command("-m", "lsrs_jax.train", "--config=configs/digits.py", f"--workdir={place}", *flags)
    tables, counts = {}, {}
    for name, environment in (("here", {}), ("cpu", {"JAX_PLATFORMS": "cpu"})):
        flag, folder = f"--config.certify.name={name}", place / "certify" / name
        work.command("-m", "lsrs_jax.certify", f"--workdir={place}", flag, environment=environment)
        stored = store.read_folder(folder, "to be compared")
        images = ledger.read(folder, schedule_of(stored.settings), stored.identity.classes, stored.identity.run).images
        counts[name] = np.array([list(images[i].counts.values()) for i in sorted(images)])
        tables[name] = read_table(folder / "certificates.tsv")
    here, cpu = tables["here"], tables["cpu"]
    return {
        "images": len(here),
        "votes": int(counts["cpu"].sum()),
        "votes_that_differ": int((counts["cpu"] - counts["here"]).clip(min=0).sum()),
        "predictions_that_differ": int((here.predict != cpu.predict).sum()),
        "largest_difference_of_radii": float(abs(here.radius - cpu.radius).max()),
        "average_certified_radius": {name: table.average_certified_radius for name, table in tables.items()},
    }


def train(work, run):
    """Trains a `studies.runs.Run` to its end, resuming an earlier session; returns its workdir."""
    place = work.options.out / "runs" / run.name
    command, _ = run.commands(place)
    if work.tiny:
        small = ("train.steps=2", "train.warmup_steps=1", "data.batch_size=8", "certify.n=200", "certify.step=500")
        small += (NARROW, "certify.tile=(4,8)", "data.split=test")
        command += [f"--config.{flag}" for flag in small]
    config = place / "config.json"
    done = config.exists() and checkpoints(place) / str(load_config(config).train.steps)
    if not (done and done.is_dir()):
        work.command("-m", *command)
    return place


def table(work, run):
    """Makes a run of study "full" and keeps it; at tiny size nothing is kept."""
    place = train(work, run)
    seconds = work.command("-m", *run.commands(place)[1])
    if not work.tiny:
        results.keep(place, render.folder("full") / run.name, run.shown())
    return {"certification_seconds": seconds}


def whole(work, schedule, dtype):
    """Wall seconds from the checkpoint of the model to the finished table of all test images."""
    place = train(work, STUDIES["full"].rows[DEFAULT])
    return whole_set(work, place, f"test-{schedule}-{dtype}", SCHEDULES[schedule] | {"head_dtype": dtype})


def whole_set(work, place, name, flags):
    """The same for the checkpoint in a workdir, and fields of the section ``certify``."""
    flags = flags | {"name": name, "step": 500 if work.tiny else 1}
    flags = [f"--config.certify.{field}={value}" for field, value in flags.items()]
    seconds = work.command("-m", "lsrs_jax.certify", f"--workdir={place}", "--config.data.split=test", *flags)
    source, target = place / "certify" / name, work.options.out / "certificates"
    found, stored = read_table(source / "certificates.tsv"), (source / "certificates.json").read_text()
    record = json.loads(stored)["record"]
    write_atomic(target / f"{name}.json", stored)
    write_atomic(target / f"{name}.tsv.gz", gzip.compress((source / "certificates.tsv").read_bytes()))
    return {
        "images": len(found),
        "command_seconds": seconds if len(record) == 1 else None,  # of the last session
        "loop_seconds": sum(session["seconds"] for session in record),
        "sessions": len(record),
        "votes": int(found.samples.sum()),
        "average_certified_radius": found.average_certified_radius,
    }


def families(work):
    """The table of benchmarks/orthogonal.py."""
    path, pairs = work.options.out / "orthogonal.md", "8x8" if work.tiny else "64x32"
    work.command("-m", "benchmarks.orthogonal", f"--pairs={pairs}", "--repeats=3", path=path)
    return {"markdown": path.read_text()}


def pieces(work):
    """Section → name of a piece → function without arguments."""
    tiny, part, runs = work.tiny, functools.partial, STUDIES["full"].rows.values()
    seconds, tile, size = (0.02, (4, 4), 256) if tiny else (0.4, None, 8192)
    few = ("--config.data.batch_size=8",) if tiny else ()
    variants = dict.fromkeys(("lsrs_resnet", "isometric_resnet", "isrs_resnet"), few)
    narrow = (*few, f"--config.{NARROW}") if tiny else ()
    variants |= dict.fromkeys(("lsrs", "gaussian", "smoothadv", "free"), narrow)
    speed = {
        "ceilings": part(throughput.ceilings, size, seconds),
        "noise": part(throughput.noise, throughput.DTYPES[-1], tile, seconds),
    }
    for dtype in reversed(throughput.DTYPES):
        for name in throughput.heads():
            label = re.sub("[/: ]", "-", name)
            speed[f"votes-{label}-{dtype}"] = part(throughput.sampling, name, dtype, tile, size, seconds)
        rows = math.prod(tile or throughput.TILE)
        speed[f"layers-{dtype}"] = part(throughput.layers, dtype, rows, seconds / 4)
    speed["encoder"] = part(throughput.encoder, 16 if tiny else 1024, seconds)
    speed["train-steps"] = part(throughput.train_steps, variants, 2 if tiny else 30)
    speed["families"] = part(families, work)
    speed["bookkeeping"] = part(throughput.bookkeeping, 64 if tiny else 10_000)
    exact = {f"kernels-{flag}": part(precision.kernels, flag) for flag in precision.FLAGS}
    exact |= {f"encoder-{flag}": part(precision.encoder, flag) for flag in precision.FLAGS}
    exact |= {"noise": part(precision.noise, 2**20 if tiny else 2**30), "same-votes": part(same_counts, work)}
    sets = [(schedule, dtype) for dtype in ("bfloat16", "float32") for schedule in SCHEDULES]
    return {
        "precision": exact,
        "throughput": speed,
        "whole": {f"{schedule}-{dtype}": part(whole, work, schedule, dtype) for schedule, dtype in sets},
        "table": {run.name: part(table, work, run) for run in list(runs)[: 1 if tiny else None]},
    }


def machine(tiny):
    """The machine to which results belong."""
    device = jax.local_devices()[0]
    return {
        "device": device.device_kind,
        "backend": jax.default_backend(),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "day": str(datetime.date.today()),
    } | ({"tiny": True} if tiny else {})


def run(options):
    """Runs the pieces that have no result yet; returns the names of those that failed."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into --out={options.out} ({error.strerror}): choose another folder") from error
    for other in load(options.out)[1]:
        if any(other.get(fact) != machine(options.tiny).get(fact) for fact in ("device", "tiny")):
            raise UserError(f"{options.out} holds results of {device_name(other)}: choose another --out")
    work, failed = Work(options), []
    found, chosen = pieces(work), [section.partition(".") for section in options.sections]
    for section, dot, only in chosen:
        if dot and only not in found[section]:
            raise UserError(f"section {section} has no piece {only!r}: {', '.join(found[section])}")
    for section, dot, only in chosen:
        for name, make in found[section].items():
            path = options.out / f"{section}.{name}.json"
            if (dot and name != only) or path.exists():
                continue
            if time.monotonic() > work.end:
                raise Deadline("the minutes are over; the same command resumes")
            print(f"{section}: {name}", file=sys.stderr, flush=True)
            start = time.monotonic()
            try:
                result = make()
            except Deadline:
                raise
            except Exception as error:  # one piece that fails in any way does not stop the others
                line = (str(error).strip().splitlines() or [type(error).__name__])[0]
                print(f"{section}: {name}: {line}", file=sys.stderr, flush=True)
                failed.append(f"{section}.{name}")
                continue
            took = round(time.monotonic() - start, 2)
            facts = {"machine": machine(work.tiny), "seconds": took, "result": result}
            write_atomic(path, json.dumps(facts, indent=1) + "\n")
    return failed


def parse(arguments):
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("run", "render", "pack"))
    parser.add_argument("--out", type=Path, required=True, help="folder of results and workdirs")
    parser.add_argument("--data", type=Path, help="folder of tensorflow-datasets; $TFDS_DATA_DIR where left out")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="SECTION or SECTION.PIECE, separated by commas")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    options.out, options.sections = options.out.resolve(), options.sections.split(",")
    unknown = {section.partition(".")[0] for section in options.sections} - set(SECTIONS)
    if unknown:
        parser.error(f"no section {sorted(unknown)[0]!r}: choose among {', '.join(SECTIONS)}")
    if not options.minutes < math.inf:
        parser.error(f"--minutes must be a number, got {options.minutes}")
    if options.data and not options.data.is_dir():
        parser.error(f"--data={options.data} is no folder")
    return options


def pack(options):
    """Writes results, certificates and the runs of the table to one archive, at their paths in a clone."""
    found, machines = load(options.out)
    if not found or any(facts.get("tiny") for facts in machines):
        raise UserError(f"{options.out} holds no results to be kept: run, without --tiny, makes them")
    for other in load(RESULTS)[1]:
        if other["device"] != machines[0]["device"]:
            raise UserError(f"{RESULTS} holds results of {other['device']}: move them away before you add others")
    paths = sorted([*options.out.glob("*.*.json"), *options.out.glob("certificates/*")])
    files = {path: RESULTS / path.relative_to(options.out) for path in paths}
    files |= {path: path for name in found["table"] for path in sorted((render.folder("full") / name).iterdir())}
    with tarfile.open(options.out / "results.tar.gz", "w:gz") as archive:
        for path, place in files.items():
            archive.add(path, place.relative_to(ROOT))
    print(f"{len(files)} files in {options.out / 'results.tar.gz'}")


def main(arguments):
    """The command; see the module's docstring."""
    options = parse(arguments)
    # Trainings and certifications run as processes of their own on the same device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if options.data:
        os.environ["TFDS_DATA_DIR"] = str(options.data.resolve())
    if options.what == "render":
        print(markdown(options.out, [section.partition(".")[0] for section in options.sections]))
    elif options.what == "pack":
        pack(options)
    elif failed := run(options):
        raise UserError(f"failed: {', '.join(failed)}; the same command tries again")


if __name__ == "__main__":
    cli.execute(main)
