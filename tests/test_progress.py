"""Progress: a bar on a terminal, lines elsewhere, and a first line at once."""

import io
import subprocess
import sys

import pytest

from lsrs_jax import cli
from lsrs_jax.api.arguments import reporter
from lsrs_jax.runtime import progress
from lsrs_jax.runtime.progress import Update, print_now
from support import ROOT


class Terminal(io.StringIO):
    def isatty(self):
        return True


UPDATES = [
    Update(["    10 of 40 images decided", "1,000 samples per image", "20,000 samples/s", "3.0 s left"], 10, 40, 0.5),
    Update(["    40 of 40 images decided", "1,000 samples per image", "20,000 samples/s"], 40, 40),
]


def shown(stream, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", stream)
    for line in ("before", *UPDATES, "after"):
        print_now(line)
    return stream.getvalue()


def test_lines_where_the_output_is_no_terminal(monkeypatch):
    assert shown(io.StringIO(), monkeypatch, 80) == f"before\n{UPDATES[0]}\n{UPDATES[1]}\nafter\n"
    assert str(UPDATES[0]) == "    10 of 40 images decided  1,000 samples per image  20,000 samples/s  3.0 s left"
    assert UPDATES[0].noted("(of a share)").endswith("3.0 s left  (of a share)")


@pytest.mark.parametrize(("columns", "kept"), [(60, ""), (85, "1,000 samples per image  ")])
def test_a_bar_on_a_terminal_that_leaves_no_trace(monkeypatch, columns, kept):
    written = shown(Terminal(), monkeypatch, columns)
    assert " 50% |" in written
    assert f"| 10 of 40 images decided  {kept}3.0 s left" in written
    lines = [line.split("\r")[-1] for line in written.split("\n")]
    assert lines == ["before", str(UPDATES[1]), "after", ""]
    assert max(len(part) for line in written.split("\n") for part in line.split("\r") if "%" in part) <= columns
    assert not progress._bars


def test_the_bar_stays_until_every_image_is_decided(monkeypatch):
    """The samples of the last images are drawn a little before it is known that they are decided."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    print_now(Update(["    10 of 40 images decided", "0 ms left"], 10, 40, 1.0))
    assert "\n" not in stream.getvalue()
    assert len(progress._bars) == 1
    progress.remove_bar()


def test_progress_of_the_interface_can_be_true_or_false(capsys):
    reporter(True)(UPDATES[0])
    reporter(False)(UPDATES[0])
    assert capsys.readouterr().out == f"{UPDATES[0]}\n"


def test_the_first_line_comes_before_the_libraries():
    code = "import sys; sys.modules['jax'] = None; sys.argv = ['lsrs', *sys.argv[1:]]; "
    code += "from lsrs_jax.cli import main; main()"
    assert {"train", "certify", "audit"} < set(cli.COMMANDS) - set(cli._QUICK)
    for flags, pipe in (([], "stdout"), (["--json"], "stderr")):
        found = subprocess.run([sys.executable, "-c", code, "audit", *flags], cwd=ROOT, capture_output=True, text=True)
        assert getattr(found, pipe).startswith("audit: loading JAX ...\n")
