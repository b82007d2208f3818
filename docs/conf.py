"""Settings of Sphinx for the documentation: `make docs` builds it into docs/_build/html."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]
# The tutorials run in processes of their own: they import this clone and find its commands, on the CPU, and their cells
# print no warnings of libraries.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["PYTHONWARNINGS"] = "ignore"

import lsrs_jax  # noqa: E402

project = "lsrs_jax"
author = "The lsrs_jax authors"
copyright = author
version = release = lsrs_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "from_code",
]
exclude_patterns = ["_build", "_ext", "schemas", "**/.ipynb_checkpoints"]
templates_path = []
smartquotes = False
suppress_warnings = ["config.cache"]

# Pages
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_timeout = 600
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

# Docstrings are in the style of Google, with names in single backticks.
default_role = "py:obj"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 80

html_theme = "sphinx_book_theme"
html_title = "lsrs_jax"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_copyright = False
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
}
