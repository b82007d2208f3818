"""The files that are kept of a run under docs/results: its certificates, run.json and a model card, but no weights."""

import dataclasses
import json
import shutil

import jax
import numpy as np

from lsrs_jax import models
from lsrs_jax.certification.table import Table, read_table
from lsrs_jax.config import config_to_dict, load_config
from lsrs_jax.data import load_split
from lsrs_jax.layers import encoder_selectivity
from lsrs_jax.models.encoders import BLOCKS
from lsrs_jax.reporting.sampling import sampling_of
from lsrs_jax.runtime import documents
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.files import write_atomic
from lsrs_jax.runtime.progress import duration
from lsrs_jax.training.checkpoint import restore
from studies.runs import DECIDED

PAIRED = 500  # images whose distances are compared
RADII = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class Result:
    """What is kept of one run."""

    name: str  # of its folder
    facts: dict  # run.json: commands, config, cost, distances, training, and, where a run decides a radius, decided
    certificates: dict  # certificates.json
    table: Table  # certificates.tsv

    p_a_lower: np.ndarray  # of the images; 0 without noise

    @property
    def smoothed(self):
        return self.certificates["identity"]["certificate"] == "smoothed"

    @property
    def measured(self):
        """Whether radii were measured, or sampling stopped when it was known which of some radii they reach."""
        return not self.certificates["derivation"].get("radii")

    @property
    def sampling(self):
        """The `Sampling` of smoothed certificates; None for deterministic ones."""
        return sampling_of(self.certificates)

    @property
    def cost(self):
        return models.Cost(self.facts["cost"]["encoder_flops"], self.facts["cost"]["head_flops"])

    @property
    def latent(self):
        """The shape of the arrays to which the noise is added."""
        return "x".join(map(str, self.certificates["lipschitz"]["output_shape"]))


def load(folder):
    """The `Result` in a folder; raises UserError where a file is missing or damaged."""
    try:
        facts, certificates = (json.loads((folder / name).read_text()) for name in ("run.json", "certificates.json"))
        table = folder / "certificates.tsv"
        first, *lines = (line.split("\t") for line in table.read_text(encoding="utf-8").splitlines())
        column = first.index("p_a_lower") if "p_a_lower" in first else None
        bounds = np.array([0.0 if column is None else float(line[column]) for line in lines])
        return Result(folder.name, facts, certificates, read_table(table), bounds)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} holds no complete run ({error}): make it with python -m studies run") from error


def keep(workdir, folder, commands, decides=None):
    """Copies the certificates of a workdir, and writes run.json and, last, card.md, which marks the run as complete.

    `decides` is the radius of a run that decides one.
    """
    source = workdir / "certify" / "default"
    config = load_config(workdir / "config.json")
    dataset, config.data.dir = load_split(config.data, config.data.split), ""
    model = models.build(config.model, dataset.shape, len(dataset.class_names))
    cost = models.cost(model)
    facts = {
        "commands": commands,
        "config": config_to_dict(config),
        "cost": {"encoder_flops": cost.encoder, "head_flops": cost.head},
        "distances": _distances(model, workdir, dataset),
        "training": _training(workdir / "metrics.jsonl"),
    }
    if decides is not None:
        facts["decided"] = _decided(workdir / "certify", decides)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("certificates.tsv", "certificates.json"):
        shutil.copyfile(source / name, folder / name)
    write_atomic(folder / "run.json", json.dumps(facts, indent=1) + "\n")
    write_atomic(folder / "card.md", card(load(folder)))


def _decided(certified, radius):
    """What it takes to decide a radius: estimation and selection samples and seconds, means over the images.

    The margins of a deterministic certification decide it without samples.
    """
    kind = documents.read_json(certified / "default" / "certificates.json")["identity"]["certificate"]
    folder = certified / (DECIDED if kind == "smoothed" else "default")
    table, stored = read_table(folder / "certificates.tsv"), documents.read_json(folder / "certificates.json")
    samples = 0.0
    if kind == "smoothed":
        samples = float(table.samples.mean()) + stored["identity"]["n0"]
        if stored["derivation"]["radii"] != [radius]:
            raise UserError(f"{folder} decides the radii {stored['derivation']['radii']}, not {radius}")
    return {"radius": radius, "samples": samples, "seconds": float(table.seconds.mean())}


def _distances(model, workdir, dataset):
    """Median ratio of the distances between two images after and before the encoder, within and across classes."""
    some = np.linspace(0, len(dataset) - 1, min(PAIRED, len(dataset))).astype(int)
    images, labels = dataset.read(some, np.float32)
    latents = np.asarray(jax.jit(model.encode)(restore(workdir, model)[0], images), np.float64)
    found = encoder_selectivity(images, latents, labels)
    return {"same_class": found.within, "other_class": found.between}


def _training(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]

    last = {name: value for row in rows for name, value in row.items()}
    metrics = {name: last.get(name) for name in ("loss", "test_noisy_accuracy", "test_clean_accuracy")}
    return {"seconds": sum(row.get("train_seconds", 0.0) for row in rows)} | metrics


