"""Attacks on a caller's classifier, as the command ``audit`` runs them."""

from pathlib import Path
from typing import Any

import numpy as np

from lsrs_jax.api.classifier import SmoothedClassifier
from lsrs_jax.api.folder import check_same
from lsrs_jax.auditing.auditor import Auditor, attack_batches
from lsrs_jax.auditing.table import Attacked, Audit, Found, Journal, Settings, check_votes, read_audit
from lsrs_jax.certification.identity import Identity
from lsrs_jax.certification.smoothed import Say
from lsrs_jax.certification.store import read_folder
from lsrs_jax.certification.table import read_table
from lsrs_jax.runtime import files
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.validate import is_whole, real
from lsrs_jax.smoothing.confidence import MAX_SAMPLES


def attack(
    classifier: SmoothedClassifier, inputs: np.ndarray, table: Attacked, sizes: dict[str, Any], alpha: float, say: Say
) -> Audit:
    """The `Audit` of float64 inputs with the rows of a table; `sizes` are fields of `Settings`."""
    settings = _settings(sizes, alpha)
    parts = list(_attack_all(classifier, inputs, table, settings, alpha, 0, None, (), say))
    found = Found(*(np.concatenate(columns) for columns in zip(*(found for _, found in parts), strict=True)))
    own = np.where(table.predict >= 0, table.predict, found.unperturbed)
    return Audit(*table, own == table.label, found.pairs, found.flips, found.undecided, found.distance)


def attack_folder(
    classifier: SmoothedClassifier,
    inputs: np.ndarray,
    labels: np.ndarray,
    folder: Path,
    sizes: dict[str, Any],
    say: Say,
) -> Audit:
    """Attacks the certificates in a folder of this classifier, and writes audit.tsv and audit.json beside them."""
    stored, path = read_folder(folder, "to attack"), folder / "certificates.tsv"
    if not stored.derivation or not path.exists() or stored.derivation["certificates"] != files.digest_of(path):
        raise UserError(f"{folder} has no finished table of its own: call certify with the same out first")
    check_same(classifier, classifier.dataset(inputs, labels), folder, stored)
    table, alpha, identity = read_table(path), stored.settings.certify.alpha, stored.identity
    settings, columns = _settings(sizes, alpha), Attacked(*(getattr(table, name) for name in Attacked._fields))
    with files.locked(folder / ".audit.lock", f"auditing {folder}"):
        journal = Journal(folder, settings, stored.derivation["certificates"])
        drawn = identity.seed or 0, identity, journal.done
        for attacked, found in _attack_all(classifier, inputs, columns, settings, alpha, *drawn, say):
            journal.append(attacked, found)
        journal.finish()
    return read_audit(journal.path)


def _attack_all(
    classifier: SmoothedClassifier,
    inputs: np.ndarray,
    table: Attacked,
    settings: Settings,
    alpha: float,
    seed: int,
    identity: Identity | None,
    done: Any,
    say: Say,
) -> Any:
    encoder, batch = classifier.encoder(inputs.shape[1:]), classifier.settings["tile"][0]
    sampler = classifier.sampler(encoder.report.output_shape, **(identity.flags if identity else {}))
    if identity is not None:
        identity.check_first_layer(sampler)
    levels: dict[str, Any] = {"lipschitz": encoder.report.constant, "alpha": alpha}
    levels |= {"seed": seed, "fallback": classifier.fallback}
    auditor = Auditor(encoder, classifier.head, sampler, settings=settings, **levels)
    return attack_batches(auditor, table, np.arange(len(table.idx)), lambda idx: inputs[idx], batch, done, say)


def _settings(sizes: dict[str, Any], alpha: float) -> Settings:
    """The `Settings` of an attack on all inputs; raises UserError for a size out of range."""
    for name in ("restarts", "steps", "samples", "votes"):
        if not is_whole(sizes[name]) or not 1 <= sizes[name] <= MAX_SAMPLES:
            raise UserError(f"{name} must be a whole number from 1 to 2**27, got {sizes[name]!r}")
    fractions = tuple(map(real, sizes["fractions"]))
    if not fractions or not all(0 < share <= 1 for share in fractions):
        raise UserError(f"fractions must be numbers in (0, 1], got {sizes['fractions']!r}")
    settings = Settings(**sizes | {"images": 0, "fractions": fractions})
    check_votes(settings, alpha)
    return settings
