"""The programs of docs/classifiers.md run; tests/smoothing/test_doors.py runs those of other libraries' heads."""

import re

import pytest

from support import ROOT

TEXT = (ROOT / "docs" / "classifiers.md").read_text(encoding="utf-8")
BEFORE, _, REST = TEXT.partition("## Heads from Flax Linen, NNX and Equinox")
PROGRAMS = re.findall(r"^```python\n(.*?)^```", BEFORE + REST.partition("\n## ")[2], re.M | re.S)


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_a_program_runs(number, capsys):
    if "import torch" in PROGRAMS[number]:
        pytest.importorskip("torch")
    exec(compile(PROGRAMS[number], f"program {number}", "exec"), {"__name__": "__main__"})
    assert ("print(" in PROGRAMS[number]) == bool(capsys.readouterr().out)
