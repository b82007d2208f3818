"""Makes the pretrained networks of the package: ``python -m studies.pretrained digits``.

Trains and certifies an experiment of ``configs/`` in ``runs/pretrained/<name>``, where the same command resumes, and
writes into ``lsrs_jax/pretrained/<name>/`` the parameters (model.safetensors), the configuration, the certificates with
their ledger, and a card (README.md).
"""

import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax

from lsrs_jax.api import loading, model_file
from lsrs_jax.certification.table import read_table

ROOT = Path(__file__).resolve().parents[1]
RADII = (0.0, 0.25, 0.5, 0.75)


class Experiment(NamedTuple):
    """How a network is made, and what its card says."""

    config: str  # of configs/
    data: str  # that it was certified on
    meant: str
    train: tuple[str, ...] = ()  # flags: field=value
    certify: tuple[str, ...] = ()


EXPERIMENTS = {
    "digits": Experiment(
        "digits",
        "the 8x8 handwritten digits of scikit-learn (UCI, 1998), test split",
        "The images are small and grey, and nothing is known about other handwriting.",
    ),
    "cifar10-small": Experiment(
        "cifar10_mlp",
        "CIFAR-10 (some of the first 1,000 of its test set)",
        "The encoder runs once per image; the head has one hidden layer. Photos of other objects get one of the ten "
        "classes as well.",
        ("data.split=test_exact", "seed=0", "train.ema=0.999", "model.head_norm=batch"),
        ("certify.integer_first_layer=True", "certify.step=5"),
    ),
}


def card(name: str, folder: Path, where: str) -> str:
    """The card of a pretrained network, from the files in its folder."""
    experiment = EXPERIMENTS[name]
    config, model, _, names = model_file.read(folder / loading.MODEL_FILE)
    table = read_table(folder / "certify" / "default" / "certificates.tsv")
    header = "| radius | " + " | ".join(f"{radius:g}" for radius in RADII) + " |"
    row = "| certified accuracy | " + " | ".join(f"{table.certified_accuracy(radius):.3f}" for radius in RADII) + " |"
    lines = [
        f"# {name}",
        f"`lsrs_jax.load({name!r})`: encoder {config.model.encoder!r}, head {config.model.head!r}, for images of shape "
        f"{model.input_shape} in {len(names)} classes, trained under noise with sigma {config.sigma}.",
        "\n".join([header, "|---" * (len(RADII) + 1) + "|", row]),
        f"On {len(table):,} images of {experiment.data}, with n {config.certify.n:,} and alpha "
        f"{config.certify.alpha}; the average certified radius is {table.average_certified_radius:.4f}, in units of "
        "pixels in [0, 1]. "
        "certify/default holds the certificates and every count behind them.",
        f"Made by `python -m studies.pretrained {name}` (the experiment `{experiment.config}` of configs/) with "
        f"{where}.",
        f"Meant for demonstrations. {experiment.meant}",
    ]
    return "\n\n".join(lines) + "\n"


def make(name: str) -> None:
    """Trains, certifies and writes one network."""
    home, workdir = ROOT / "lsrs_jax" / "pretrained" / name, ROOT / "runs" / "pretrained" / name
    config, _, _, train, certify = EXPERIMENTS[name]
    for command, *flags in (["train", f"--config={config}", *map(_flag, train)], ["certify", *map(_flag, certify)]):
        arguments = [sys.executable, "-m", "lsrs_jax", command, f"--workdir={workdir}", *flags]
        subprocess.run(arguments, cwd=ROOT, check=True)
    shutil.rmtree(home, ignore_errors=True)
    model_file.save(home / loading.MODEL_FILE, *loading.read_workdir(workdir))
    shutil.copy(workdir / "config.json", home)
    (home / "certify" / "default").mkdir(parents=True)
    for path in (workdir / "certify" / "default").iterdir():
        if not path.name.startswith("."):
            shutil.copy(path, home / "certify" / "default")
    (home / "README.md").write_text(card(name, home, f"jax {jax.__version__} on {platform.machine()}"))


def _flag(field: str) -> str:
    return f"--config.{field}"


if __name__ == "__main__":
    for chosen in sys.argv[1:] or EXPERIMENTS:
        make(chosen)
