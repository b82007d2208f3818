"""Certify a trained classifier.

  python -m lsrs_jax.certify --workdir=runs/digits
  python -m lsrs_jax.certify --workdir=runs/digits --config.certify.n=100000 --config.certify.name=full
  python -m lsrs_jax.certify --workdir=runs/digits --verify
  python -m lsrs_jax.certify --workdir=runs/x --config.certify.certificate=deterministic --config.certify.name=margin

The configuration comes from the workdir; flags override it. The command writes the ledgers, certificates.tsv and
certificates.json into <workdir>/certify/<name>. The same command resumes an interrupted certification, on any number of
devices and processes (docs/scale.md). With --from-counts it derives new certificates from the counts on disk, with
another alpha or bound, without the model or the data. With --verify it derives every radius again, compares digests,
and names the first line that differs; exit code 0 means that all is intact, 2 that something is wrong, 3 that nothing
wrong was found but images are missing or something could not be checked, as the verdict says. With --recast=N it does
the same, and then samples N images again from their pixels; it chooses them at random each time. With --json both print
the verdict as JSON. With --shard=i/N, processes that know nothing of each other certify one part each, on other
machines or at other times; the command merge joins the parts. Deterministic certificates take no samples: they are the
margins of a linear head (model.head linear, normalized or orthogonal). The smoothed certification of such a head also
writes them, into <workdir>/certify/<name>-margin.
"""

if __name__ == "__main__":
    from lsrs_jax.cli import main

    main("certify")

import argparse
import contextlib
import json
import sys
from pathlib import Path

from lsrs_jax import cli, models
from lsrs_jax.certification import deterministic, fallback, from_counts, shards, smoothed, store, verify
from lsrs_jax.certification.target import load_target, target_of_certificates
from lsrs_jax.config import load_config
from lsrs_jax.flags import config_from_flags, config_of_training, given
from lsrs_jax.models.custom import allowing
from lsrs_jax.runtime import profiling
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.processes import Process, cache_compilations, started
from lsrs_jax.runtime.progress import print_now
from lsrs_jax.runtime.rng import pinned
from lsrs_jax.runtime.signals import reading
from lsrs_jax.runtime.types import Config
from lsrs_jax.runtime.workdir import Workdir, opened


def run(arguments: list[str]) -> None:
    """The command; see the module's docstring."""
    fields = ("name", "n", "n0", "alpha", "bound", "schedule", "radii", "start", "stop", "step", "tile", "checkpoint")
    usage = "--workdir=DIR [--verify | --recast=N | --from-counts] [--json] [--config.FIELD=VALUE ...]"
    parser = cli.parser("certify", __doc__, [f"certify.{name}" for name in fields], usage)
    parser.add_argument("--workdir", required=True, type=cli.workdir, help="folder of a training, or gs://...")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--from-counts", action="store_true", help="derive from the counts on disk; sample nothing")
    instead.add_argument("--verify", action="store_true", help="derive every radius again and compare; change nothing")
    number = cli.checked(int, lambda images: images >= 1, "a number of images, at least 1")
    instead.add_argument("--recast", type=number, metavar="N", help="do --verify, then sample N images again")
    cli.add_profile(instead)
    cli.add_allow_code(parser)
    shard = cli.checked(shards.shard_of, lambda _: True, "i/N with 0 <= i < N, as in 0/8")
    parser.add_argument("--shard", type=shard, metavar="i/N", help="certify part i of N parts; merge joins them")
    parser.add_argument("--json", action="store_true", help="print the verdict of --verify or --recast as JSON")
    try:
        options, rest = parser.parse_known_args(arguments)
        if options.allow_code and (options.verify or options.from_counts):
            raise UserError("--verify and --from-counts import no code: leave --allow-code out")
        allowed = allowing(options.allow_code)
        with started() as process, pinned(), allowed, opened(options.workdir) as workdir:
            _run(workdir, process, options, rest)
    except (UserError, OSError) as error:
        if "--json" in arguments:
            print(json.dumps({"verdict": "refused", "reason": str(error)}))
        raise


