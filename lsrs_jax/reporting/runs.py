"""Reads runs: tables of certificates, and what the files beside them say about them."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsrs_jax.auditing.table import Audit, read_finished
from lsrs_jax.certification import ledger
from lsrs_jax.certification.foreign import read_log
from lsrs_jax.certification.table import Table
from lsrs_jax.config import CALLER, chosen_images, config_from_dict
from lsrs_jax.reporting.kinds import UNKNOWN_KIND, Kind, kind_of
from lsrs_jax.reporting.sampling import Sampling, sampling_of
from lsrs_jax.runtime import documents, files
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.validate import is_whole, real


@dataclasses.dataclass(frozen=True)
class Run:
    """A table of certificates, and what the files beside it say."""

    label: str
    table: Table
    file: Path | None = dataclasses.field(default=None, compare=False, kw_only=True)  # of the table
    audit: Audit | None = None  # what attacks found on these certificates
    notes: Sequence[str] = ()  # what a reader must know about it
    unfinished: str = ""  # as "78 of 360" images; "78 of ?" if nothing says how many there should be
    pixels: bool = True  # whether a radius is in units of pixels in [0, 1], and not of a caller's inputs
    composed: bool = False  # whether a fallback answers where the samples do not
    sampling: Sampling | None = None  # None if nothing says how it was sampled, and for deterministic certificates
    kind: Kind = UNKNOWN_KIND
    classes: Sequence[str] = ()  # their names, if the files beside the table say them

    @property
    def deterministic(self) -> bool:
        """Whether no certificate took any samples."""
        return self.table.samples is not None and not self.table.samples.any()

    @property
    def mark(self) -> str:
        """Words for a run of which images are known to be missing, which needs no samples, or has a fallback."""
        missing = "not finished" if self.unfinished and not self.unfinished.endswith("?") else ""
        kind = "no samples, no alpha" if self.deterministic else "with a fallback" if self.composed else ""
        return ", ".join(filter(None, [missing, kind]))

    @property
    def images(self) -> str:
        """The number of images, for people."""
        return self.unfinished or f"{len(self.table):,}"


def load_runs(arguments: Sequence[str]) -> list[Run]:
    """The runs named by ``[LABEL=]PATH`` arguments; a workdir with several certifications gives several runs."""
    runs = []
    for argument in arguments:
        label, path = _split(argument)
        found, empty = _tables(path)
        for file in found:
            suffix = f"/{file.parent.name}" if len(found) > 1 else ""
            name = label or path.resolve().name.removesuffix(".tsv")
            runs.append(dataclasses.replace(_read(file, plain(name + suffix)), file=file))
        if empty:
            names = ", ".join(plain(folder.name) for folder in empty)
            note = f"beside it, {names} holds samples but no certificates yet, and is left out."
            runs[-1] = dataclasses.replace(runs[-1], notes=[*runs[-1].notes, note])
    label, times = collections.Counter(run.label for run in runs).most_common(1)[0]
    if times > 1:
        raise UserError(f"two runs are called {label!r}; name them: NAME=PATH")
    return runs


def _read(file: Path, label: str) -> Run:
    table, notes = read_log(file)
    if table.truncated:
        notes.insert(0, "its last line was cut off and is left out.")
    if file.name != "certificates.tsv":  # the files beside it are about the table of this name
        return Run(label, table, None, notes)
    about, unfinished = _derivation_notes(file, table.idx)
    beside = file.with_name("certificates.json")
    content = documents.read_json(beside) if beside.exists() else {}
    content = content if isinstance(content, dict) else {}
    audit = _audit(file)
    notes += about
    if audit:
        notes.append(_describe(audit, table))
    elif file.with_name("audit.tsv").exists():
        notes.append("its audit is not finished and left out; the same audit command continues it.")
    composed = isinstance(content.get("identity"), dict) and "fallback" in content["identity"]
    facts = sampling_of(content), kind_of(content), _class_names(content)
    return Run(label, table, audit, notes, unfinished, not _of_caller(content), composed, *facts)


def _class_names(content: dict[str, Any]) -> tuple[str, ...]:
    """The names of the classes in a certificates.json, which another program may have written."""
    identity = content.get("identity")
    data = identity.get("data") if isinstance(identity, dict) else None
    names = data.get("class_names") if isinstance(data, dict) else None
    return tuple(plain(str(name)) for name in names) if isinstance(names, list) else ()


def _of_caller(content: dict[str, Any]) -> bool:
    """Whether certificates are of arrays that a caller of `SmoothedClassifier` gave, in units of their own."""
    identity = content.get("identity")
    data, model = ((identity or {}).get(name) for name in ("data", "model")) if isinstance(identity, dict) else ({}, {})
    names = (data.get("name"), model.get("head")) if isinstance(data, dict) and isinstance(model, dict) else ()
    return names == ("arrays", CALLER)


def unit(runs: Sequence[Run]) -> str:
    """The unit of the radii."""
    return "pixels in [0, 1]" if all(run.pixels for run in runs) else "units of the inputs"


def plain(name: str) -> str:
    """Replaces characters of a name that have a meaning in Markdown, in a picture, or on a terminal."""
    return "".join("_" if character in "|$\\`" or not character.isprintable() else character for character in name)


def _derivation_notes(table: Path, certified: np.ndarray) -> tuple[list[str], str]:
    """Notes from the certificates.json beside a table of the images `certified`, and `Run.unfinished`.

    Another program may have written the file. Raises UserError for a damaged file, or a file about another table.
    """
    path, in_workdir = table.with_name("certificates.json"), table.parent.parent.name == "certify"
    try:
        content = documents.read_json(path) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or move it away") from error
    content = content if isinstance(content, dict) else {}
    ours = bool({"digest", "format", "identity", "lipschitz"} & content.keys())
    if ours:
        content = documents.read_sealed(path, lambda content: content["derivation"], "move it away")
    derivation = content["derivation"] if isinstance(content.get("derivation"), dict) else {}
    named = derivation.get("certificates")
    if (ours or isinstance(named, str)) and named != files.digest_of(table):
        counts = " --from-counts" if "votes" in derivation else ""
        remedy = f"restore it, or derive it again: {_command('certify', table)}{counts}"
        raise UserError(f"{table} is not the table that certificates.json beside it names; {remedy}")
    notes, unfinished, unknown = [], "", f"{len(certified):,} of ?"
    if in_workdir and "certificates" not in derivation:
        wrote = "nothing says that certify wrote it, or that it is finished"
        notes, unfinished = [f"no certificates.json beside it names this table; {wrote}."], unknown
    if ours and content["digest"] is None:
        changed = "nothing says whether it was changed, or is finished"
        notes, unfinished = [f"unsealed: an old version wrote its certificates.json, and {changed}."], unknown
    if ours and content["digest"] and isinstance(identity := content.get("identity"), dict) and "config" in content:
        found, images = set(certified.tolist()), identity.get("images")
        wanted = chosen_images(config_from_dict(content["config"]), images if is_whole(images) else None)
        if wanted is None:
            notes.append("its old format does not keep the number of images; nothing says whether it is finished.")
            unfinished = unknown
        elif missing := len(set(wanted) - found):
            staged = "; staged sampling decides the images without a certificate first"
            staged = staged if identity.get("schedule") in ("staged", "anytime") else ""
            notes.append(
                f"{missing:,} of the {len(wanted):,} images that were to be certified are not in its table: it is not "
                f"finished, or they were left out{staged}. Its numbers are of the others only."
            )
            unfinished = f"{len(wanted) - missing:,} of {len(wanted):,}"
        if wanted and (others := len(found - set(wanted))):
            notes.append(f"{others:,} of its images are not among the {len(wanted):,} that were to be certified.")
    radii = derivation.get("radii")  # another program may have written anything here
    if radii and isinstance(radii, list) and all(0 <= real(radius) <= 1e300 for radius in radii):
        decided = ", ".join(f"{radius:g}" for radius in radii)
        notes.append(f"sampled to decide the radii {decided}; at other radii, and in its ACR, it is a lower bound.")
    return notes, unfinished


def _audit(table: Path) -> Audit | None:
    """The finished audit beside a table, if there is one; raises UserError if it is about another table."""
    path = table.with_name("audit.tsv")
    attacked, audit = (path.exists() and read_finished(path)) or (None, None)
    if audit and attacked != files.digest_of(table):
        remedy = f"move it and audit.json away, then audit this table: {_command('audit', table)}"
        raise UserError(f"{path} is the audit of another table, not of {table.name} beside it; {remedy}")
    return audit


def _describe(audit: Audit, table: Table) -> str:
    verdict = " (THESE CERTIFICATES DO NOT HOLD)" if audit.flips.any() else ""
    return (
        f"attacked at {audit.pairs.sum():,} points inside {(audit.predict >= 0).sum():,} of its certificates, "
        f"{audit.flips.sum():,} flips{verdict}, {audit.undecided.sum():,} undecided (`predict` abstained); dashed: the "
        f"accuracy that the attacks left on {len(audit.idx):,} of its {len(table):,} images."
    )


def _command(name: str, table: Path) -> str:
    """The command that makes the files beside a table."""
    folder = table.resolve().parent
    return f"python -m lsrs_jax.{name} --workdir={folder.parent.parent} --config.certify.name={folder.name}"


def _split(argument: str) -> tuple[str | None, Path]:
    label, equals, path = argument.partition("=")
    if not equals or Path(argument).expanduser().exists():
        return None, Path(argument).expanduser()
    if not label or plain(label) != label:
        raise UserError(f"bad name {label!r} for a run: use plain text without any of | $ \\ `")
    return label, Path(path).expanduser()


def _tables(path: Path) -> tuple[list[Path], list[Path]]:
    """The tables of a run, and folders with samples from which no table was derived yet."""
    if path.is_file():
        return [path], []
    if not path.is_dir():
        raise UserError(f"no run at {path}: give a workdir, or a file of certificates")
    if (path / "certificates.tsv").exists():
        return [path / "certificates.tsv"], []
    found = sorted(path.glob("certify/*/certificates.tsv"))
    folders = [path, *(folder for folder in sorted(path.glob("certify/*")) if folder.is_dir())]
    empty = [folder for folder in folders if not (folder / "certificates.tsv").exists() and ledger.has_rows(folder)]
    if not found and empty:
        remedy = "the command or call that began it continues it"
        raise UserError(f"{empty[0]} holds samples but no certificates yet: it is not finished; {remedy}")
    if not found:
        raise UserError(f"no certificates in {path}: run python -m lsrs_jax.certify --workdir={path}")
    return found, empty


def radius_grid(runs: Sequence[Run]) -> list[float]:
    """0, .25, … up to the largest certified radius; a finer or wider grid if that does not give 4 to 13 columns."""
    largest = max(float(run.table.radius.max()) for run in runs)
    step = 0.25
    if not 0.75 <= largest <= 3:
        magnitude = 10.0 ** math.floor(math.log10(max(largest, 1e-6) / 4))
        step = next(step * magnitude for step in (1, 2, 5, 10) if largest / (step * magnitude) <= 10)
    return [float(f"{step * i:.6g}") for i in range(int(largest / step) + 1)]


def incomparable(runs: Sequence[Run]) -> str:
    """A note that the average certified radii of runs are not comparable; "" if they are."""
    sampled = [run for run in runs if not run.deterministic]
    found = collections.defaultdict(list)
    for run in sampled:
        known = run.sampling and f"n {run.sampling.n:,}, cap {run.sampling.cap:.3f}"
        found[known or "n and cap unknown"].append(f"'{run.label}'")
    if len(sampled) < 2 or (len(found) == 1 and sampled[0].sampling):
        return ""
    each = "; ".join(f"{', '.join(labels)}: {words}" for words, labels in found.items())
    return f"ACRs are comparable only at the same n and cap, and these differ or are not known ({each})."
