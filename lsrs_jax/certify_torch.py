"""Certify a published PyTorch checkpoint: the network of a file, smoothed by Gaussian noise on its input.

  python -m lsrs_jax.certify_torch --checkpoint=resnet110.pth.tar --sigma=0.25 --data.name=cifar10 \\
    --step=20 --out=runs/cohen
  python -m lsrs_jax.certify_torch --checkpoint=net.pt --arch=nets.py:make --sigma=0.5 --data.name=folder:photos \\
    --out=runs/mine
  python -m lsrs_jax.certify_torch --denoiser=dncnn.pth.tar --checkpoint=resnet110.pth.tar --sigma=0.25 \\
    --data.name=cifar10 --out=runs/denoised

A file is a dict with state_dict and perhaps arch, or a bare state_dict, as torch.save writes it. Only weights are
loaded: nothing that a file contains or names is executed. With --denoiser the network is the classifier behind the
denoiser (Salman et al. 2020). The noise is added to pixels in [0, 1], in front of denoiser and normalisation, so that
radii are in the units of the images. The network is imported into JAX (lsrs_jax.from_torch), and what is certified is
this JAX function, whose rounding differs from PyTorch's.

The command writes the ledger, certificates.tsv and certificates.json into <out>/certify/<name>, as certify does. The
same command resumes. Then python -m lsrs_jax.certify --workdir=OUT --verify derives every radius again, --from-counts
takes another alpha or bound, and python -m lsrs_jax.report OUT compares; none of them needs PyTorch or the checkpoint.
"""

if __name__ == "__main__":
    from lsrs_jax.cli import main

    main("certify_torch")

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lsrs_jax import cli
from lsrs_jax.api import folder
from lsrs_jax.api.classifier import SmoothedClassifier
from lsrs_jax.config import FIELDS, default
from lsrs_jax.data import Dataset, load_split
from lsrs_jax.flags import config_from_flags
from lsrs_jax.models import custom
from lsrs_jax.pytorch import Imported, from_torch, read_checkpoint
from lsrs_jax.pytorch.library import load_torch
from lsrs_jax.runtime import files, processes
from lsrs_jax.runtime.errors import UserError, first_line
from lsrs_jax.runtime.progress import print_now
from lsrs_jax.runtime.rng import pinned
from lsrs_jax.runtime.types import Config

_DATA = ("name", "dir", "split", "size", "test_share", "share_seed", "layout", "image_column", "label_column")
_IMAGES = ("start", "stop", "step")
_SAMPLES = ("n0", "n", "alpha", "bound", "schedule", "radii", "epsilon", "tile", "name")
# Option without its dashes → field of the configuration.
_OPTIONS = {"sigma": "sigma"} | {f"data.{name}": f"data.{name}" for name in _DATA}
_OPTIONS |= {name: f"certify.{name}" for name in (*_IMAGES, *_SAMPLES)}
_DEFAULTS = {"certify.schedule": "staged"}  # instead of those of the configuration
_MEANINGS = {
    "sigma": "The noise on the pixels, which lie in [0, 1], has this standard deviation.",
    "certify.name": "Results go to the folder <out>/certify/<name>.",
}


def run(arguments: list[str]) -> None:
    """The command; see the module's docstring."""
    options = _parser().parse_args(arguments)
    if options.denoiser_arch and not options.denoiser:
        raise UserError("--denoiser-arch is the architecture of a --denoiser=FILE, which is missing")
    processes.check_platform()
    processes.cache_compilations()
    with _named_as_options(), pinned():
        config = _config(options)
        load_torch("certify-torch")
        networks = _networks(options)
        dataset = load_split(config.data, config.data.split)
        head = _imported(networks, dataset)
        networks.clear()
        fields = {name: config.certify[name] for name in (*_IMAGES, *_SAMPLES)}
        settings = {"class_names": dataset.class_names, "tile": config.certify.tile}
        classifier = SmoothedClassifier(head, sigma=config.sigma, **settings)
        slack, source = np.zeros(len(dataset)), {"source": _source(options)}
        found = folder.certify(classifier, dataset, slack, options.out, fields, print_now, config.data, source)
    print(found)


