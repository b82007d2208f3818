"""Deterministic certificates in one call; the functions are in `lsrs_jax.certification.margin`."""

from lsrs_jax.certification.margin import certified_margin, float64_slack

__all__ = ["certified_margin", "float64_slack"]
