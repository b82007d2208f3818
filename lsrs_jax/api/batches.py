"""`SmoothedClassifier.certify` in memory: of arrays, and of inputs that come in batches, of which one is in memory."""

import dataclasses
import hashlib
import itertools
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float, Int32

from lsrs_jax.api.arguments import check_pixels, labels_of, seed_of
from lsrs_jax.api.fallback import answers_of
from lsrs_jax.api.result import Result, result_of
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.rng import root_key
from lsrs_jax.smoothing.api import check_latents, check_slack
from lsrs_jax.smoothing.counts import Counts
from lsrs_jax.smoothing.derivation import Certificates, joined
from lsrs_jax.smoothing.engine import Images
from lsrs_jax.smoothing.noise_check import accuracy_under_noise

if TYPE_CHECKING:
    from lsrs_jax.api.classifier import SmoothedClassifier
    from lsrs_jax.certification.inputs import Inputs


@dataclasses.dataclass
class Batches:
    """A `Dataset` of which one batch after another is in memory.

    Nobody knows its digest beforehand. A random token of the folder stands for it, so that samples of other inputs
    belong to another run.
    """

    source: Iterator[tuple[np.ndarray, np.ndarray | None]]
    shape: tuple[int, ...]
    class_names: tuple[str, ...]
    known: "Inputs"
    token: str
    name: str = "arrays"
    version: str = ""
    split: str = "given"

    def __post_init__(self) -> None:
        self._first, self._inputs = 0, np.zeros((0, *self.shape))

    def __len__(self) -> int:
        return len(self.known)

    @property
    def labels(self) -> Int32[np.ndarray, " N"]:
        return self.known.labels

    def digest(self) -> str:
        return self.token

    def read(self, index: Any, dtype: Any) -> tuple[Float[np.ndarray, "B *input"], Int32[np.ndarray, " B"]]:
        """Inputs of the current batch, and their labels."""
        return np.asarray(self._inputs[np.asarray(index) - self._first], dtype), self.labels[index]

    def arriving(self) -> Iterator[range]:
        """Takes one batch after another; yields the indices of its inputs."""
        seen = 0
        for inputs, labels in self.source:
            self._inputs, self._first, seen = inputs, seen, seen + len(inputs)
            self.known.take(self._first, self._inputs, check_classes(labels, len(self.class_names), self._first))
            yield range(self._first, seen)
        if seen < len(self):
            more = f"an earlier call had {len(self):,}: give all of them, or another name"
            raise UserError(f"the batches end after {seen:,} inputs, and {more}")


def digest_of(shape: Sequence[int], classes: int) -> str:
    """What stands for the digest of a data set that nobody knows beforehand."""
    return hashlib.sha256(str(("batches", tuple(shape), classes)).encode()).hexdigest()


def check_classes(labels: np.ndarray | None, classes: int, first: int) -> list[int]:
    """The labels of a batch; raises UserError if it has none, or one that is no class."""
    if labels is None:
        raise UserError("out needs labels: give batches of (inputs, labels)")
    for row in np.flatnonzero((labels < 0) | (labels >= classes))[:1]:
        raise UserError(f"input {first + row} has the label {labels[row]}, but labels go from 0 to {classes - 1}")
    return labels.tolist()


def checked(given: Any, pixels: bool) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """The batches of a caller as float64 inputs with labels or None; raises UserError for one that does not fit."""
    shape = labelled = None
    for number, batch in enumerate(given):
        inputs, labels = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)
        inputs = check_pixels(check_latents(inputs, f"batch {number}"), pixels)
        shape, labelled = shape or inputs.shape[1:], (labels is not None) if labelled is None else labelled
        if inputs.shape[1:] != shape or (labels is not None) != labelled:
            raise UserError(f"batch {number} has inputs of another shape than the first one, or only one has labels")
        yield inputs, labels_of(labels, len(inputs))


