"""How the certificates of a run were sampled: what a reader must know to compare its average certified radius."""

import dataclasses
from typing import Any

from lsrs_jax.runtime.errors import UserError
from lsrs_jax.smoothing.derivation import Derivation
from lsrs_jax.smoothing.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The samples behind a table of smoothed certificates."""

    n: int  # estimation samples of an image, at most
    alpha: float  # per image
    cap: float  # the radius if all samples agree: no radius, and no average of radii, is larger


def sampling_of(content: dict[str, Any]) -> Sampling | None:
    """The `Sampling` that a certificates.json describes; None if it does not, as for deterministic certificates.

    Another program may have written the file.
    """
    try:
        identity, derived = content["identity"], content["derivation"]
        facts = identity["arithmetic"]
        settings = {"sigma": facts["sigma"], "tau": facts["tau"], "lipschitz": content["lipschitz"]["constant"]}
        derivation = Derivation(alpha=derived["alpha"], bound=derived["bound"], **settings)
        anytime = identity["schedule"] == "anytime"
        schedule = Schedule(identity["n0"], tuple(identity["stages"]), identity["tile"][1], anytime)
    except (LookupError, TypeError, UserError):
        return None
    return Sampling(schedule.n, derivation.alpha, derivation.largest_radius(schedule))
