"""The functions and tests that docs/guarantee.md names exist."""

import importlib
import re

import pytest

from support.commands import ROOT

TEXT = (ROOT / "docs" / "guarantee.md").read_text(encoding="utf-8")
QUOTED = sorted(set(re.findall(r"`([\w.]+)`", TEXT)))
TESTS = [name for name in QUOTED if name.startswith("test_")]
NAMES = [name for name in QUOTED if "." in name and not name.startswith("certify.")]


def test_every_test_that_it_names_exists():
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    missing = [name for name in TESTS if f"def {name}(" not in sources]
    assert not missing
    assert len(TESTS) > 50


@pytest.mark.parametrize("name", NAMES)
def test_every_function_that_it_names_exists(name):
    path, found = name.split("."), importlib.import_module("lsrs_jax")
    for depth, part in enumerate(path, start=1):
        try:
            found = importlib.import_module("lsrs_jax." + ".".join(path[:depth]))
        except ModuleNotFoundError:
            found = getattr(found, part)
    assert found.__doc__ or isinstance(found, dict), name


def test_every_paragraph_of_the_proof_names_its_function_and_its_test():
    proof = TEXT[TEXT.index("*Proof.*") : TEXT.index("## What is not covered")]
    paragraphs = [part for part in proof.split("\n\n") if part.startswith(("**", "*Proof"))]
    assert len(paragraphs) > 20
    for paragraph in paragraphs:
        quoted = set(re.findall(r"`([\w.]+)`", paragraph))
        assert quoted & set(TESTS), paragraph[:60]
        assert quoted & set(NAMES), paragraph[:60]
