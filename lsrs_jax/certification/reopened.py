"""A certification as its files describe it, without model and data."""

from pathlib import Path

from lsrs_jax.certification import OTHER_NAME, fallback, store
from lsrs_jax.certification.identity import arithmetic_facts
from lsrs_jax.certification.inputs import Inputs
from lsrs_jax.certification.smoothed import Certification
from lsrs_jax.config import config_to_dict
from lsrs_jax.runtime import documents
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.format import FORMAT
from lsrs_jax.runtime.types import Config
from lsrs_jax.smoothing.arithmetic import make_arithmetic


def reopen(folder: Path, config: Config, stored: store.Stored, rule: int = FORMAT) -> Certification:
    """The `Certification` of the ledgers in a folder, from its certificates.json. `rule` is that of `Certification`.

    Raises UserError if the samples were drawn under another configuration, or if numbers that determine the radii
    contradict each other.
    """
    identity, certify, facts = stored.identity, config.certify, stored.identity.arithmetic or {}
    wanted = identity.sampling_facts(config) | {"arithmetic": certify.arithmetic}
    drawn = {name: getattr(identity, name) for name in wanted} | {"arithmetic": facts.get("name")}
    wanted, drawn = wanted | {"fallback": bool(certify.fallback)}, drawn | {"fallback": bool(identity.fallback)}
    own, claimed = (
        {"data": {name: one["data"][name] for name in ("name", "split", "size")}, "model": one["model"]}
        for one in (config_to_dict(stored.settings), config_to_dict(config))
    )
    derivable = f"only alpha, bound, radii and epsilon can be derived anew; {OTHER_NAME}"
    for was, now, remedy in ((drawn, wanted, derivable), (own, claimed, "leave that flag out")):
        if difference := documents.first_difference(was, now):
            name, old, new = difference
            raise UserError(f"the samples in {folder} were drawn with {name} {old!r}, not {new!r}: {remedy}")
    arithmetic = make_arithmetic(certify.arithmetic, config.sigma)
    if facts != arithmetic_facts(arithmetic, stored.lipschitz.output_shape):
        why = "its arithmetic does not fit the configuration and the latent"
        raise UserError(f"{folder / 'certificates.json'} is damaged ({why}); restore it, or {OTHER_NAME}")
    certification = Certification(folder, config, identity, stored.lipschitz, rule=rule)
    answers = fallback.read(folder, (stored.derivation or {}).get("fallback"), identity.classes)
    if identity.fallback and answers is None:
        raise UserError(f"{folder} has a fallback and no certificates yet: run certify without --from-counts first")
    certification.take_fallback(answers)
    if identity.streamed:
        certification.inputs = Inputs(folder, (stored.derivation or {}).get("inputs"))
    certification.record, certification.stored = stored.record, stored
    return certification
