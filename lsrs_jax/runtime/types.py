"""Types that several folders share."""

from typing import Any, TypeAlias

# A `ml_collections.ConfigDict` with the fields of `lsrs_jax.config.FIELDS`. A type checker cannot know these fields.
Config: TypeAlias = Any
