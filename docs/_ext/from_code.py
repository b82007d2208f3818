"""Makes the parts of the documentation that describe the code from the code: configuration, commands, experiments."""

import contextlib
import html
import importlib
import io
import re

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

from lsrs_jax import cli, flags
from lsrs_jax.config import FIELDS


def _cell(text):
    return html.escape(text, quote=False).replace("|", "\\|")


def configuration():
    """The fields of every section of a configuration as tables in Markdown."""
    lines, current = [], None
    for name, field in FIELDS.items():
        section = f"Fields of {name.partition('.')[0]}" if "." in name else "Fields without a section"
        if section != current:
            lines += ["", f"## {section}", "", "| field | default | meaning | values |", "|---|---|---|---|"]
            current = section
        words = field.limit.words if field.limit else ""
        lines.append(f"| `{name}` | `{field.default!r}` | {_cell(field.meaning)} | {_cell(words)} |")
    return lines


def commands():
    """The help text of every command."""
    lines = []
    for name, (module, what) in cli.COMMANDS.items():
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            importlib.import_module(f"lsrs_jax.{module}").run(["--help"])
        lines += ["", f"## {name}", "", f"{what[0].upper()}{what[1:]}.", ""]
        lines += ["```text", *out.getvalue().splitlines(), "```"]
    return lines


def experiments():
    """The configurations that come with the package, with the first line of each."""
    lines = ["| name | what it is |", "|---|---|"]
    for name, path in flags.experiments().items():
        found = re.match(r'"""(.+?)(\n\n|""")', path.read_text(encoding="utf-8"), re.S)
        lines.append(f"| `{name}` | {_cell(' '.join(found[1].split()))} |")
    return lines


class FromCode(SphinxDirective):
    """``{from-code} configuration``, ``commands`` or ``experiments``."""

    required_arguments = 1

    def run(self):
        made = {"configuration": configuration, "commands": commands, "experiments": experiments}[self.arguments[0]]()
        container = nodes.Element()
        self.state.nested_parse(StringList(made, source=self.arguments[0]), 0, container, match_titles=True)
        return container.children


def _cards_stand_alone(app, doctree):
    """The cards of published runs are linked from the tables of results and from no table of contents."""
    if re.fullmatch(r"results/[\w-]+/[^/]+/card", app.env.docname):
        app.env.metadata[app.env.docname]["orphan"] = True


def setup(app):
    app.add_directive("from-code", FromCode)
    app.connect("doctree-read", _cards_stand_alone)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
