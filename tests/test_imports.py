"""Effects of importing the package, and the order in which its folders may import each other."""

import ast
import json
import os
import subprocess
import sys

import pytest

from lsrs_jax.runtime.moved import MOVED
from support.commands import ROOT

PACKAGE = ROOT / "lsrs_jax"
HEAVY = ("orbax", "tensorstore", "tensorflow_datasets", "tensorflow", "grain", "matplotlib", "sklearn", "PIL", "plotly")
# Each entry may import only entries after it. `config` and the commands are files, the others are folders.
ORDER = [
    *(
        "__main__",
        "sweep",
        "train",
        "audit",
        "certify",
        "merge",
        "certify_torch",
        "report",
        "export",
        "show_config",
        "show_data",
    ),
    *("flags", "cli"),
    *("api", "reporting", "certification", "auditing", "training", "data", "models", "pytorch", "layers"),
    "orthogonal",
    *("config", "smoothing", "runtime"),
]
# The commands are not imported by `cli` at its top: they pass their names, and `cli` imports them to run them.
LOWEST = {"config": {"smoothing", "runtime"}, "orthogonal": {"runtime"}, "layers": {"orthogonal", "runtime"}}


def loaded(statement):
    """The modules that a statement loads in a new process, and whether signal handlers and streams stay the same."""
    code = f"""
import json, signal, sys
def state():
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    return handlers, sys.stdin, sys.stdout, sys.stderr, sys.unraisablehook
before = state()
{statement}
print(json.dumps([sorted(sys.modules), before == state()]))
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not found.stderr
    return json.loads(found.stdout)


@pytest.mark.parametrize(
    "name", ["lsrs_jax", "lsrs_jax.smoothing", "lsrs_jax.layers", "lsrs_jax.models", "lsrs_jax.cli"]
)
def test_an_import_has_no_side_effects_and_loads_nothing_heavy(name):
    modules, unchanged = loaded(f"import {name}")
    assert unchanged
    assert not [module for module in modules if module.partition(".")[0] in HEAVY]


def test_without_fcntl_the_api_works_and_a_command_that_writes_names_the_systems(tmp_path):
    """On Windows there is no fcntl."""
    code = f"""
import sys
sys.modules["fcntl"] = None
import jax, numpy as np
from lsrs_jax import smoothing
from lsrs_jax.certification import ledger, table
from lsrs_jax.runtime import errors, files
found = smoothing.certify(lambda z: z, np.eye(2), sigma=0.1, key=jax.random.key(0, impl="threefry2x32"), n=100)
assert found.predict.tolist() == [0, 1]
try:
    with files.locked(files.Path({str(tmp_path / "lock")!r}), "training"):
        pass
except errors.UserError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout == f"the commands that write run on Linux and macOS, not on {sys.platform}: no locks\n"


def test_the_statistics_work_without_jax_and_the_sampler_without_flax():
    modules, _ = loaded("import lsrs_jax.smoothing")
    ours = {module for module in modules if module.startswith("lsrs_jax")}
    assert not {"jax", "flax", "ml_collections", "absl"} & set(modules)
    assert ours == {
        "lsrs_jax",
        "lsrs_jax.runtime",
        *(f"lsrs_jax.runtime.{name}" for name in ("errors", "format", "moved", "validate")),
        "lsrs_jax.smoothing",
        *(f"lsrs_jax.smoothing.{name}" for name in ("anytime", "confidence", "counts", "derivation", "schedule")),
    }
    modules, unchanged = loaded("from lsrs_jax.smoothing import certify")
    assert unchanged
    assert "jax" in modules
    assert not {"flax", "ml_collections", "absl"} & set(modules)


def imports(path):
    """The folders and files of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lsrs_jax":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]


def test_imports_point_one_way():
    imported = {}
    for path in PACKAGE.rglob("*.py"):
        folder = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        imported.setdefault(folder, set()).update(set(imports(path)) - {folder, "__version__"})
    imported.pop("__init__")
    assert set(imported) == set(ORDER)
    for folder, found in imported.items():
        assert found <= set(ORDER), folder
        assert all(ORDER.index(other) > ORDER.index(folder) for other in found), (folder, found)
        assert found <= LOWEST.get(folder, found), folder


def test_no_alias_hides_a_collision_and_no_file_is_long():
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 350, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lsrs_jax"):
                assert not [alias.asname for alias in node.names if alias.asname], path
            if isinstance(node, ast.FunctionDef):
                docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
                assert node.end_lineno - node.lineno + 1 - docstring <= 60, (path, node.name)


@pytest.mark.parametrize("name", sorted(MOVED))
def test_an_old_import_path_works_with_a_warning(name):
    code = f"import {name} as old, {MOVED[name]} as new; assert old is new; assert new.__spec__.name == {MOVED[name]!r}"
    found = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"DeprecationWarning: {name} has moved to {MOVED[name]}" in found.stderr


def test_public_names_stay():
    code = """
from lsrs_jax.layers import Encoder, MaxMin, OrthogonalConv, OrthogonalDense
from lsrs_jax.orthogonal import ConvShape, build_kernels, family
from lsrs_jax.smoothing import Certificates, SmoothedClassifier, certify, predict, certified_radius, from_counts
from lsrs_jax.margin import certified_margin
"""
    environment = os.environ | {"PYTHONWARNINGS": "error::DeprecationWarning:__main__"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
