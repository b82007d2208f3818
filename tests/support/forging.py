"""Forgeries: changes files of a certification and makes their checksums and digests agree again."""

import hashlib
import json
import zlib

from lsrs_jax.certification import from_counts, resample, target, verify
from lsrs_jax.config import config_from_dict
from lsrs_jax.runtime import documents

COUNTS, PURPOSE = 6, 3  # columns of a ledger


def reseal(folder):
    """Recomputes the run in every row of the ledgers and all digests, after any file of the folder was changed."""
    stored = json.loads((folder / "certificates.json").read_text())
    stored["derivation"]["certificates"] = hashlib.sha256((folder / "certificates.tsv").read_bytes()).hexdigest()
    run = documents.digest(stored["identity"])[:16] if stored["identity"].get("format", 1) > 1 else None
    for path in sorted(folder.glob("votes.*.tsv")):
        for line in range(2, path.read_text().count("\n") + 1 if run else 0):
            rewrite(path, line, lambda fields: [*fields[:-1], run])
        content = path.read_bytes()
        digest = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        stored["derivation"]["votes"] = (stored["derivation"]["votes"] or {}) | {path.name: digest}
    stored["digest"] = documents.digest(stored)
    (folder / "certificates.json").write_text(json.dumps(stored))


def edit(path, line, column, value):
    rows = [row.split("\t") for row in path.read_text().split("\n")]
    rows[line - 1][rows[0].index(column)] = value
    path.write_text("\n".join("\t".join(row) for row in rows))


def rewrite(path, line, change):
    """Changes the fields of a line of a ledger and renews the checksum of the line."""
    lines = path.read_text().split("\n")
    fields = change(lines[line - 1].split("\t")[:-1])
    content = "\t".join(fields)
    lines[line - 1] = f"{content}\t{zlib.crc32(content.encode()):08x}"
    path.write_text("\n".join(lines))


def folder_of(workdir, name="default"):
    return workdir / "certify" / name


def verified(workdir, name="default"):
    return verify.run(folder_of(workdir, name), "")[1]


def draw_again(workdir, count=40, name="default"):
    folder = folder_of(workdir, name)
    stored, verdict = verify.run(folder)
    resample.run(target.target_of_certificates(folder, stored, ""), stored, count, verdict)
    return verdict


def change_stored(folder, change):
    """Changes certificates.json, and derives table and digests again, as a forger would."""
    stored = json.loads((folder / "certificates.json").read_text())
    change(stored)
    (folder / "certificates.json").write_text(json.dumps(stored))
    rederive(folder)


def rederive(folder):
    reseal(folder)
    stored = json.loads((folder / "certificates.json").read_text())
    from_counts.derive(folder, config_from_dict(stored["config"]))


def renew_digests(folder):
    """Recomputes the digests in certificates.json, and leaves every row as it is."""
    stored = json.loads((folder / "certificates.json").read_text())
    stored["derivation"]["certificates"] = hashlib.sha256((folder / "certificates.tsv").read_bytes()).hexdigest()
    for path in folder.glob("votes.*.tsv"):
        content = path.read_bytes()
        digest = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        stored["derivation"]["votes"][path.name] = digest
    stored["digest"] = documents.digest(stored)
    (folder / "certificates.json").write_text(json.dumps(stored))


def change_rows(folder, change):
    """Changes the fields of every row of a ledger for which `change` returns other ones."""
    path = folder / "votes.0.tsv"
    for line in range(2, path.read_text().count("\n") + 1):
        rewrite(path, line, change)
    rederive(folder)


def counts_in(fields):
    return {int(a): int(b) for a, b in (pair.split(":") for pair in fields[COUNTS].split(","))}


def with_counts(fields, counts):
    pairs = ",".join(f"{name}:{count}" for name, count in sorted(counts.items()) if count)
    return [*fields[:COUNTS], pairs, *fields[COUNTS + 1 :]]


def reseal_after(folder, change):
    """Changes certificates.json and renews all digests and the runs in the rows, but derives nothing."""
    stored = json.loads((folder / "certificates.json").read_text())
    change(stored)
    (folder / "certificates.json").write_text(json.dumps(stored))
    reseal(folder) if stored["identity"]["certificate"] == "smoothed" else renew_digests(folder)
