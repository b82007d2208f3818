"""A trained network in one file: parameters as safetensors, with the configuration and the classes in its header."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lsrs_jax import models
from lsrs_jax.config import check_config, config_from_dict, config_to_dict
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import write_atomic
from lsrs_jax.runtime.types import Config
from lsrs_jax.runtime.validate import is_whole
from lsrs_jax.training.checkpoint import digest

_KEY = "lsrs_jax"  # of the header's entry; on-disk format
_MOST = 2**31  # bytes of a file


def save(path: Path, config: Config, model: models.Model, params: Any, class_names: tuple[str, ...], step: int) -> None:
    """Writes a network into a safetensors file, without executable content."""
    from safetensors.numpy import save as to_bytes

    leaves = {_name(key): np.ascontiguousarray(leaf) for key, leaf in jax.tree_util.tree_leaves_with_path(params)}
    facts = {"config": config_to_dict(config), "input_shape": list(model.input_shape), "step": int(step)}
    facts |= {"class_names": list(class_names), "digest": digest(params)}
    write_atomic(path, to_bytes(leaves, {_KEY: json.dumps(facts, sort_keys=True)}))


def read(path: Path) -> tuple[Config, models.Model, Any, tuple[str, ...]]:
    """Configuration, model, parameters and class names of a file from `save`; raises UserError for any other file."""
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load as from_bytes

    if not path.is_file() or path.stat().st_size > _MOST:
        raise UserError(f"{path} is no file of a network")
    try:
        with safe_open(path, "numpy") as file:
            facts = json.loads((file.metadata() or {})[_KEY])
        arrays = from_bytes(path.read_bytes())
        config = check_config(config_from_dict(facts["config"]))
        names, shape = tuple(map(str, facts["class_names"])), tuple(facts["input_shape"])
        if not all(is_whole(size) and size >= 1 for size in shape):
            raise ValueError("its input_shape is wrong")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{path} is not a file from the command export, or it is damaged ({error})") from error
    model = models.build(config.model, shape, len(names))
    wanted = jax.tree_util.tree_leaves_with_path(model.shapes()[0])
    fits = {_name(key): (leaf.shape, np.dtype(leaf.dtype)) for key, leaf in wanted}
    if {name: (array.shape, array.dtype) for name, array in arrays.items()} != fits:
        raise UserError(f"{path} is damaged: its parameters are not those of its configuration")
    params = jax.tree.unflatten(jax.tree.structure(model.shapes()[0]), [arrays[_name(key)] for key, _ in wanted])
    if digest(params) != facts["digest"]:
        raise UserError(f"{path} is damaged: the digest of its parameters is another one; restore it")
    return config, model, params, names


def _name(path: Any) -> str:
    return "/".join(str(entry.key) for entry in path)