def _parser() -> argparse.ArgumentParser:
    usage = "--checkpoint=FILE --sigma=SIGMA --data.name=NAME --out=DIR [--arch=ARCH] [--OPTION=VALUE ...]"
    parser = cli.parser("certify_torch", __doc__, (), usage)
    network = parser.add_argument_group("the network")
    network.add_argument("--checkpoint", required=True, type=_file, metavar="FILE", help="file of the classifier")
    network.add_argument(
        "--arch",
        help="cifar_resnet20, cifar_resnet110 or resnet50; or package.module:function or FILE.py:function, which is "
        "imported and called without arguments, and returns a torch.nn.Module; default: the name that the file gives",
    )
    network.add_argument(
        "--normalize",
        choices=("cifar10", "imagenet", "none"),
        default="none",
        help="put (x - mean) / std of this data set in front of a network whose file names no such layer; "
        "default: none, only what the file names",
    )
    network.add_argument("--denoiser", type=_file, metavar="FILE", help="file of a denoiser in front of the classifier")
    network.add_argument(
        "--denoiser-arch", metavar="ARCH", help="cifar_dncnn, cifar_dncnn_wide, imagenet_dncnn, or code"
    )
    results = parser.add_argument_group("results")
    results.add_argument("--out", required=True, type=_out, metavar="DIR", help="folder for certify/<name>")
    data, sampling = parser.add_argument_group("the images"), parser.add_argument_group("noise and samples")
    for option, name in _OPTIONS.items():
        required, value = option in ("sigma", "data.name"), _DEFAULTS.get(name, FIELDS[name].default)
        text = _MEANINGS.get(name, FIELDS[name].meaning)
        if not required and value not in ("", ()):
            text += f" Default: {','.join(map(str, value)) if isinstance(value, tuple) else value}"
        group = results if option == "name" else data if option.startswith("data.") or option in _IMAGES else sampling
        group.add_argument(f"--{option}", required=required, metavar="VALUE", help=text.replace("%", "%%"))
    return parser


def _file(text: str) -> Path:
    return Path(text).expanduser()


def _out(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(f"must be a folder of this machine, got {text!r}")
    return cli.folder(text)


def _config(options: argparse.Namespace) -> Config:
    """The configuration with the values of the options, which get the checks of ``--config.FIELD=VALUE``."""
    config, given = default(), vars(options)
    config.update_from_flattened_dict(_DEFAULTS)
    flags = [f"--config.{field}={given[option]}" for option, field in _OPTIONS.items() if given[option] is not None]
    return config_from_flags(flags, config)


@contextlib.contextmanager
def _named_as_options() -> Iterator[None]:
    """Errors about fields of the configuration, in the words of the options."""
    try:
        yield
    except UserError as error:
        words = re.sub(r"(config field |(flag )?--config\.)(certify\.)?", "--", str(error))
        words = re.sub(rf"\bcertify\.(?=({'|'.join((*_IMAGES, *_SAMPLES))})\b)", "--", words)
        raise type(error)(words.removeprefix("bad configuration: ")) from error


def _networks(options: argparse.Namespace) -> list[tuple[Path, Any]]:
    """The denoiser, if there is one, and the classifier, each with its file; they are modules of torch."""
    found = []
    if options.denoiser is not None:
        found.append((options.denoiser, _read(options.denoiser, options.denoiser_arch, "--denoiser-arch")))
    normalize = None if options.normalize == "none" else options.normalize
    return [*found, (options.checkpoint, _read(options.checkpoint, options.arch, "--arch", normalize))]


def _read(path: Path, arch: str | None, option: str, normalize: str | None = None) -> Any:
    """The network in a file; errors name the `option` that gives its architecture."""
    made = _made_by_code(arch) if arch and custom.is_code(arch) else arch
    try:
        return read_checkpoint(path, made, normalize=normalize)
    except UserError as error:
        words = re.sub(r"(^|give |unknown )arch\b", rf"\1{option}", str(error))
        raise UserError(re.sub(r"(give |leave )normalize\b", r"\1--normalize", words)) from error


def _made_by_code(name: str) -> Callable[[], Any]:
    """The function that the user has typed for the architecture."""
    function = custom.resolve(name)

    def make() -> Any:
        with custom.errors_of(name):
            return function()

    return make


def _imported(networks: list[tuple[Path, Any]], dataset: Dataset) -> Imported:
    """The networks, one behind the other, as a head for the images of a data set."""
    torch = load_torch("certify-torch")
    pixels = dataset.read(list(range(min(2, len(dataset)))), np.float32)[0]
    x = images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    of, (*_, (last, _)) = f"images of shape {dataset.shape}, as {dataset.name} has them", networks
    for number, (file, network) in enumerate(networks, start=1):
        try:
            with torch.inference_mode():
                x = network(x)
        except Exception as error:  # whatever the module raises
            raise UserError(f"the network in {file} does not take {of}: {first_line(error)}") from error
        if number < len(networks) and getattr(x, "shape", None) != images.shape:
            raise UserError(f"{file} holds no denoiser: its network does not return {of}")
    head = from_torch(torch.nn.Sequential(*(network for _, network in networks)).eval(), images, layout="NHWC")
    if head.num_classes != (classes := len(dataset.class_names)):
        raise UserError(f"the network in {last} has {head.num_classes} classes, and {dataset.name} has {classes}")
    return head


def _source(options: argparse.Namespace) -> str:
    """What the record says about the files: their names, digests and architectures."""
    given = [(options.denoiser, options.denoiser_arch), (options.checkpoint, options.arch)]
    parts = [(path, arch or "its own arch") for path, arch in given if path is not None]
    return "; ".join(f"{path.name} ({arch}), sha256 {files.digest_of(path)}" for path, arch in parts)
