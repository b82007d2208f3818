"""Write a trained classifier for use without this package.

  python -m lsrs_jax.export --workdir=runs/digits --out=digits
  python -m lsrs_jax.export --workdir=runs/digits --out=digits --batch=32 --n=10000
  python -m lsrs_jax.export --workdir=runs/digits --out=early --step=400

The command writes into the folder OUT: model.safetensors, the parameters with their configuration, which
lsrs_jax.load(OUT) reads; predict.stablehlo, the smoothed prediction with abstention as a program that jax.export runs
without this package; and README.md, which says what both are and how to run the program.
"""

if __name__ == "__main__":
    from lsrs_jax.cli import main

    main("export")

from pathlib import Path

from lsrs_jax import cli
from lsrs_jax.api import model_file
from lsrs_jax.api.loading import MODEL_FILE, load, read_workdir
from lsrs_jax.models.custom import allowing
from lsrs_jax.runtime import files, processes
from lsrs_jax.runtime.rng import pinned
from lsrs_jax.smoothing.confidence import MAX_SAMPLES

_PROGRAM = "predict.stablehlo"
_CARD = """# {name}

A classifier of {classes} classes ({names}) for inputs of shape {shape}, trained under Gaussian noise with sigma {sigma}
on {data}. Its encoder has the Lipschitz constant {lipschitz:.15g}.

| file | what |
|---|---|
| {model} | the parameters with their configuration; `lsrs_jax.load` reads it |
| {program} | the smoothed prediction: {n:,} samples, alpha {alpha}, {batch} input(s) per call |

```python
import pathlib

import jax
import numpy as np

program = jax.export.deserialize(pathlib.Path("{program}").read_bytes())
x = np.zeros(({batch}, {sizes}), np.float32)  # pixels in [0, 1]
classes = program.call(x, jax.random.key_data(jax.random.key(0, impl="threefry2x32")))  # -1: no certain answer
```

Draw a new key for every call: noise that an attacker knows beforehand protects nobody. With probability 1 - alpha a
class that is returned is that of the smoothed classifier.
"""


def run(arguments: list[str]) -> None:
    """The command; see the module's docstring."""
    parser = cli.parser("export", __doc__, (), "--workdir=DIR --out=DIR [--batch=B] [--n=N] [--alpha=A]")
    parser.add_argument("--workdir", required=True, type=cli.folder, help="folder of a training")
    parser.add_argument("--out", required=True, type=cli.folder, help="folder for the files")
    whole = cli.checked(int, lambda value: 1 <= value <= MAX_SAMPLES, "a whole number from 1 to 2**27")
    parser.add_argument("--step", type=whole, help="checkpoint to export, by default the newest")
    parser.add_argument("--batch", type=whole, default=1, help="inputs per call of the program")
    parser.add_argument("--n", type=whole, default=1000, help="samples of a prediction")
    share = cli.checked(float, lambda value: 1e-100 <= value < 1, "a number between 0 and 1")
    parser.add_argument("--alpha", type=share, default=0.001, help="probability of a wrong class")
    cli.add_allow_code(parser)
    options = parser.parse_args(arguments)
    processes.check_platform()
    with pinned(), allowing(options.allow_code):
        _write(options.workdir, options.out, options.step, options.batch, options.n, options.alpha)


def _write(workdir: Path, out: Path, step: int | None, batch: int, n: int, alpha: float) -> None:
    config, model, params, names, step = read_workdir(workdir, step)
    model_file.save(out / MODEL_FILE, config, model, params, names, step)
    classifier = load(out / MODEL_FILE)
    print(f"exporting the prediction of {batch} inputs with {n:,} samples ...", flush=True)
    classifier.export(out / _PROGRAM, model.input_shape, batch=batch, n=n, alpha=alpha)
    facts = {"classes": len(names), "names": ", ".join(names[:10]) + ", ..." * (len(names) > 10), "batch": batch}
    facts |= {"shape": model.input_shape, "sigma": config.sigma, "data": config.data.name, "n": n, "alpha": alpha}
    facts |= {"lipschitz": classifier.lipschitz, "model": MODEL_FILE, "program": _PROGRAM, "name": out.name}
    files.write_atomic(out / "README.md", _CARD.format(**facts, sizes=", ".join(map(str, model.input_shape))))
    for name in (MODEL_FILE, _PROGRAM, "README.md"):
        print(f"{out / name} ({(out / name).stat().st_size:,} bytes)")
