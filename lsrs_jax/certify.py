"""Certify a trained classifier.

  python -m lsrs_jax.certify --workdir=runs/digits
  python -m lsrs_jax.certify --workdir=runs/digits --config.certify.n=100000 --config.certify.name=full

The configuration comes from the workdir; flags override it. Writes the vote ledger, certificates.tsv and
certificates.json into <workdir>/certify/<name>. The same command resumes an interrupted certification, on any number
of devices; with another alpha it derives new certificates from the votes on disk.
"""

import collections
import dataclasses
import datetime
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lsrs_jax
from lsrs_jax import checkpoint, command, models
from lsrs_jax import config as configuration
from lsrs_jax import data as datasets
from lsrs_jax.errors import UserError
from lsrs_jax.files import write_atomic
from lsrs_jax.keys import IMPLEMENTATION, domain_key, pinned
from lsrs_jax.materialize import Float64Encoder
from lsrs_jax.progress import Progress, duration
from lsrs_jax.smoothing.certificates import from_counts
from lsrs_jax.smoothing.ledger import Ledger, Row
from lsrs_jax.smoothing.radius import float32_slack
from lsrs_jax.smoothing.table import format_table
from lsrs_jax.smoothing.votes import Votes, chunks

_SECONDS_PER_LAUNCH = 2.0  # how much work a kill may lose, and how often progress shows
_SECONDS_PER_DERIVATION = 60.0


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is certified, and where it is written."""

    config: Any
    folder: Path
    dataset: datasets.Dataset
    identity: dict
    report: Any

    @property
    def votes(self):
        return {"selection": self.config.certify.n0, "estimation": self.config.certify.n}


def _identity(config, dataset, meta, model):
    """What makes two sets of votes comparable; a resume that differs in any of it is refused."""
    certify = config.certify
    return {
        "checkpoint": {"step": meta["step"], "digest": meta["digest"]},
        "data": {"name": dataset.name, "version": dataset.version, "split": dataset.split},
        "model": configuration.to_dict(config.model) | {"input_shape": list(model.input_shape)},
        "sigma": config.sigma,
        "seed": config.seed,
        "n0": certify.n0,
        "n": certify.n,
        "tile": list(certify.tile),
        "prng": IMPLEMENTATION,
        "arithmetic": "float32",
        "platform": jax.default_backend(),
    }


def _read_json(path):
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text())
        if not isinstance(stored["identity"], dict) or not isinstance(stored["record"], list):
            raise TypeError("identity or record is missing")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or use another --config.certify.name") from error
    return stored


def _check_identity(stored, identity, path):
    difference = configuration.first_difference(stored["identity"], identity)
    if difference:
        name, old, new = difference
        raise UserError(
            f"{path.parent} holds votes of another run: {name} was {old!r} and is now {new!r}; use another "
            "--config.certify.name, or the old value to resume"
        )


def _record(devices, start, settled):
    return {
        "started": start,
        "seconds": None,
        "images": settled,
        "devices": f"{devices} x {jax.local_devices()[0].device_kind}",
        "host": platform.machine(),
        "versions": {
            "lsrs_jax": lsrs_jax.__version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def derive(plan, ledger, record):
    """Writes certificates.tsv and certificates.json from the ledger; returns the certificates of complete images."""
    tallies = ledger.completed()
    lipschitz = plan.report.constant
    certificates = None
    if tallies:
        certificates = from_counts(
            np.stack([tally.counts["selection"] for tally in tallies]),
            np.stack([tally.counts["estimation"] for tally in tallies]),
            sigma=plan.config.sigma,
            alpha=plan.config.certify.alpha,
            lipschitz=lipschitz,
            slack=np.array([tally.slack for tally in tallies]),
        )
        write_atomic(plan.folder / "certificates.tsv", format_table(tallies, certificates, lipschitz))
    _write_json(plan, record)
    return tallies, certificates


def _write_json(plan, record):
    content = {
        "identity": plan.identity,
        "derivation": {"alpha": plan.config.certify.alpha, "bound": "binary"},
        "lipschitz": plan.report.to_dict(),
        "record": record,
    }
    write_atomic(plan.folder / "certificates.json", json.dumps(content, indent=2) + "\n")


class _Sampler:
    """Brings the votes of images up to the plan, a tile at a time, and writes them to the ledger."""

    def __init__(self, plan, ledger, votes, encode):
        self._plan, self._ledger, self._votes, self._encode = plan, ledger, votes, encode
        self._samples = votes.tile[1]
        self._chunks_per_launch = 1

    def tiles(self, indices):
        """Images with equal progress, grouped into tiles; after a kill these may be different groups."""
        groups = collections.defaultdict(list)
        for idx in indices:
            if not self._ledger.complete(idx):
                groups[self._ledger.next_chunks(idx)].append(idx)
        size = self._votes.tile[0]
        for done in sorted(groups, reverse=True):
            members = groups[done]
            for start in range(0, len(members), size):
                yield done, members[start : start + size]

    def run(self, done, tile, progress):
        """Samples one tile to its end; `progress(votes)` is told of votes as they reach the disk."""
        clock = time.monotonic()
        dataset = self._plan.dataset
        latents = self._encode(dataset.pixels(tile, np.float64))
        # An image's charge is fixed by its first row: another machine's encoder may differ in the last place.
        slack = [
            self._ledger.tallies[idx].slack if idx in self._ledger.tallies else float(charge)
            for idx, charge in zip(tile, float32_slack(latents, self._plan.config.sigma), strict=True)
        ]
        on_device = self._votes.put(latents)
        for (purpose, total), first in zip(self._plan.votes.items(), done, strict=True):
            end = chunks(total, self._samples)
            while first < end:
                stop = min(first + self._chunks_per_launch, end)
                launched = time.monotonic()
                counts = self._votes.launch(on_device, purpose, first, stop, total)
                counts = self._votes.collect(counts, len(tile))
                now = time.monotonic()
                seconds, clock = (now - clock) / len(tile), now
                self._ledger.append(
                    [
                        Row(idx, int(dataset.labels[idx]), slack[i], purpose, first, stop, counts[i], seconds)
                        for i, idx in enumerate(tile)
                    ]
                )
                progress(int(counts.sum()))
                self._adapt(stop - first, now - launched)
                first = stop

    def _adapt(self, done, seconds):
        """Doubles or halves the chunks per launch towards `_SECONDS_PER_LAUNCH`; counts do not depend on it."""
        if seconds < _SECONDS_PER_LAUNCH / 2 and done == self._chunks_per_launch:
            self._chunks_per_launch *= 2
        elif seconds > 2 * _SECONDS_PER_LAUNCH:
            self._chunks_per_launch = max(1, self._chunks_per_launch // 2)


def run(arguments):
    """The command; see the module's docstring."""
    parser = command.parser("certify", __doc__)
    parser.add_argument("--workdir", required=True, type=Path, help="folder of a training")
    options, rest = parser.parse_known_args(arguments)
    stored_config = options.workdir / "config.json"
    if not stored_config.exists():
        raise UserError(
            f"{options.workdir} holds no training: run python -m lsrs_jax.train --workdir={options.workdir} ..."
        )
    config = command.config_from_flags(rest, configuration.load(stored_config))
    certify = config.certify
    dataset = datasets.load(config.data.name, config.data.split, config.data.dir)
    indices = range(certify.start, min(certify.stop or math.inf, len(dataset)), certify.step)
    if not len(indices):
        raise UserError(f"no image to certify: certify.start={certify.start} in a split of {len(dataset)}")

    model = models.build(config.model, dataset.shape, dataset.num_classes)
    with pinned():
        target = jax.eval_shape(model.init, domain_key(0, "init"))
    params, meta = checkpoint.restore_model(options.workdir, target)
    encoder, head = model.for_certification(params)
    folder = options.workdir / "certify" / certify.name
    plan = _Plan(config, folder, dataset, _identity(config, dataset, meta, model), encoder.report)

    path = folder / "certificates.json"
    stored = _read_json(path)
    if stored:
        _check_identity(stored, plan.identity, path)
    with Ledger(folder / "votes.0.tsv", plan.votes, certify.tile[1], dataset.num_classes) as ledger:
        if ledger.tallies and not stored:
            raise UserError(
                f"{folder} holds votes but no {path.name}; restore it, or use another --config.certify.name"
            )
        record = list(stored["record"]) if stored else []
        pending = [idx for idx in indices if not ledger.complete(idx)]
        print(encoder.report)
        print(
            f"{dataset.name} {dataset.split}: {len(indices):,} images, {len(indices) - len(pending):,} of them done; "
            f"sigma {config.sigma}, n0 {certify.n0}, n {certify.n:,}, alpha {certify.alpha}; "
            f"{jax.local_device_count()} x {jax.default_backend()}",
            flush=True,
        )
        if pending:
            record.append(_record(jax.local_device_count(), _now(), len(pending)))
            _write_json(plan, record)
            _sample(plan, ledger, encoder, head, model, pending, record)
        tallies, certificates = derive(plan, ledger, record)
    _print_summary(plan, tallies, certificates)


