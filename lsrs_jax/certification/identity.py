"""The identity of a run: everything on which its certificates depend, and how two runs differ."""

import dataclasses
import hashlib
from typing import Any

import numpy as np

from lsrs_jax.config import (
    CALLER,
    FIELDS,
    SEED_DERIVED,
    SEED_OF_TRAINING,
    SOURCES,
    config_to_dict,
    upgrade_section,
    without_absent,
)
from lsrs_jax.data.images import other_class
from lsrs_jax.runtime.documents import digest, first_difference, plain, refuse_unknown
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.format import PRNG
from lsrs_jax.runtime.types import Config
from lsrs_jax.smoothing.arithmetic import Arithmetic
from lsrs_jax.smoothing.first_layer import INTEGER
from lsrs_jax.smoothing.head_trace import CHANNELS_LAST
from lsrs_jax.smoothing.sampler import Sampler
from lsrs_jax.smoothing.schedule import Schedule, make_schedule
from lsrs_jax.smoothing.settings import FLAGS

# Fields that follow from other fields. A message names one of the other fields if that differs too.
_FOLLOWING = ("arithmetic", "checkpoint.digest", "data.digest", "seed", "stages")
_CONFIG_NAMES = {"arithmetic.name": "certify.arithmetic"} | {
    name: f"certify.{name}" for name in ("certificate", "n0", "n", "schedule", "tile", "noise", "head_dtype", "seed")
}