def flops_to_decide(run):
    """FLOPs per image until it is known whether its radius reaches that of the run's second certification."""
    evaluations = run.facts["decided"]["samples"] if run.smoothed else 1
    return run.cost.encoder + evaluations * run.cost.head


def _shares(run):
    """Shares of the images whose lower bound of p_A, of the right class, exceeds .5, .9 and .99."""
    bounds = np.where(run.table.correct, run.p_a_lower, 0.0)
    return ", ".join(f"{np.mean(bounds > level):.3f}" for level in (0.5, 0.9, 0.99))


def _of_decided(run):
    """The cells of a run with a second certification."""
    if "decided" not in run.facts:
        return {}
    decided = run.facts["decided"]
    accuracy, label = run.table.worst_class(decided["radius"])
    flops = flops_to_decide(run) / 1e6
    return {
        "p_A above .5, .9, .99": _shares(run) if run.smoothed and run.measured else "-",
        f"worst class at r={decided['radius']:g}": f"{accuracy:.3f} ({label})",
        f"samples to decide r={decided['radius']:g}": f"{decided['samples']:,.0f}",
        "MFLOP for it": f"{flops:,.0f}" if flops >= 10 else f"{flops:.2g}",
        "time for it": duration(decided["seconds"]),
    }


def cells(run):
    """Name of a column → text, for the row of a run in a table."""
    cost, table, distances, training = run.cost, run.table, run.facts["distances"], run.facts["training"]
    return {
        "noise on": run.latent if run.smoothed else "no noise",
        "MFLOP once": f"{cost.encoder / 1e6:.2f}",
        "MFLOP/sample": f"{cost.head / 1e6:.2f}",
        "speed-up": f"{cost.speedup:.1f}x" if run.smoothed else "-",
        "distances kept": f"{distances['other_class']:.2f}, {distances['same_class']:.2f}",
        "training, s": f"{training['seconds']:.0f}",
        "without noise": f"{training['test_clean_accuracy']:.3f}",
        **{f"r={radius:g}": f"{table.certified_accuracy(radius):.3f}" for radius in RADII},
        "ACR": f"{table.average_certified_radius:.3f}" if run.measured else "-",
        "cap, n": f"{run.sampling.cap:.3f}, {run.sampling.n:,}" if run.smoothed else "none, 0",
        **_of_decided(run),
        "abstain": f"{table.abstention:.3f}",
        "time/image": duration(float(table.seconds.mean())),
        "on": run.certificates["record"][-1]["devices"].partition(" x ")[2].upper(),
    }


def card(run):
    """The model card of a run, Markdown."""
    config, stored, table = run.facts["config"], run.certificates, run.table
    model, train, data, session = config["model"], config["train"], config["data"], stored["record"][-1]
    training, split, versions = run.facts["training"], stored["identity"]["data"]["split"], session["versions"]
    accuracy = ", ".join(f"{table.certified_accuracy(radius):.3f} at {radius:g}" for radius in RADII)
    network = f"encoder `{model['encoder']}` ({model['method']}, {model['activation']}), head `{model['head']}`"
    if model["encoder"] in BLOCKS or model["head"] == "blocks":
        widths = ", ".join(map(str, model["widths"]))
        network += f"; blocks of {widths} channels, the first {model['split']} in the encoder"
    identity, derivation = stored["identity"], stored["derivation"]
    method = "the margin of a linear head behind a 1-Lipschitz encoder, without noise"
    if run.smoothed:
        method = (
            f"smoothed, σ {identity['sigma']} on {run.latent}; n0 {identity['n0']:,}, n {identity['n']:,}, "
            f"{identity['schedule']} schedule, α {derivation['alpha']} per image, {derivation['bound']} bound, "
            f"{identity['arithmetic']['name']} arithmetic"
        )
    loss = f"{train['loss']}" + (f", {train['noises']} samples per image" if train["noises"] > 1 else "")
    rows = {
        "data": f"{stored['identity']['data']['name']} {stored['identity']['data']['version']}, pixels in [0, 1]",
        "network": network,
        "cost": f"{run.cost.encoder / 1e6:.2f} MFLOP once per image, {run.cost.head / 1e6:.2f} MFLOP per sample",
        "training": f"loss {loss}; {train['steps']:,} steps of {data['batch_size']} images, seed {config['seed']}; "
        f"{duration(training['seconds'])}",
        "certificate": method,
        "Lipschitz constant": repr(stored["lipschitz"]["constant"]),
        "certified accuracy": accuracy + f"; ACR {table.average_certified_radius:.4f}" * run.measured,
        "images": f"{len(table):,} of `{split}`, abstains on {table.abstention:.3f} of them",
        "accuracy without noise": f"{training['test_clean_accuracy']:.3f}, on all images of `{split}`",
        "machine": f"{session['devices']}, {session['host']}; jax {versions['jax']}; {session['started'][:10]}",
    }
    lines = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    commands = "\n".join(run.facts["commands"])
    return f"""# {run.name}

| | |
|---|---|
{lines}

```
{commands}
```

What the certificates say, and what they do not: [docs/guarantee.md](../../../guarantee.md). ℓ2 only; nothing is said
about other norms, corruptions or other kinds of images. Made to be compared, trained for minutes: not for deployment.
The weights are not kept; the commands make them again.
"""
