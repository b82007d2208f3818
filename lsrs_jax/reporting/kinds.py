"""What kind of run a table is of: its method, its noise, and the configuration that it shares with other seeds."""

import dataclasses
import json
from typing import Any

from lsrs_jax.config import CALLER, config_from_dict, config_to_dict
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.validate import real

LSRS, ISRS, DETERMINISTIC, COMPOSED, UNKNOWN = "LSRS", "ISRS", "deterministic", "composition", ""
_ON_THE_IMAGE = ("identity", "lowpass", "lowpass_bands")  # encoders in front of which noise is that of input smoothing


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the files beside a table say about its method; runs with equal kinds differ only in their seeds."""

    method: str = UNKNOWN
    sigma: float | None = None  # None without noise, or if nothing says it
    family: str = ""  # the configuration without σ and seeds, as JSON; "" if it is not known


UNKNOWN_KIND = Kind()


def kind_of(content: dict[str, Any], config: dict[str, Any] | None = None) -> Kind:
    """The `Kind` that a certificates.json describes; `config` stands for one that the file does not hold.

    Another program may have written the file.
    """
    identity, config = content.get("identity"), config or content.get("config")
    if not isinstance(identity, dict) or not isinstance(model := identity.get("model"), dict):
        return UNKNOWN_KIND
    if identity.get("certificate") == "deterministic":
        return Kind(DETERMINISTIC, None, _family(config))
    sigma = found if (found := real(identity.get("sigma"))) > 0 else None
    if "fallback" in identity:
        return Kind(COMPOSED, sigma, _family(config))
    if model.get("head") == CALLER:  # nothing but a digest says which functions the caller gave
        return Kind(LSRS if model.get("encoder") == CALLER else UNKNOWN, sigma)
    split = model.get("split") if model.get("encoder") in ("blocks", "blocks_haar") else 1
    on_the_image = model.get("noise") == "input" or model.get("encoder") in _ON_THE_IMAGE or split == 0
    return Kind(ISRS if on_the_image else LSRS, sigma, _family(config))


def _family(config: Any) -> str:
    if not isinstance(config, dict):
        return ""
    try:
        shared = config_to_dict(config_from_dict(config))
    except UserError:
        return ""
    del shared["sigma"], shared["seed"], shared["certify"]["seed"]
    return json.dumps(shared, sort_keys=True)
