"""New certificates from the counts on disk (--from-counts)."""

from pathlib import Path

from lsrs_jax.certification import ledger, store
from lsrs_jax.certification.reopened import reopen
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.types import Config


def derive(folder: Path, config: Config) -> None:
    """Derives new certificates from the ledgers in a folder, without model, data or samples.

    Raises UserError if the ledgers do not have the samples that the configuration asks for.
    """
    certify, stored = config.certify, store.read_folder(folder, "to derive from")
    held = stored.identity.certificate
    if held != "smoothed" or certify.certificate != "smoothed":
        wrong = f"{folder} holds {held} ones" if held != "smoothed" else "leave --config.certify.certificate out"
        raise UserError(f"--from-counts is for smoothed certificates: {wrong}")
    certification = reopen(folder, config, stored)
    certification.note_format()
    if not ledger.has_rows(folder):
        raise UserError(f"{folder} holds no samples; restore {ledger.name('*')}")
    with certification.open_ledger() as counts:
        chosen = [idx for idx in counts.images if counts.at_a_look(idx)]
        indices = range(certify.start, certify.stop or max(chosen, default=0) + 1, certify.step)
        if not any(idx in indices for idx in chosen):
            none = f"no chosen image in {folder} has enough samples for a certificate"
            raise UserError(f"{none}; run certify without --from-counts first")
        found = certification.derive(counts, chosen)
    print(f"alpha {certify.alpha}, {certify.bound} bound, from the samples of {len(chosen):,} images")
    if left_out := len(counts.images) - len(chosen):
        print(f"note: {left_out:,} images whose sampling was interrupted are left out; certify resumes them")
    print(certification.summary(*found, indices))
