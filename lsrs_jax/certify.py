"""Certify a trained classifier.

  python -m lsrs_jax.certify --workdir=runs/digits
  python -m lsrs_jax.certify --workdir=runs/digits --config.certify.n=100000 --config.certify.name=full
  python -m lsrs_jax.certify --workdir=runs/x --config.certify.certificate=deterministic --config.certify.name=margin

The configuration comes from the workdir; flags override it. Writes the vote ledger, certificates.tsv and
certificates.json into <workdir>/certify/<name>. The same command resumes an interrupted certification, on any number
of devices; with --from-counts it derives new certificates from the votes on disk, with another alpha or bound, without
the model or the data. Deterministic certificates take no
votes: they are the margins of a linear head (model.head linear, normalized or orthogonal).
"""

import jax

from lsrs_jax import checkpoint, command, models
from lsrs_jax import config as configuration
from lsrs_jax import data as datasets
from lsrs_jax.certification import deterministic, smoothed
from lsrs_jax.certification.folder import Job
from lsrs_jax.distributed import cache_compilations
from lsrs_jax.errors import UserError
from lsrs_jax.keys import pinned, root_key


def run(arguments):
    """The command; see the module's docstring."""
    parser = command.parser("certify", __doc__)
    parser.add_argument("--workdir", required=True, type=command.folder, help="folder of a training")
    parser.add_argument("--from-counts", action="store_true", help="derive from the votes on disk; sample nothing")
    options, rest = parser.parse_known_args(arguments)
    stored_config = options.workdir / "config.json"
    if not stored_config.exists():
        raise UserError(
            f"{options.workdir} holds no training: run python -m lsrs_jax.train --workdir={options.workdir} ..."
        )
    trained = configuration.load(stored_config)
    network = configuration.to_dict(trained.model)
    config = command.config_from_flags(rest, trained)
    difference = configuration.first_difference(network, configuration.to_dict(config.model), ("noise",))
    if difference:
        name, old, new = difference
        raise UserError(f"the network was trained with model.{name}={old!r}, not {new!r}; train that one first")
    certify = config.certify
    if options.from_counts:
        smoothed.from_counts(options.workdir / "certify" / certify.name, config)
        return
    cache_compilations()
    dataset = datasets.load(config.data.name, config.data.split, config.data.dir)
    indices = range(certify.start, min(certify.stop or len(dataset), len(dataset)), certify.step)
    if not len(indices):
        raise UserError(f"no image to certify: certify.start={certify.start} in a split of {len(dataset)}")

    model = models.build(config.model, dataset.shape, dataset.num_classes)
    with pinned():
        target = jax.eval_shape(model.init, root_key(0))
    params, meta = checkpoint.restore_model(options.workdir, target)
    if meta["step"] < config.train.steps:
        print(f"note: the training stopped at step {meta['step']} of {config.train.steps}")
    print(models.describe(model))
    job = Job(config, options.workdir / "certify" / certify.name, dataset, indices, model, params, meta)
    (smoothed if certify.certificate == "smoothed" else deterministic).run(job)


if __name__ == "__main__":
    command.main(run)
