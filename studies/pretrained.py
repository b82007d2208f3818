"""Makes the pretrained networks of the package: ``python -m studies.pretrained digits``.

Trains and certifies an experiment of ``configs/`` and writes into ``lsrs_jax/pretrained/<name>/`` the parameters
(model.safetensors), the configuration, the certificates with their ledger, and a card (README.md).
"""

import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from lsrs_jax.api import loading, model_file
from lsrs_jax.certification.table import read_table
from lsrs_jax.config import load_config

ROOT = Path(__file__).resolve().parents[1]
RADII = (0.0, 0.25, 0.5, 0.75)
EXPERIMENTS = {"digits": ("digits", "the 8x8 handwritten digits of scikit-learn (UCI, 1998), test split")}


def card(name: str, folder: Path, where: str) -> str:
    """The card of a pretrained network, from the files in its folder."""
    experiment, data = EXPERIMENTS[name]
    config, model, _, names = model_file.read(folder / loading.MODEL_FILE)
    table = read_table(folder / "certify" / "default" / "certificates.tsv")
    header = "| radius | " + " | ".join(f"{radius:g}" for radius in RADII) + " |"
    row = "| certified accuracy | " + " | ".join(f"{table.certified_accuracy(radius):.3f}" for radius in RADII) + " |"
    lines = [
        f"# {name}",
        f"`lsrs_jax.load({name!r})`: encoder {config.model.encoder!r}, head {config.model.head!r}, for images of shape "
        f"{model.input_shape} in {len(names)} classes, trained under noise with sigma {config.sigma}.",
        "\n".join([header, "|---" * (len(RADII) + 1) + "|", row]),
        f"On {len(table):,} images of {data}, with n {config.certify.n:,} and alpha {config.certify.alpha}; the "
        f"average certified radius is {table.average_certified_radius:.4f}, in units of pixels in [0, 1]. "
        "certify/default holds the certificates and every count behind them.",
        f"Made by `python -m studies.pretrained {name}` (the experiment `{experiment}` of configs/) with {where}.",
        "Meant for demonstrations. The images are small and grey, and nothing is known about other handwriting.",
    ]
    return "\n\n".join(lines) + "\n"


def make(name: str) -> None:
    """Trains, certifies and writes one network."""
    home = ROOT / "lsrs_jax" / "pretrained" / name
    with tempfile.TemporaryDirectory() as parent:
        workdir = Path(parent) / "run"
        for command, *flags in (["train", f"--config={EXPERIMENTS[name][0]}"], ["certify"]):
            subprocess.run(
                [sys.executable, "-m", "lsrs_jax", command, f"--workdir={workdir}", *flags], cwd=ROOT, check=True
            )
        shutil.rmtree(home, ignore_errors=True)
        config, model, params, names, step = loading.read_workdir(workdir)
        model_file.save(home / loading.MODEL_FILE, config, model, params, names, step)
        shutil.copy(workdir / "config.json", home)
        for path in (workdir / "certify" / "default").iterdir():
            if not path.name.startswith("."):
                (home / "certify" / "default").mkdir(parents=True, exist_ok=True)
                shutil.copy(path, home / "certify" / "default")
    load_config(home / "config.json")
    (home / "README.md").write_text(card(name, home, f"jax {jax.__version__} on {platform.machine()}"))


if __name__ == "__main__":
    for chosen in sys.argv[1:] or EXPERIMENTS:
        make(chosen)
