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
import hashlib
import json
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
from lsrs_jax.keys import IMPLEMENTATION, pinned, root_key
from lsrs_jax.materialize import Float64Encoder
from lsrs_jax.progress import Progress, duration
from lsrs_jax.smoothing import confidence
from lsrs_jax.smoothing.certificates import from_counts
from lsrs_jax.smoothing.ledger import Ledger, Row, has_rows
from lsrs_jax.smoothing.radius import float32_slack, sampled_sigma
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
        "data": {
            "name": dataset.name,
            "version": dataset.version,
            "split": dataset.split,
            "digest": dataset.digest(),
        },
        "model": configuration.to_dict(config.model) | {"input_shape": list(model.input_shape)},
        "sigma": config.sigma,
        "seed": config.seed,
        "n0": certify.n0,
        "n": certify.n,
        "tile": list(certify.tile),
        "prng": IMPLEMENTATION,
        "arithmetic": "float32",
        "platform": f"{jax.default_backend()} {jax.local_devices()[0].device_kind}",
    }


def _read_json(path):
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
    """Writes certificates.tsv and certificates.json from the ledger.

    Returns:
      ``(tallies, certificates)`` of the complete images; certificates are None without any.
    """
    tallies = ledger.completed()
    path, derivation, certificates = plan.folder / "certificates.tsv", None, None
    if tallies:
        lipschitz = plan.report.constant
        certificates = from_counts(
            np.stack([tally.counts["selection"] for tally in tallies]),
            np.stack([tally.counts["estimation"] for tally in tallies]),
            sigma=sampled_sigma(plan.config.sigma),
            alpha=plan.config.certify.alpha,
            lipschitz=lipschitz,
            slack=np.array([tally.slack for tally in tallies]),
        )
        text = format_table(tallies, certificates, lipschitz)
        derivation = {
            "alpha": plan.config.certify.alpha,
            "bound": "binary",
            "certificates": hashlib.sha256(text.encode()).hexdigest(),
        }
        if not (path.exists() and path.read_text() == text):
            # Between these writes the old table must not stand beside the new alpha, nor the other way round.
            _write_json(plan, record, None)
            write_atomic(path, text)
    _write_json(plan, record, derivation)
    return tallies, certificates


