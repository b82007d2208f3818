"""Types that several folders share."""

from typing import Any, TypeAlias

# A `ml_collections.ConfigDict` with the fields of `lsrs_jax.config.FIELDS`, which no type checker can know.
Config: TypeAlias = Any
