"""The pages of the documentation: their code, and the command lines in them."""

import ast
import re
import shlex

from lsrs_jax import cli
from support import ROOT

# The cards of published runs are written by a program.
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")),
    *sorted(page for page in ROOT.glob("docs/**/*.md") if page.name != "card.md" and "_build" not in page.parts),
]
SOURCES = [
    path
    for folder in ("lsrs_jax", "configs", "studies", "benchmarks")
    for path in sorted(ROOT.glob(f"{folder}/**/*.py"))
]
_BLOCK = re.compile(r"^ *```(\S*)[^\n]*\n(.*?)^ *```", re.M | re.S)
_INLINE = re.compile(r"`((?:lsrs|make|python -m|launch/)[ /][^`]+)`", re.S)
_SHELL = ("", "bash", "sh", "console")


def text(page):
    return page.read_text(encoding="utf-8")


def name(page):
    return page.relative_to(ROOT).as_posix()


def programs(page):
    """(number, program) of every block ``python`` of a page."""
    found = [code for language, code in _BLOCK.findall(text(page)) if language == "python"]
    return list(enumerate(found))


def docstrings(path):
    """The docstrings of a file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text(path))) if isinstance(node, kinds)]
    return [found for node in nodes if (found := ast.get_docstring(node))]


def shell_text(page):
    """The shell blocks of a page, the lines of its notebook cells that begin with !, and its commands in backticks."""
    blocks = _BLOCK.findall(text(page))
    lines = [code for language, code in blocks if language in _SHELL]
    cells = "\n".join(code for language, code in blocks if language == "{code-cell}")
    lines += re.findall("^!(.*)", cells, re.M)
    prose = _BLOCK.sub("", text(page))
    return [*lines, *(" ".join(found.split()) for found in _INLINE.findall(prose))]


def command_lines(texts):
    """The words of every command of this project in these texts, e.g. ["lsrs", "train", "--workdir=DIR"]."""
    for part in texts:
        for line in part.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s#.*", "", line.strip().removeprefix("$ "))
            if line.startswith("lsrs  "):  # a table: a variant of this name, and what it is
                continue
            for piece in re.split(r"\s(?:&&|\||;)\s|;\s", line):
                words = _words(piece)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    del words[0]
                if words[:2] == ["python", "-m"] and words[2:]:
                    words = _as_module(words[2], words[3:])
                if words and (words[0] in ("lsrs", "make", "module") or words[0].startswith("launch/")):
                    yield words


def _as_module(module, rest):
    package, _, command = module.partition(".")
    if package != "lsrs_jax":
        return ["module", module, *rest]
    names = {module: name for name, (module, _) in cli.COMMANDS.items()}
    return ["lsrs", *([names.get(command, command)] if command else []), *rest]


def _words(piece):
    try:
        return shlex.split(piece)
    except ValueError:  # prose
        return []