@dataclasses.dataclass(frozen=True)
class Identity:
    """The facts that two comparable certifications share. Those of the sampling are None without samples."""

    certificate: str  # "smoothed" or "deterministic"
    classes: int | None  # None in old files, which do not have it
    checkpoint: dict[str, Any]  # step and digest of the parameters
    data: dict[str, Any]  # name, version, split, digest of images and labels; and class_names, except in old files
    model: dict[str, Any]  # the section of the configuration, and input_shape
    platform: str  # back end and kind of device
    images: int | None = None  # of the whole split; None in folders of format 1
    format: int = 1  # in which the folder was begun; its ledgers stay in this format
    sigma: float | None = None
    seed: int | None = None  # of the noise
    n0: int | None = None
    n: int | None = None
    schedule: str | None = None
    stages: list[int] | None = None  # the looks of the schedule
    tile: list[int] | None = None
    noise: str | None = None
    head_dtype: str | None = None
    prng: str | None = None
    arithmetic: dict[str, Any] | None = None  # its name, sigma, tau and, on a grid, spacing
    program: str | None = None  # of the head, as in `Sampler`; None for "plain"
    first_layer: str | None = None  # of the head: "integer" as in `Sampler`, or None
    fallback: dict[str, Any] | None = None  # step and digest of the fallback of a composition; None without one

    def sampled(self, config: Config, arithmetic: Arithmetic, latent_shape: tuple[int, ...]) -> "Identity":
        """This identity with the facts of the sampling."""
        facts = self.sampling_facts(config) | {"arithmetic": arithmetic_facts(arithmetic, latent_shape)}
        return dataclasses.replace(self, prng=PRNG, **facts)

    def sampling_facts(self, config: Config) -> dict[str, Any]:
        """The fields that the samples depend on and that follow from the configuration, weights and images."""
        facts = {name: config.certify[name] for name in ("n0", "n", "schedule", "noise", "head_dtype")}
        facts |= {"tile": list(config.certify.tile), "stages": list(schedule_of(config).looks)}
        seed = {SEED_OF_TRAINING: config.seed}.get(config.certify.seed, config.certify.seed)
        if seed == SEED_DERIVED:
            digests = self.data.get("digest"), (self.fallback or {}).get("digest")
            seed = derived_seed(self.checkpoint["digest"], *digests)
        return facts | {"sigma": config.sigma, "seed": seed}

    @property
    def run(self) -> str | None:
        """The name that every row of a ledger carries: 16 digits of a digest of this identity; None in format 1."""
        return digest(self.to_dict())[:16] if self.format > 1 else None

    @property
    def streamed(self) -> bool:
        """Whether the images came in batches, so that nobody knew their number beforehand."""
        return self.format > 1 and self.images is None

    @property
    def flags(self) -> dict[str, bool]:
        """The flags of a `Sampler` with which the samples were drawn."""
        return dict(zip(FLAGS, (self.program == CHANNELS_LAST, self.first_layer == INTEGER), strict=True))

    def sampled_by(self, sampler: Sampler) -> "Identity":
        """This identity with the program of the head that a sampler runs."""
        program = None if sampler.program == "plain" else sampler.program
        return dataclasses.replace(self, program=program, first_layer=sampler.first_layer)

    def check_first_layer(self, sampler: Sampler) -> None:
        """Raises UserError if a sampler of these `flags` runs another first layer, which makes another function."""
        if sampler.first_layer != self.first_layer:
            raise UserError(
                f"the certified head has an {self.first_layer or 'ordinary'} first layer, which this platform does not "
                "compute exactly; use the platform of the certification, or a CPU"
            )

    def begun_as(self, stored: "Identity") -> "Identity":
        """This identity with what a new session takes over from the session that began the folder."""
        images = self.images if stored.format > 1 else stored.images
        data = {name: value for name, value in self.data.items() if name in stored.data or name != "class_names"}
        taken = {"format": stored.format, "program": stored.program, "first_layer": stored.first_layer}
        return dataclasses.replace(self, images=images, data=data, **taken)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON; fields without a value, or with the value that their absence means, are left out."""
        facts = self._facts()
        if self.format == 1:
            del facts["format"]
        return facts | {"model": without_absent(facts["model"], "model.")}

    def _facts(self) -> dict[str, Any]:
        return plain({name: value for name, value in dataclasses.asdict(self).items() if value is not None})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Identity":
        """The identity in a certificates.json of any format; raises for a field that is missing or unknown."""
        model = ("input_shape", *(name.removeprefix("model.") for name in FIELDS if name.startswith("model.")))
        known: dict[str, Any] = {field.name: None for field in dataclasses.fields(cls)}
        known |= {
            "checkpoint": ("step", "digest"),
            "data": ("name", "version", "split", "digest", "class_names"),
            "model": model,
        }
        known |= {"arithmetic": ("name", "spacing", "sigma", "tau"), "fallback": ("step", "digest")}
        refuse_unknown(values, known, "identity.")
        return cls(**{"classes": None, **values, "model": upgrade_section(values["model"], "model.")})

    def difference(self, new: "Identity", ignore: tuple[str, ...] = ()) -> tuple[str, Any, Any] | None:
        """The most informative field in which another run differs, with both values; None if nothing differs."""
        if self.certificate != new.certificate:  # everything else follows from it
            return "certificate", self.certificate, new.certificate
        old, now = self._facts(), new._facts()
        return first_difference(old, now, (*_FOLLOWING, *ignore)) or first_difference(old, now, ignore)

    def how_it_differs(self, new: "Identity") -> str | None:
        """Names every field in which another run differs from this one, in one clause each; None if they agree."""
        if (found := self.difference(new)) is None:
            return None
        names, clauses = [found[0]], [_clause(new, *found)]
        old, now = self._facts(), new._facts()
        while names[0] != "certificate" and (found := first_difference(old, now, (*_FOLLOWING, *names))):
            names.append(found[0])
            clauses.append(_clause(new, *found))
        return " and ".join(clauses)


def derived_seed(parameters: str, data: str | None, fallback: str | None = None) -> int:
    """The seed of the noise that follows from the digests of parameters, images and, if there is one, the fallback."""
    digests = f"{parameters}{data}{fallback or ''}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(digests).digest()[:4], "big")


def _clause(new: Identity, name: str, was: Any, now: Any) -> str:
    """Says how a field of another run differs."""
    if name == "checkpoint.step":
        return f"they are of the checkpoint of step {was}, not {now}; --config.certify.checkpoint={was} continues them"
    if name == "checkpoint.digest" and new.model.get("head") == CALLER:
        return "the parameters of the classifier have changed"
    if name == "checkpoint.digest":
        return f"the weights in the checkpoint of step {new.checkpoint['step']} have changed"
    if name.partition(".")[0] == "fallback":
        another = "another fallback, or another checkpoint of it," if was and now else "a fallback" if was else "none"
        return f"certify.fallback named {another} there"
    if name == "data.class_names" and (clause := other_class(was or [], now or [])):
        return f"{clause} now"
    if name == "data.digest":
        name = " ".join(filter(None, (new.data["name"], new.data["version"])))
        digests = f"digest {str(was)[:12]}, now {str(now)[:12]}"
        return f"images or labels of {name}, split {new.data['split']}, have changed ({digests})"
    return f"{_CONFIG_NAMES.get(name, name)} was {was!r} and is now {now!r}"


# Values of data.name for sets that have no name of their own: the name or the split in an identity may be another one.
_UNNAMED = (*SOURCES, "arrays")


def names_its_data(config: Config) -> bool:
    """Whether the data set and the split in an identity must be those in its configuration."""
    return base_name(config.data.name) not in _UNNAMED


def base_name(name: str) -> str:
    """The name of a data set without its version and the configuration of its builder."""
    return name.partition(":")[0].partition("/")[0]


def contradiction(identity: Identity, config: Config) -> str | None:
    """How an identity contradicts the configuration beside it, in one clause; None if it does not.

    `Identity.sampling_facts` has the fields that follow from the configuration.
    """
    kinds = identity.certificate, config.certify.certificate
    if kinds[0] != kinds[1]:
        return f"identity.certificate is {kinds[0]!r}, that of its configuration {kinds[1]!r}"
    if identity.certificate == "smoothed" and identity.prng != PRNG:
        return f"identity.prng is {identity.prng!r}, and every version draws with {PRNG!r}"
    if bool(identity.fallback) != bool(config.certify.fallback):
        return "only one of identity.fallback and certify.fallback names a fallback"
    model = config_to_dict(config)["model"]
    if {name: identity.model.get(name) for name in model} != model:
        return "identity.model is not the model of its configuration"
    if not names_its_data(config):
        return None
    for field, own, claimed in (
        ("name", base_name(config.data.name), base_name(str(identity.data.get("name")))),
        ("split", config.data.split, identity.data.get("split")),
    ):
        if own != claimed:
            return f"identity.data.{field} is {claimed!r}, that of its configuration {own!r}"
    return None


def schedule_of(config: Config) -> Schedule:
    """The sampling schedule of a configuration."""
    return make_schedule(config.certify.schedule, config.certify.n0, config.certify.n, config.certify.tile[1])


def arithmetic_facts(arithmetic: Arithmetic, latent_shape: tuple[int, ...]) -> dict[str, Any]:
    """The field ``arithmetic`` of an `Identity`, for latents of this shape."""
    return arithmetic.identity | {"sigma": arithmetic.sigma, "tau": arithmetic.tau(int(np.prod(latent_shape)))}
