"""Certify a trained classifier.

  python -m lsrs_jax.certify --workdir=runs/digits
  python -m lsrs_jax.certify --workdir=runs/digits --config.certify.n=100000 --config.certify.name=full
  python -m lsrs_jax.certify --workdir=runs/x --config.certify.certificate=deterministic --config.certify.name=margin

The configuration comes from the workdir; flags override it. Writes the vote ledgers, certificates.tsv and
certificates.json into <workdir>/certify/<name>. The same command resumes an interrupted certification, on any number
of devices and processes (docs/scale.md); with --from-counts it derives new certificates from the votes on disk, with
another alpha or bound, without the model or the data; with --verify it derives every radius again, compares digests,
and names the first line that differs; with --recast=N it does that and casts the votes of N images again, drawn anew
each time, from the pixels on. Deterministic certificates take no votes: they are the margins of a linear head
(model.head linear, normalized or orthogonal).
"""

from lsrs_jax import command, interrupt, models, profiling
from lsrs_jax import config as configuration
from lsrs_jax import workdir as workdirs
from lsrs_jax.certification import deterministic, folder, recast, smoothed, verify
from lsrs_jax.certification import job as jobs
from lsrs_jax.distributed import cache_compilations, started
from lsrs_jax.errors import UserError


def _derived_as(chosen, workdir, place):
    """The configuration of the training, but for how the certificates of a folder were derived; says what is kept."""
    config = configuration.load(workdir / "config.json")
    for name in smoothed.DERIVED:
        kept, trained = chosen.certify[name], config.certify[name]
        if kept != trained:
            config.certify[name] = kept
            print(f"{place} was derived with {name} {kept}, which holds unless --config.certify.{name} is given")
    return config


def run(arguments):
    """The command; see the module's docstring."""
    command.no_config_file("certify", arguments)
    parser = command.parser("certify", __doc__)
    parser.add_argument("--workdir", required=True, type=command.workdir, help="folder of a training, or gs://...")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--from-counts", action="store_true", help="derive from the votes on disk; sample nothing")
    instead.add_argument("--verify", action="store_true", help="derive every radius again and compare; change nothing")
    instead.add_argument("--recast", type=int, metavar="N", help="--verify, and cast the votes of N images again")
    profiling.add_argument(instead)
    options, rest = parser.parse_known_args(arguments)
    if options.recast is not None and options.recast < 1:
        raise UserError(f"--recast takes a number of images, at least 1, got {options.recast}")
    with started() as process, workdirs.opened(options.workdir) as workdir:
        _run(workdir, process, options, rest)


def _run(workdir, process, options, rest):
    config = command.config_of_training(workdir.path, rest)
    place = workdir.path / "certify" / config.certify.name
    if (options.verify or options.recast or options.from_counts) and process.count > 1:
        raise UserError(
            "--from-counts, --verify and --recast are for one process; start it alone, or with JAX_DISTRIBUTED=off"
        )
    if options.verify or options.recast:
        fields = ("certify.name", "data.dir") if options.recast else ("certify.name",)
        command.only(workdir.path, config, fields, "--recast" if options.recast else "--verify")
        with interrupt.reading():
            stored = verify.run(place)
            if options.recast:
                cache_compilations()
                recast.run(jobs.of_certificates(place, stored, config.data.dir), stored, options.recast)
        return
    path = place / "certificates.json"
    if path.exists():  # what was chosen then holds, but for what is chosen now
        chosen = configuration.from_dict(folder.read(path)["config"])
        config = command.config_from_flags(
            rest, chosen if options.from_counts else _derived_as(chosen, workdir.path, place)
        )
    if options.from_counts:
        smoothed.from_counts(place, config)
        return
    cache_compilations()
    with process.together("the start"):
        job = jobs.load(workdir.path, config)
    print(models.describe(job.model))
    if config.certify.certificate == "smoothed":
        with profiling.captured(options.profile if process.leads else None, workdir.path / "profile") as tick:
            smoothed.run(job, process, workdir, tick)
    else:
        if process.leads:
            deterministic.run(job)
        process.wait("the certificates")


if __name__ == "__main__":
    command.main(run)
