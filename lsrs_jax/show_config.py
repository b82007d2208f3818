"""Print every field of a configuration with its value, its default and its meaning.

  python -m lsrs_jax.show_config
  python -m lsrs_jax.show_config digits
  python -m lsrs_jax.show_config digits:isrs --config.certify.n=1000

NAME is an experiment that comes with the program, a file, or the workdir of a training. Without it, the command prints
the names of the experiments, and the defaults.
"""

if __name__ == "__main__":
    from lsrs_jax.cli import main

    main("show_config")

from pathlib import Path

from lsrs_jax import cli
from lsrs_jax.config import FIELDS, default, load_config, value_of
from lsrs_jax.flags import config_from_flags, experiments


def run(arguments: list[str]) -> None:
    """The command; see the module's docstring."""
    parser = cli.parser("show_config", __doc__, (), "[NAME[:VARIANT]] [--config.FIELD=VALUE ...]")
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="an experiment, a file, or a workdir")
    options, rest = parser.parse_known_args(arguments)
    workdir = Path(options.name or ".").expanduser()
    if options.name and workdir.is_dir():
        config = config_from_flags(rest, load_config(workdir / "config.json").copy_and_resolve_references())
    elif options.name or any(flag.startswith("--config=") for flag in rest):
        config = config_from_flags([*[f"--config={options.name}"] * bool(options.name), *rest])
    else:
        config = config_from_flags(rest, default())
        print(f"experiments: {', '.join(experiments())}\n")
    for name, field in FIELDS.items():
        value = value_of(config, name)
        changed = "" if value == field.default else f"   (default: {field.default!r})"
        print(f"{name} = {value!r}{changed}\n    {field.meaning}")
        if field.limit:
            print(f"    It must be {field.limit.words.format(**config)}.")
