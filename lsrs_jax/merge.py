"""Join the shards of a certification into one folder of certificates.

  python -m lsrs_jax.merge --workdir=runs/digits
  python -m lsrs_jax.merge --workdir=runs/digits copies/first copies/second
  python -m lsrs_jax.merge --workdir=runs/digits --config.certify.name=full

Each process of `certify --shard=i/N` writes a folder of its own, <workdir>/shards/<name>-<i>-of-<N>. The command joins
these folders into <workdir>/certify/<name>, as if one process had certified everything. PART is the folder of a shard,
or a copy of the workdir on which shards were certified; without PART, the shards in the workdir itself are joined.
Shards may be unfinished or missing: the command says how many images have no certificate, and the same command adds
what came later. It refuses shards of another run, naming the difference, and images with different samples in two of
them.
"""

if __name__ == "__main__":
    from lsrs_jax.cli import main

    main("merge")

from pathlib import Path

from lsrs_jax import cli
from lsrs_jax.certification import shards
from lsrs_jax.flags import config_of_training
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.workdir import opened


def run(arguments: list[str]) -> None:
    """The command; see the module's docstring."""
    parser = cli.parser("merge", __doc__, ("certify.name",), "--workdir=DIR [PART ...] [--config.certify.name=NAME]")
    parser.add_argument("--workdir", required=True, type=cli.workdir, help="folder of a training, or gs://...")
    parser.add_argument(
        "parts", nargs="*", type=cli.folder, metavar="PART", help="folder of a shard, or of its workdir"
    )
    options, rest = parser.parse_known_args(arguments)
    with opened(options.workdir) as workdir:
        config = config_of_training(workdir.path, rest, "merge", ("certify.name",))
        parts = _parts(options.parts or [workdir.path], config.certify.name)
        shards.merge(workdir.path / "certify" / config.certify.name, parts)


def _parts(given: list[Path], name: str) -> list[Path]:
    """The folders of the shards that are meant; raises UserError where there are none."""
    found = list[Path]()
    for path in given:
        own = [path] if (path / "certificates.json").exists() else shards.begun(path, name)
        if not own:
            remedy = "certify --shard=i/N makes them, under the name that --config.certify.name gives"
            raise UserError(f"{path} holds no shard of {name!r}: {remedy}")
        found += own
    return list(dict.fromkeys(found))