def _read(folder: Path, data_dir: str, fallback_dir: str, options: argparse.Namespace) -> None:
    """``--verify`` and ``--recast``; exits with 3 if something could not be checked."""
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        stored, verdict = verify.run(folder, None if options.recast else data_dir)
        if options.recast:
            from lsrs_jax.certification import resample  # it imports scipy.stats, which takes a second

            cache_compilations()
            target = target_of_certificates(folder, stored, data_dir)
            target.config.certify.fallback = fallback_dir or target.config.certify.fallback
            resample.run(target, stored, options.recast, verdict)
    print(json.dumps(verdict.to_dict()) if options.json else verdict)
    if not verdict.complete:
        sys.exit(3)


def _check_shard(process: Process, options: argparse.Namespace, config: Config) -> None:
    if options.verify or options.recast or options.from_counts:
        raise UserError("--shard is for sampling: merge joins the shards first")
    if config.certify.certificate != "smoothed":
        raise UserError("--shard divides samples, and deterministic certificates take none: leave it out")
    if process.count > 1:
        raise UserError("a shard is certified by one process: leave --shard out, or set JAX_DISTRIBUTED=off")


def _run(workdir: Workdir, process: Process, options: argparse.Namespace, rest: list[str]) -> None:
    reader = "--recast" if options.recast else "--verify" if options.verify else ""
    if options.json and not reader:
        raise UserError("--json is for --verify and --recast")
    config = config_of_training(workdir.path, rest, reader, ("certify.name", "data.dir", "certify.fallback"))
    folder, shard = workdir.path / "certify" / config.certify.name, options.shard
    if shard:
        _check_shard(process, options, config)
        folder = shard.folder(workdir.path, config.certify.name)
    if (reader or options.from_counts) and process.count > 1:
        remedy = "start it alone, or with JAX_DISTRIBUTED=off"
        raise UserError(f"--from-counts, --verify and --recast are for one process; {remedy}")
    if reader:
        with reading():
            _read(folder, given(rest, config, "data.dir"), given(rest, config, "certify.fallback"), options)
        return
    path = folder / "certificates.json"
    if path.exists():
        base = chosen = store.require_sealed(path).settings
        if not options.from_counts:
            # A resumed run keeps how its certificates were last derived: alpha, bound, radii and epsilon.
            base = load_config(workdir.path / "config.json")
            for name in (*smoothed.DERIVED, "seed"):
                if (kept := chosen.certify[name]) != base.certify[name]:
                    base.certify[name] = kept
                    derived = f"{folder} was derived with {name} {kept}"
                    print(f"{derived}, which holds unless --config.certify.{name} is given")
        config = config_from_flags(rest, base)
    if options.from_counts:
        from_counts.derive(folder, config)
        return
    cache_compilations()
    with process.together("the start"):
        fallback.check_settings(config)
        target = load_target(workdir.path, config)
        if shard:
            target = shards.part_of(target, shard, folder)
    certify = config.certify
    free = certify.integer_first_layer and (certify.arithmetic, certify.noise) == ("sound", "shared")
    print(models.describe(target.model, certify.tile[0] if free else 0))
    if config.certify.certificate == "smoothed":
        trained = load_config(workdir.path / "config.json")
        if process.leads and trained.sigma != config.sigma and trained.train.loss != "margin":  # trained without noise
            less = f"this is sound, but a training with sigma {config.sigma} usually certifies more"
            print(f"note: trained with sigma {trained.sigma}, certified with sigma {config.sigma}: {less}", flush=True)
        profile = options.profile if process.leads else None
        with profiling.captured(profile, workdir.path / "profile") as tick:
            smoothed.run(target, process, workdir, print_now, tick, {"shard": str(shard)} if shard else None)
        if shard or not hasattr(target.model.head, "matrix"):
            return
    if process.leads and config.certify.certificate == "smoothed":
        print(deterministic.beside(target))
    elif process.leads:
        table = deterministic.run(target)
        print(f"{deterministic.summary(target, table)}\n{folder / 'certificates.tsv'}")
    process.wait("the deterministic certificates")