def _write_json(plan, record, derivation):
    content = {
        "identity": plan.identity,
        "derivation": derivation,
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

    def run(self, done, tile, before, progress):
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
                seconds, clock = round((now - clock) / len(tile), 6), now
                before()
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
    parser.add_argument("--workdir", required=True, type=command.folder, help="folder of a training")
    options, rest = parser.parse_known_args(arguments)
    stored_config = options.workdir / "config.json"
    if not stored_config.exists():
        raise UserError(
            f"{options.workdir} holds no training: run python -m lsrs_jax.train --workdir={options.workdir} ..."
        )
    trained = configuration.load(stored_config)
    network = configuration.to_dict(trained.model)
    config = command.config_from_flags(rest, trained)
    difference = configuration.first_difference(network, configuration.to_dict(config.model), ("noise",))
    if difference:
        name, old, new = difference
        raise UserError(f"the network was trained with model.{name}={old!r}, not {new!r}; train that one first")
    certify = config.certify
    dataset = datasets.load(config.data.name, config.data.split, config.data.dir)
    indices = range(certify.start, min(certify.stop or len(dataset), len(dataset)), certify.step)
    if not len(indices):
        raise UserError(f"no image to certify: certify.start={certify.start} in a split of {len(dataset)}")

    model = models.build(config.model, dataset.shape, dataset.num_classes)
    with pinned():
        target = jax.eval_shape(model.init, root_key(0))
    params, meta = checkpoint.restore_model(options.workdir, target)
    encoder, head = model.for_certification(params)
    folder = options.workdir / "certify" / certify.name
    plan = _Plan(config, folder, dataset, _identity(config, dataset, meta, model), encoder.report)

    ledger_path = folder / "votes.0.tsv"
    record = _past_sessions(plan, ledger_path)
    with Ledger(ledger_path, plan.votes, certify.tile[1], dataset.num_classes) as ledger:
        _check_labels(ledger, dataset)
        pending = [idx for idx in indices if not ledger.complete(idx)]
        print(encoder.report)
        print(
            f"{dataset.name} {dataset.split}: {len(indices):,} images, {len(indices) - len(pending):,} of them done; "
            f"sigma {config.sigma}, n0 {certify.n0}, n {certify.n:,}, alpha {certify.alpha}; "
            f"{jax.local_device_count()} x {jax.default_backend()}",
            flush=True,
        )
        if meta["step"] < config.train.steps:
            print(f"note: the training stopped at step {meta['step']} of {config.train.steps}")
        if pending:
            _sample(plan, ledger, encoder, head, pending, record)
        tallies, certificates = derive(plan, ledger, record)
    _print_summary(plan, indices, tallies, certificates)


def _past_sessions(plan, ledger_path):
    """The record of earlier sessions; refuses votes of another run. Without votes there is nothing to mix."""
    path = plan.folder / "certificates.json"
    if not has_rows(ledger_path):
        if (plan.folder / "certificates.tsv").exists():
            raise UserError(
                f"{plan.folder} holds certificates but no votes; restore {ledger_path.name}, or use another "
                "--config.certify.name"
            )
        return []
    if not path.exists():
        raise UserError(
            f"{plan.folder} holds votes but no {path.name}; restore it, or use another --config.certify.name"
        )
    stored = _read_json(path)
    _check_identity(stored, plan.identity, path)
    return list(stored["record"])


def _check_labels(ledger, dataset):
    for tally in ledger.tallies.values():
        if tally.idx >= len(dataset) or tally.label != dataset.labels[tally.idx]:
            raise UserError(f"{ledger.path} does not fit the data: image {tally.idx} has another label there")


def _now():
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _sample(plan, ledger, encoder, head, pending, record):
    config, start = plan.config, time.monotonic()
    votes = Votes(
        head,
        encoder.report.output_shape,
        sigma=config.sigma,
        key=root_key(config.seed),
        tile=config.certify.tile,
        spmd=config.certify.spmd,
    )
    if votes.num_classes != plan.dataset.num_classes:
        raise UserError(f"the head has {votes.num_classes} classes, the data {plan.dataset.num_classes}")
    sampler = _Sampler(plan, ledger, votes, Float64Encoder(encoder, config.certify.tile[0]))
    session = _record(jax.local_device_count(), _now(), len(pending))
    per_image = sum(plan.votes.values())
    have = sum(int(c.sum()) for idx in pending if idx in ledger.tallies for c in ledger.tallies[idx].counts.values())
    done, total = have, per_image * len(pending)
    progress, shown = None, 0.0

    def begin():
        """With the first votes, not before: a head that cannot be certified leaves nothing behind."""
        if not record or record[-1] is not session:
            record.append(session)
            # Images that are complete already get the alpha of this session with the first write.
            derive(plan, ledger, record)

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

    derived = time.monotonic()
    for where, tile in list(sampler.tiles(pending)):
        sampler.run(where, tile, begin, count)
        if time.monotonic() - derived > _SECONDS_PER_DERIVATION:
            derive(plan, ledger, record)
            derived = time.monotonic()
    session["seconds"] = round(time.monotonic() - start, 3)


def _print_summary(plan, indices, tallies, certificates):
    wanted = np.array([tally.idx in indices for tally in tallies])
    correct = (certificates.predict == [tally.label for tally in tallies])[wanted]
    radius, abstain = certificates.radius[wanted], certificates.abstain[wanted]
    seconds = np.array([tally.seconds for tally in tallies])[wanted]
    print(
        f"{wanted.sum():,} images: certified accuracy {correct.mean():.3f}, average certified radius "
        f"{np.where(correct, radius, 0).mean():.4f}, abstained {abstain.mean():.3f}, "
        f"{duration(seconds.mean())} per image\n{plan.folder / 'certificates.tsv'}"
    )
    n, alpha = plan.config.certify.n, plan.config.certify.alpha
    if confidence.lower(n, n, alpha) <= 0.5:
        print(f"note: with n={n} and alpha={alpha} even a unanimous vote certifies nothing; raise certify.n")


if __name__ == "__main__":
    command.main(run)