def _now():
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _sample(plan, ledger, encoder, head, model, pending, record):
    config, start = plan.config, time.monotonic()
    votes = Votes(
        head,
        encoder.report.output_shape,
        sigma=config.sigma,
        key=domain_key(config.seed, "certify"),
        tile=config.certify.tile,
        spmd=config.certify.spmd,
    )
    if votes.num_classes != plan.dataset.num_classes:
        raise UserError(f"the head has {votes.num_classes} classes, the data {plan.dataset.num_classes}")
    sampler = _Sampler(plan, ledger, votes, Float64Encoder(encoder, config.certify.tile[0]))
    per_image = sum(plan.votes.values())
    have = sum(int(c.sum()) for idx in pending if idx in ledger.tallies for c in ledger.tallies[idx].counts.values())
    done, total = have, per_image * len(pending)
    progress, shown, derived = None, 0.0, time.monotonic()

    def count(new):
        nonlocal done, progress, shown
        done += new
        now = time.monotonic()
        # The first launch compiles; rates are measured from its end.
        if progress is None:
            progress = Progress(total, done)
        elif now - shown > _SECONDS_PER_LAUNCH or done == total:
            shown = now
            print(
                f"{done // per_image:>6,} of {len(pending):,} images  {progress.rate(done):,.0f} votes/s  "
                f"{progress.left(done)} left",
                flush=True,
            )

    for where, tile in list(sampler.tiles(pending)):
        sampler.run(where, tile, count)
        if time.monotonic() - derived > _SECONDS_PER_DERIVATION:
            derive(plan, ledger, record)
            derived = time.monotonic()
    record[-1]["seconds"] = round(time.monotonic() - start, 3)


def _print_summary(plan, tallies, certificates):
    labels = np.array([tally.label for tally in tallies])
    correct = certificates.predict == labels
    seconds = np.mean([tally.seconds for tally in tallies])
    print(
        f"{len(tallies):,} images: certified accuracy {correct.mean():.3f}, average certified radius "
        f"{np.where(correct, certificates.radius, 0).mean():.4f}, abstained {certificates.abstain.mean():.3f}, "
        f"{duration(seconds)} per image\n{plan.folder / 'certificates.tsv'}"
    )


if __name__ == "__main__":
    command.main(run)
