"""What only an accelerator can tell: precision, throughput, whole test sets, the full CIFAR-10 table.

  python benchmarks/accelerator.py run --out=runs/accelerator --data=$TFDS_DATA_DIR --minutes=8
  python benchmarks/accelerator.py run --out=runs/accelerator --sections=precision,throughput.encoder   # needs no data
  python benchmarks/accelerator.py render --out=runs/accelerator    # Markdown of what is there
  python benchmarks/accelerator.py pack --out=runs/accelerator      # results.tar.gz, to unpack in another clone

Sections are made of pieces, and a piece can be asked for alone. The result of each is a JSON file under --out, and a
piece that is there is not made again: stopped at any moment, the same command goes on. No piece begins after --minutes,
and a training or certification that runs then is asked to save and stop: exit code 75, something is left to do. A
folder holds the results of one kind of device. --tiny makes every piece in seconds, to try the script. Nothing is
downloaded.

Sections, in order of value:
  precision   σ of every family as built and as run under each matmul precision; the float64 encoder against NumPy; what
              the self-check refuses; the distribution of the noise; one model certified here and on the CPU
  throughput  ceilings (matrix products, copies); votes/s of heads, and layer by layer; noise; encoder; training steps
  whole       trains configs/cifar10.py:smoothadv and certifies the 10,000 test images: staged for three radii, staged
              for the radius itself, fixed; wall seconds, certificates
  table       trains and certifies the runs of study "full" (benchmarks/study_runs.py), kept under docs/results/cifar10
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
import kept
import numpy as np
import precision
import studies
import throughput
from accelerator_page import load, named, render
from script import ended
from study_runs import STUDIES

from lsrs_jax.certification import ledger, store
from lsrs_jax.certification.identity import schedule_of
from lsrs_jax.certification.table import read_table
from lsrs_jax.config import load_config
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import write_atomic
from lsrs_jax.runtime.workdir import checkpoints

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("precision", "throughput", "whole", "table")
DEFAULT = "LSRS: SmoothAdv and consistency"  # of the table: the model of section whole
SCHEDULES = {
    "radii": {"schedule": "staged", "radii": (0.25, 0.5, 0.75)},
    "staged": {"schedule": "staged"},
    "fixed": {"schedule": "fixed"},
}
NARROW = "model.widths=(8,8,8,8,12,8,8,8)"  # at tiny size
RESULTS = ROOT / "docs" / "results" / "accelerator"


class Deadline(UserError):
    """The minutes are over; the same command goes on."""

    code = 75


class Work:
    """What pieces need: options, folders, and commands that end at the deadline.

    Args:
      options: of the command line.
    """

    def __init__(self, options):
        self.options, self.tiny = options, options.tiny
        self.end = time.monotonic() + 60 * options.minutes

    def command(self, *words, environment=None, path=None):
        """Runs a command of the package or a script, what it prints going to `path`; returns its wall seconds.

        Raises:
          Deadline: when it was stopped; what it saved stays.
          UserError: with the last line of a command that failed.
        """
        print(" ".join(map(str, words)), file=sys.stderr, flush=True)
        start = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            env=os.environ | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if path else subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(timeout=max(1.0, self.end - time.monotonic()))
        except BaseException as error:  # a signal as well: the command saves, and does not outlive this script
            os.killpg(process.pid, signal.SIGTERM)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise Deadline("stopped at the deadline; the same command goes on") from None
            raise
        if process.returncode:
            lines = (errors or output).strip().splitlines() or [f"ended with code {process.returncode}"]
            raise UserError(lines[-1])
        if path:
            write_atomic(path, output)
        return time.monotonic() - start


def same_counts(work):
    """A model of the digits, trained here, certified here and on the CPU: samples and certificates that differ."""
    place = work.options.out / "runs" / "digits"
    flags = ["--config.train.steps=50", "--config.certify.n=1000", "--config.certify.stop=40"] if work.tiny else []
    work.command("-m", "lsrs_jax.train", "--config=configs/digits.py", f"--workdir={place}", *flags)
    tables = {}
    for name, environment in (("here", {}), ("cpu", {"JAX_PLATFORMS": "cpu"})):
        flag = f"--config.certify.name={name}"
        work.command("-m", "lsrs_jax.certify", f"--workdir={place}", flag, environment=environment)
        tables[name] = read_table(place / "certify" / name / "certificates.tsv")
    counts = {name: _counts(place / "certify" / name) for name in tables}
    here, cpu = tables["here"], tables["cpu"]
    return {
        "images": len(here),
        "votes": int(counts["cpu"].sum()),
        "votes_that_differ": int((counts["cpu"] - counts["here"]).clip(min=0).sum()),
        "predictions_that_differ": int((here.predict != cpu.predict).sum()),
        "largest_difference_of_radii": float(abs(here.radius - cpu.radius).max()),
        "average_certified_radius": {name: table.average_certified_radius for name, table in tables.items()},
    }


def _counts(folder):
    """Samples ``(images, streams, classes)`` in the ledger of a folder of certificates."""
    stored = store.read_folder(folder, "to be compared")
    images = ledger.read(folder, schedule_of(stored.settings), stored.identity.classes).images
    return np.array([list(images[i].counts.values()) for i in sorted(images)])


def train(work, run):
    """Trains a `study_runs.Run` to its end, from where an earlier session stopped; returns its workdir."""
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
    """A run of study "full", kept; at tiny size nothing is kept of it."""
    place = train(work, run)
    seconds = work.command("-m", *run.commands(place)[1])
    if not work.tiny:
        kept.keep(place, studies.folder("full") / run.name, studies.shown(run))
    return {"certification_seconds": seconds}


def whole(work, schedule, dtype):
    """Wall seconds from the checkpoint of the model to the finished table of all test images."""
    place = train(work, STUDIES["full"].rows[DEFAULT])
    name = f"test-{schedule}-{dtype}"
    flags = SCHEDULES[schedule] | {"name": name, "head_dtype": dtype, "step": 500 if work.tiny else 1}
    flags = [f"--config.certify.{field}={value}" for field, value in flags.items()]
    words = ["-m", "lsrs_jax.certify", f"--workdir={place}", "--config.data.split=test", *flags]
    seconds = work.command(*words)
    source, target = place / "certify" / name, work.options.out / "certificates"
    found = read_table(source / "certificates.tsv")
    stored = (source / "certificates.json").read_text()
    record = json.loads(stored)["record"]
    target.mkdir(exist_ok=True)
    write_atomic(target / f"{name}.json", stored)
    with gzip.open(target / f"{name}.tsv.gz", "wb") as packed:
        packed.write((source / "certificates.tsv").read_bytes())
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
    path = work.options.out / "orthogonal.md"
    pairs = "8x8" if work.tiny else "64x32"
    work.command("benchmarks/orthogonal.py", f"--pairs={pairs}", "--repeats=3", path=path)
    return {"markdown": path.read_text()}


def pieces(work):
    """Section → name of a piece → function without arguments."""
    tiny = work.tiny
    seconds, tile, size = (0.02, (4, 4), 256) if tiny else (0.4, None, 8192)
    few = ("--config.data.batch_size=8",) if tiny else ()
    narrow = (*few, f"--config.{NARROW}") if tiny else ()
    variants = dict.fromkeys(("lsrs", "gaussian", "smoothadv", "free"), narrow)
    variants |= dict.fromkeys(("lsrs_resnet", "isometric_resnet", "isrs_resnet"), few)
    part = functools.partial
    found = {
        "precision": {
            **{f"kernels-{flag}": part(precision.kernels, flag) for flag in precision.FLAGS},
            **{f"encoder-{flag}": part(precision.encoder, flag) for flag in precision.FLAGS},
            "noise": part(precision.noise, 2**20 if tiny else 2**30),
            "same-votes": part(same_counts, work),
        },
        "throughput": {
            "ceilings": part(throughput.ceilings, size, seconds),
            "noise": part(throughput.noise, throughput.DTYPES[-1], tile, seconds),
        },
        "whole": {
            f"{schedule}-{dtype}": part(whole, work, schedule, dtype)
            for dtype in ("bfloat16", "float32")
            for schedule in SCHEDULES
        },
        "table": {
            run.name: part(table, work, run) for run in list(STUDIES["full"].rows.values())[: 1 if tiny else None]
        },
    }
    for dtype in reversed(throughput.DTYPES):
        for name in throughput.heads():
            label = re.sub("[/: ]", "-", name)
            found["throughput"][f"votes-{label}-{dtype}"] = part(throughput.sampling, name, dtype, tile, size, seconds)
        rows = math.prod(tile or throughput.TILE)
        found["throughput"][f"layers-{dtype}"] = part(throughput.layers, dtype, rows, seconds / 4)
    found["throughput"] |= {
        "encoder": part(throughput.encoder, 16 if tiny else 1024, seconds),
        "train-steps": part(throughput.train_steps, variants, 2 if tiny else 30),
        "profile": part(throughput.profile, {name: variants[name] for name in ("free", "smoothadv")}, 2 if tiny else 5),
        "families": part(families, work),
        "bookkeeping": part(throughput.bookkeeping, 64 if tiny else 10_000),
    }
    return found


def machine(tiny):
    """What results belong to."""
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    device = jax.local_devices()[0]
    return {
        "device": device.device_kind,
        "backend": jax.default_backend(),
        "versions": versions,
        "day": str(datetime.date.today()),
    } | ({"tiny": True} if tiny else {})


def run(options):
    """Makes the pieces that are missing; returns the names of those that failed."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into --out={options.out} ({error.strerror}): choose another folder") from error
    for other in load(options.out)[1]:
        if any(other.get(fact) != machine(options.tiny).get(fact) for fact in ("device", "tiny")):
            raise UserError(f"{options.out} holds results of {named(other)}: take another --out")
    work, failed = Work(options), []
    found = pieces(work)
    chosen = [section.partition(".") for section in options.sections]
    for section, dot, only in chosen:
        if dot and only not in found[section]:
            raise UserError(f"section {section} has no piece {only!r}: {', '.join(found[section])}")
    for section, dot, only in chosen:
        for name, make in found[section].items():
            if dot and name != only:
                continue
            path = options.out / f"{section}.{name}.json"
            if path.exists():
                continue
            if time.monotonic() > work.end:
                raise Deadline("the minutes are over; the same command goes on")
            print(f"{section}: {name}", file=sys.stderr, flush=True)
            start = time.monotonic()
            try:
                result = make()
            except Deadline:
                raise
            except Exception as error:  # whatever it is, the other pieces go on
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    """One archive of what is small: results and certificates, the runs of the table, at their places in a clone."""
    found, machines = load(options.out)
    if not found or any(facts.get("tiny") for facts in machines):
        raise UserError(f"{options.out} holds no results to be kept: run, without --tiny, makes them")
    for other in load(RESULTS)[1]:
        if other["device"] != machines[0]["device"]:
            raise UserError(
                f"{RESULTS} holds results of {other['device']}: move them before those of another device come"
            )
    paths = [*options.out.glob("*.*.json"), *options.out.glob("certificates/*")]
    files = {path: RESULTS / path.relative_to(options.out) for path in sorted(paths)}
    files |= {
        path: path for name in sorted(found["table"]) for path in sorted((studies.folder("full") / name).iterdir())
    }
    with tarfile.open(options.out / "results.tar.gz", "w:gz") as archive:
        for path, place in files.items():
            archive.add(path, place.relative_to(ROOT))
    print(f"{len(files)} files in {options.out / 'results.tar.gz'}")


def main(arguments):
    """The command; see the module's docstring."""
    options = parse(arguments)
    # Training and certification are processes of their own beside this one.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if options.data:
        os.environ["TFDS_DATA_DIR"] = str(options.data.resolve())
    if options.what != "run":
        {"render": render, "pack": pack}[options.what](options)
        return
    failed = run(options)
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; the same command tries again")


if __name__ == "__main__":
    ended(main, sys.argv[1:])