def certify(
    classifier: "SmoothedClassifier",
    given: Any,
    out: str | Path | None,
    key: jax.Array | None,
    slack: Any,
    fields: dict[str, Any],
    say: Callable[[str], object] | None,
) -> Result:
    """`SmoothedClassifier.certify` of batches; `fields` are the settings of the sampling, and `name`."""
    source, slack = checked(given, classifier.takes_pixels), check_slack(slack, -1)
    if (first := next(source, None)) is None:
        raise UserError("there is no batch to certify")
    source, shape = itertools.chain([first], source), first[0].shape[1:]
    names = classifier.names_of_classes(np.zeros(0, int), shape)
    if out is not None:
        fields |= {"seed": seed_of(key)}
        return _into(classifier, source, shape, names, Path(out).expanduser(), slack, fields, say)
    del fields["name"]
    if key is None:
        from lsrs_jax.certification.identity import derived_seed  # loads much more

        key = root_key(derived_seed(classifier.identity(shape).parameters, digest_of(shape, len(names))))
    parts, labels, done = list[Certificates](), list[int](), 0
    for inputs, own in source:
        if own is not None:
            labels += check_classes(own, len(names), done)
        found = certificates(classifier, inputs, own, key, slack, say, done, fields)
        parts.append(dataclasses.replace(found, samples=None))
        done += len(inputs)
    radii = () if fields["radii"] is None or fields["schedule"] == "fixed" else tuple(map(float, fields["radii"]))
    return result_of(joined(parts, done), np.array(labels) if labels else None, names, classifier.sigma, radii)


def _into(
    classifier: "SmoothedClassifier",
    source: Iterator[tuple[np.ndarray, np.ndarray | None]],
    shape: tuple[int, ...],
    names: tuple[str, ...],
    out: Path,
    slack: np.ndarray,
    fields: dict[str, Any],
    say: Callable[[str], object] | None,
) -> Result:
    from lsrs_jax.api import folder
    from lsrs_jax.certification import store
    from lsrs_jax.certification.inputs import Inputs

    home = out / "certify" / fields["name"]
    stored = store.require_sealed(path) if (path := home / "certificates.json").exists() else None
    known = Inputs(home, ((stored and stored.derivation) or {}).get("inputs"))
    token = stored.identity.data.get("digest") if stored else secrets.token_hex(32)
    return folder.certify(classifier, Batches(source, shape, names, known, str(token)), slack, out, fields, say)


def certificates(
    classifier: "SmoothedClassifier",
    inputs: np.ndarray,
    labels: np.ndarray | None,
    key: jax.Array | None,
    slack: Any,
    say: Callable[[str], object] | None,
    first: int,
    sampling: dict[str, Any],
    counts: Counts | None = None,
) -> Certificates:
    """Certificates in memory of checked inputs with the indices `first`, `first` + 1, …."""
    latents, total = classifier.encoding.latents(inputs, slack, classifier.sigma, classifier.settings["tile"][0])
    sampler = classifier.smoother.sampler_said(latents.shape[1:], say or (lambda line: None))
    if labels is not None:
        classifier.names_of_classes(labels, inputs.shape[1:])
        if say and not first:
            some = Images(range(len(labels)), labels.tolist(), [], sampler.quantize(latents))
            say(accuracy_under_noise(sampler, some))
    answers = classifier.fallback and answers_of(classifier.fallback, inputs, sampler.num_classes, first)
    key = root_key(_derived_seed(classifier, inputs, labels, answers)) if key is None else key
    given: dict[str, Any] = {"counts": counts, "progress": say, "fallback": answers, "first": first}
    return classifier.smoother.certify(latents, key=key, slack=total, **given, **sampling)


def _derived_seed(classifier: "SmoothedClassifier", inputs: np.ndarray, labels: np.ndarray | None, answers: Any) -> int:
    from lsrs_jax.certification.identity import derived_seed

    dataset = classifier.dataset(inputs, np.zeros(len(inputs), int) if labels is None else labels)
    fallback = repr(answers) if answers else None
    return derived_seed(classifier.identity(inputs.shape[1:]).parameters, dataset.digest(), fallback)
