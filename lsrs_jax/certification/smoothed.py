"""Certificates of the smoothed classifier: votes, a ledger of them, and what they prove."""

import collections
import dataclasses
import time
from typing import Any

import jax
import numpy as np

from lsrs_jax.certification import folder
from lsrs_jax.errors import UserError
from lsrs_jax.keys import IMPLEMENTATION, root_key
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
    """A job with what its votes depend on."""

    job: folder.Job
    identity: dict
    report: Any

    @property
    def votes(self):
        return {"selection": self.job.config.certify.n0, "estimation": self.job.config.certify.n}


def _identity(job):
    """What makes two sets of votes comparable; a resume that differs in any of it is refused."""
    config = job.config
    return job.identity("smoothed") | {
        "sigma": config.sigma,
        "seed": config.seed,
        "n0": config.certify.n0,
        "n": config.certify.n,
        "tile": list(config.certify.tile),
        "prng": IMPLEMENTATION,
        "arithmetic": "float32",
    }


def _derive(plan, ledger, record):
    """Writes certificates.tsv and certificates.json from the ledger.

    Returns:
      ``(tallies, certificates)`` of the complete images; certificates are None without any.
    """
    tallies, config = ledger.completed(), plan.job.config
    if not tallies:
        folder.write(plan.job.folder, plan.identity, plan.report, record)
        return tallies, None
    certificates = from_counts(
        np.stack([tally.counts["selection"] for tally in tallies]),
        np.stack([tally.counts["estimation"] for tally in tallies]),
        sigma=sampled_sigma(config.sigma),
        alpha=config.certify.alpha,
        lipschitz=plan.report.constant,
        slack=np.array([tally.slack for tally in tallies]),
    )
    text = format_table(tallies, certificates, plan.report.constant)
    derivation = {"alpha": config.certify.alpha, "bound": "binary"}
    folder.write(plan.job.folder, plan.identity, plan.report, record, derivation, text)
    return tallies, certificates


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
        dataset = self._plan.job.dataset
        latents = self._encode(dataset.pixels(tile, np.float64))
        # An image's charge is fixed by its first row: another machine's encoder may differ in the last place.
        slack = [
            self._ledger.tallies[idx].slack if idx in self._ledger.tallies else float(charge)
            for idx, charge in zip(tile, float32_slack(latents, self._plan.job.config.sigma), strict=True)
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


def run(job):
    """Samples what is missing in the ledger, derives the certificates and prints a summary."""
    encoder, head = job.model.for_certification(job.params)
    plan = _Plan(job, _identity(job), encoder.report)
    certify, dataset = job.config.certify, job.dataset
    ledger_path = job.folder / "votes.0.tsv"
    record = _past_sessions(plan, ledger_path)
    with Ledger(ledger_path, plan.votes, certify.tile[1], dataset.num_classes) as ledger:
        _check_labels(ledger, dataset)
        pending = [idx for idx in job.indices if not ledger.complete(idx)]
        print(encoder.report)
        print(
            f"{dataset.name} {dataset.split}: {len(job.indices):,} images, {len(job.indices) - len(pending):,} of them "
            f"done; sigma {job.config.sigma}, n0 {certify.n0}, n {certify.n:,}, alpha {certify.alpha}; "
            f"{jax.local_device_count()} x {jax.default_backend()}",
            flush=True,
        )
        if pending:
            _sample(plan, ledger, encoder, head, pending, record)
        tallies, certificates = _derive(plan, ledger, record)
    _print_summary(plan, tallies, certificates)


def _past_sessions(plan, ledger_path):
    """The record of earlier sessions; refuses votes of another run. Without votes there is nothing to mix."""
    path = plan.job.folder / "certificates.json"
    if not has_rows(ledger_path):
        if (plan.job.folder / "certificates.tsv").exists():
            if path.exists():
                folder.read_record(path, plan.identity)
            raise UserError(
                f"{plan.job.folder} holds certificates but no votes; restore {ledger_path.name}, or use another "
                "--config.certify.name"
            )
        return []
    if not path.exists():
        raise UserError(
            f"{plan.job.folder} holds votes but no {path.name}; restore it, or use another --config.certify.name"
        )
    return folder.read_record(path, plan.identity)


def _check_labels(ledger, dataset):
    for tally in ledger.tallies.values():
        if tally.idx >= len(dataset) or tally.label != dataset.labels[tally.idx]:
            raise UserError(f"{ledger.path} does not fit the data: image {tally.idx} has another label there")


def _sample(plan, ledger, encoder, head, pending, record):
    config, start = plan.job.config, time.monotonic()
    votes = Votes(
        head,
        encoder.report.output_shape,
        sigma=config.sigma,
        key=root_key(config.seed),
        tile=config.certify.tile,
        spmd=config.certify.spmd,
    )
    if votes.num_classes != plan.job.dataset.num_classes:
        raise UserError(f"the head has {votes.num_classes} classes, the data {plan.job.dataset.num_classes}")
    sampler = _Sampler(plan, ledger, votes, Float64Encoder(encoder, config.certify.tile[0]))
    session = folder.session(len(pending))
    per_image = sum(plan.votes.values())
    have = sum(int(c.sum()) for idx in pending if idx in ledger.tallies for c in ledger.tallies[idx].counts.values())
    done, total = have, per_image * len(pending)
    progress, shown = None, 0.0

    def begin():
        """With the first votes, not before: a head that cannot be certified leaves nothing behind."""
        if not record or record[-1] is not session:
            record.append(session)
            # Images that are complete already get the alpha of this session with the first write.
            _derive(plan, ledger, record)

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
            _derive(plan, ledger, record)
            derived = time.monotonic()
    session["seconds"] = round(time.monotonic() - start, 3)


def _print_summary(plan, tallies, certificates):
    job = plan.job
    wanted = np.array([tally.idx in job.indices for tally in tallies])
    correct = (certificates.predict == [tally.label for tally in tallies])[wanted]
    radius, abstain = certificates.radius[wanted], certificates.abstain[wanted]
    seconds = np.array([tally.seconds for tally in tallies])[wanted]
    print(
        f"{wanted.sum():,} images: certified accuracy {correct.mean():.3f}, average certified radius "
        f"{np.where(correct, radius, 0).mean():.4f}, abstained {abstain.mean():.3f}, "
        f"{duration(seconds.mean())} per image\n{job.folder / 'certificates.tsv'}"
    )
    n, alpha = job.config.certify.n, job.config.certify.alpha
    if confidence.lower(n, n, alpha) <= 0.5:
        print(f"note: with n={n} and alpha={alpha} even a unanimous vote certifies nothing; raise certify.n")
