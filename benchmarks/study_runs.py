"""The runs of the studies on CIFAR-10 and MNIST, and the tables they form."""

import dataclasses

STUDY = "configs/cifar10_study.py"
HEADLINE = "configs/cifar10_small.py"
FULL = "configs/cifar10.py"
MNIST = "configs/mnist.py"
LAST = 6  # blocks of the network of the studies
SPLIT = 4  # where it is cut in the studies that vary something else
SEEDS = (0, 1, 2)
ATTACK = "train.smoothadv.radius=0.5"
ATTACKED = ("train.loss=smoothadv_consistency", ATTACK)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training and its certification.

    Attributes:
      name: of its folder.
      config: ``configs/FILE.py:variant``.
      flags: overrides, ``field=value``.
      split: of the data, evaluated and certified.
    """

    name: str
    config: str
    flags: tuple[str, ...] = ()
    split: str = "test_exact"

    def commands(self, workdir):
        """The modules and arguments of the two commands, training first."""
        flags = [f"--config.{flag}" for flag in (f"data.split={self.split}", *self.flags)]
        place = f"--workdir={workdir}"
        return ["lsrs_jax.train", f"--config={self.config}", place, *flags], ["lsrs_jax.certify", place]


@dataclasses.dataclass(frozen=True)
class Study:
    """Rows of one table.

    Attributes:
      figure: ``"pareto"`` or ``"curves"``.
      rows: label → run; labels that differ in ``, seed <n>`` alone are repetitions.
      references: labels without their seeds; where given, means of the repetitions are shown and compared with theirs.
      page: docs/results/<page>.md has the table; docs/results/<page>/ keeps the runs.
    """

    figure: str
    rows: dict[str, Run]
    references: tuple[str, ...] = ()
    page: str = "cifar10"


def _run(variant, *flags):
    """A run named after its variant and the values of its flags."""
    name = "-".join([variant, *(flag.rpartition("=")[2] for flag in flags)])
    return Run(name, f"{STUDY}:{variant}", ("certify.step=2", *flags))


def _splits():
    rows = {"free network, ISRS (split 0)": _run("split0")}
    rows |= {f"LSRS, split {k}": _run(f"split{k}") for k in range(1, LAST)}
    rows[f"LSRS, split {LAST}: linear head"] = _run(f"split{LAST}")
    rows[f"LSRS, split {LAST}, multi-class bound"] = _run(f"split{LAST}", "certify.bound=multiclass")
    rows |= {f"LSRS, Haar strides, split {k}": _run(f"split{k}_haar") for k in range(2, LAST + 1)}
    rows[f"split {LAST}, margin, no noise"] = _run("margin")
    rows |= {f"ISRS of the network of split {k}": _run(f"split{k}_input") for k in range(2, LAST + 1, 2)}
    return rows


def _families():
    rows = {}
    for method in ("adaptive", "paraunitary", "exponential", "cayley"):
        for start in ("identity", "random"):
            flags = [f"model.method={method}"] * (method != "adaptive")
            flags += [f"model.initializer={start}"] * (start != "identity")
            rows[f"{method}, {start} start"] = _run(f"split{SPLIT}", *flags)
    return rows


def _losses():
    rows = {}
    for kind, variant in (("LSRS", f"split{SPLIT}"), ("ISRS, same network", f"split{SPLIT}_input")):
        rows[f"{kind}: Gaussian augmentation"] = _run(variant, "train.loss=gaussian")
        rows[f"{kind}: consistency"] = _run(variant)
        rows[f"{kind}: MACER"] = _run(variant, "train.loss=macer", "train.noises=4")
        rows[f"{kind}: SmoothAdv"] = _run(variant, "train.loss=smoothadv")
        rows[f"{kind}: SmoothAdv, ε 0.5"] = _run(variant, "train.loss=smoothadv", ATTACK)
        rows[f"{kind}: SmoothAdv, ε 0.5, and consistency"] = _run(variant, *ATTACKED)
    return rows


def _sigmas():
    rows = {}
    kinds = {"LSRS": f"split{SPLIT}", "ISRS, same network": f"split{SPLIT}_input", "ISRS, free network": "split0"}
    for sigma in (0.12, 0.25, 0.5, 1.0):
        for kind, variant in kinds.items():
            rows[f"{kind}, σ {sigma:g}"] = _run(variant, *[f"sigma={sigma}"] * (sigma != 0.25))
    return rows


def _headline():
    """A pass of the encoder serves two samples: 6,700 steps of LSRS take the FLOPs of 4,000 of ISRS of its network.

    4,000 steps of LSRS that attack the latent take 83 % of them: only the head pays for the attack.
    """
    kinds = {
        "LSRS": ("lsrs", "lsrs", (), SEEDS),
        "LSRS, 6,700 steps": ("lsrs-6700", "lsrs", ("train.steps=6700",), SEEDS),
        "LSRS, SmoothAdv and consistency": ("lsrs-attacked", "lsrs", ATTACKED, SEEDS),
        "LSRS, isometric encoder": ("isometric", "isometric", (), SEEDS[:1]),
        "LSRS, isometric encoder, SmoothAdv and consistency": ("isometric-attacked", "isometric", ATTACKED, SEEDS[:1]),
        "ISRS, same network": ("isrs_split", "isrs_split", (), SEEDS),
        "ISRS, same network, SmoothAdv and consistency": ("isrs_split-attacked", "isrs_split", ATTACKED, SEEDS[:2]),
        "ISRS, free network": ("free", "free", (), SEEDS),
        "LSRS, SmoothAdv and consistency, 12,000 steps": (
            "lsrs-attacked-12000",
            "lsrs",
            (*ATTACKED, "train.steps=12000"),
            SEEDS[:1],
        ),
    }
    return {
        f"{kind}, seed {seed}": Run(f"{name}-seed{seed}", f"{HEADLINE}:{variant}", (f"seed={seed}", *flags))
        for kind, (name, variant, flags, seeds) in kinds.items()
        for seed in seeds
    }


def _full():
    """For an accelerator, in order of value; base classifiers are certified in bfloat16."""
    flags = ("certify.step=1", "certify.head_dtype=bfloat16")
    gaussian = ("train.loss=gaussian", "train.noises=1")
    first = {
        "ISRS, free network: Gaussian augmentation": ("full-free-gaussian", "free", gaussian),
        "LSRS: Gaussian augmentation": ("full-gaussian", "gaussian", ()),
        "LSRS: SmoothAdv and consistency": ("full-smoothadv", "smoothadv", ()),
    }
    isometric = {
        "LSRS, isometric encoder: SmoothAdv and consistency": ("full-isometric", "isometric", ()),
        "LSRS, isometric encoder: Gaussian augmentation": ("full-isometric-gaussian", "isometric", gaussian),
    }
    resnet = {
        "ISRS, ResNet: Gaussian augmentation (every second image)": (
            "full-isrs_resnet-gaussian",
            "isrs_resnet",
            (*gaussian, "certify.step=2"),
        ),
        "LSRS, isometric encoder, ResNet: consistency": ("full-isometric_resnet", "isometric_resnet", ()),
        "LSRS, ResNet: SmoothAdv and consistency": (
            "full-lsrs_resnet",
            "lsrs_resnet",
            (*ATTACKED, "train.steps=10000"),
        ),
        "LSRS, isometric encoder, ResNet: SmoothAdv and consistency": (
            "full-isometric_resnet-attacked",
            "isometric_resnet",
            ATTACKED,
        ),
        "LSRS, isometric encoder, ResNet: Gaussian augmentation": (
            "full-isometric_resnet-gaussian",
            "isometric_resnet",
            gaussian,
        ),
    }
    more = {
        "LSRS: consistency": ("full-lsrs", "lsrs", ()),
        "ISRS, free network: consistency": ("full-free", "free", ()),
        "ISRS, same network: consistency": ("full-isrs_split", "isrs_split", ()),
    }
    kinds = first | resnet | isometric | more
    for sigma in (0.5, 1.0):
        for label, (name, variant, own) in first.items():
            kinds[f"{label}, σ {sigma:g}"] = (f"{name}-sigma{sigma}", variant, (*own, f"sigma={sigma}"))
    for seed in SEEDS[1:]:
        for label, (name, variant, own) in first.items():
            kinds[f"{label}, seed {seed}"] = (f"{name}-seed{seed}", variant, (*own, f"seed={seed}"))
    return {label: Run(name, f"{FULL}:{variant}", (*flags, *own)) for label, (name, variant, own) in kinds.items()}


def _mnist():
    kinds = {"LSRS": "lsrs", "ISRS, same network": "isrs_split", "ISRS, head on the image": "isrs"}
    return {
        f"{kind}, seed {seed}": Run(f"mnist-{variant}-seed{seed}", f"{MNIST}:{variant}", (f"seed={seed}",), "test")
        for kind, variant in kinds.items()
        for seed in SEEDS
    }


STUDIES = {
    "split": Study("pareto", _splits()),
    "family": Study("curves", _families()),
    "loss": Study("curves", _losses()),
    "sigma": Study("curves", _sigmas()),
    "headline": Study(
        "curves", _headline(), ("ISRS, same network", "ISRS, same network, SmoothAdv and consistency", "LSRS")
    ),
    "full": Study("curves", _full()),
    "mnist": Study("curves", _mnist(), ("ISRS, same network",), "mnist"),
}
