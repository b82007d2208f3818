"""The names and parameters that docs/stability.md promises, and what an import of them loads."""

import inspect
import json
import pkgutil
import subprocess
import sys

import pytest

from lsrs_jax import cli
from support import ROOT

PAGE = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
_SAMPLING = "n0 n alpha bound schedule radii epsilon"
_ATTACKS = "fractions restarts steps samples votes"
_WAYS = "arithmetic noise tile spmd"
_FLAGS = "channels_last integer_first_layer"
_MADE = f"head sigma encoder lipschitz class_names {_WAYS} devices {_FLAGS} fallback"
PARAMETERS = {
    "lsrs_jax.SmoothedClassifier": _MADE,
    "lsrs_jax.smoothing.SmoothedClassifier": _MADE,
    "lsrs_jax.SmoothedClassifier.certify": f"self x labels out key {_SAMPLING} slack counts name progress",
    "lsrs_jax.SmoothedClassifier.predict": "self x key n alpha details",
    "lsrs_jax.SmoothedClassifier.soft_logits": "self x key samples",
    "lsrs_jax.SmoothedClassifier.audit": f"self x labels certificates out name {_ATTACKS} alpha progress",
    "lsrs_jax.SmoothedClassifier.export": "self path input_shape batch n alpha platforms",
    "lsrs_jax.load": "source step allow_code",
    "lsrs_jax.from_torch": "module example_input layout",
    "lsrs_jax.pytorch.torch_callback": "module num_classes layout",
    "lsrs_jax.pytorch.read_checkpoint": "path arch normalize",
    "lsrs_jax.models.register_head": "name make",
    "lsrs_jax.smoothing.certify": f"head latents sigma key {_SAMPLING} lipschitz slack {_WAYS} {_FLAGS} progress",
    "lsrs_jax.smoothing.predict": f"head latents sigma key n alpha {_WAYS} {_FLAGS}",
    "lsrs_jax.smoothing.FirstLayer": "kernel bias strides padding",
    "lsrs_jax.smoothing.certified_radius": "p_a_lower p_b_upper sigma lipschitz slack",
    "lsrs_jax.smoothing.compose": "fallback first kappa",
    "lsrs_jax.smoothing.from_counts": "selection estimation sigma alpha bound looks horizon lipschitz slack tau",
    "lsrs_jax.margin.certified_margin": "logits weights lipschitz slack",
    "lsrs_jax.config.default": "",
    "lsrs_jax.training.fit": "config data test workdir class_names",
    "lsrs_jax.data.load": "name split data_dir size fields",
    "lsrs_jax.data.from_arrays": "images labels class_names name split layout",
    "lsrs_jax.layers.OrthogonalConv": None,
    "lsrs_jax.layers.OrthogonalDense": None,
    "lsrs_jax.layers.MaxMin": None,
    "lsrs_jax.layers.encoder_selectivity": "inputs latents labels lipschitz",
    "lsrs_jax.layers.lipschitz_report": "module variables input_shape",
    "lsrs_jax.layers.materialize_network": "module variables input_shape",
    "lsrs_jax.orthogonal.build_kernels": None,
}
LIGHT = {"jax", "jaxlib", "flax", "numpy", "scipy", "lsrs_jax"}
# What jax, flax and jaxtyping themselves load.
THEIRS = {"jaxtyping", "wadler_lindig", "ml_dtypes", "opt_einsum", "msgpack", "rich", "typing_extensions", "treescope"}
DATA = {"PIL", "tensorflow_datasets", "grain", "orbax", "optax", "matplotlib", "sklearn", "datasets", "tensorflow"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_public_name_has_its_parameters(name):
    found = pkgutil.resolve_name(name)
    if PARAMETERS[name] is not None:
        assert " ".join(inspect.signature(found).parameters) == PARAMETERS[name]
    assert name.rpartition(".")[2] in PAGE or f"`{name.rpartition('.')[0]}`" in PAGE


def test_every_command_is_promised():
    assert all(f"`{name}`" in PAGE for name in cli.COMMANDS)


def loaded(statement):
    code = f"import json, sys; {statement}; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(found.stdout))


def test_an_import_of_a_public_name_loads_no_more_than_it_needs():
    alone = loaded("import jax, numpy, scipy.special, scipy.stats")
    for statement in ("from lsrs_jax import SmoothedClassifier", "from lsrs_jax.smoothing import certify"):
        own = loaded(statement) - alone - set(sys.stdlib_module_names)
        assert own <= LIGHT - {"flax"} | THEIRS, own
    assert not loaded("from lsrs_jax.layers import OrthogonalConv") & DATA
