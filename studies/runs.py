"""The runs of the studies on CIFAR-10 and MNIST, and the tables to which they belong."""

import dataclasses
import itertools
import shlex

LAST = 6  # blocks of the network of the studies
SPLIT = 4  # where it is cut in the studies that vary something else
ATTACK = "train.smoothadv.radius=0.5"
ATTACK_LOSS = "SmoothAdv and consistency"  # in labels
DECIDED = "decided"  # name of the certification that decides one radius
FAMILIES = ("adaptive", "paraunitary", "exponential", "cayley")
RECIPE = "LSRS, Haar, ResNet: the recipe"
EVERY_SECOND = "certify.step=2"
MARGIN = "certify.certificate=deterministic"
AVERAGED = "train.ema=0.999"
INTEGER = "certify.integer_first_layer=True"
RADII_ONLY = "certify.radii=(0.25,0.5,0.75)"
ATTACKED = ("train.loss=smoothadv_consistency", ATTACK)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training and its certification."""

    name: str  # of its folder
    config: str  # configs/FILE.py:variant
    flags: tuple[str, ...] = ()  # field=value
    split: str = "test_exact"  # of the data; it is evaluated and certified
    decides: float | None = None  # radius that a second certification decides, and nothing else
    certify: tuple[str, ...] = ()  # field=value of both certifications

    def commands(self, workdir):
        """The modules and arguments of the commands, training first."""
        flags = [f"--config.{flag}" for flag in (f"data.split={self.split}", *self.flags)]
        place = f"--workdir={workdir}"
        certify = ["lsrs_jax.certify", place, *(f"--config.{flag}" for flag in self.certify)]
        commands = [["lsrs_jax.train", f"--config={self.config}", place, *flags], certify]
        if self.decides is not None and MARGIN not in self.certify:  # a margin decides every radius
            others = [flag for flag in self.certify if flag != RADII_ONLY]  # this one takes their place
            chosen = *others, f"certify.name={DECIDED}", f"certify.radii=({self.decides},)"
            commands.append(["lsrs_jax.certify", place, *(f"--config.{flag}" for flag in chosen)])
        return commands

    def shown(self):
        """The commands as a reader types them."""
        return [f"python -m {shlex.join(words)}" for words in self.commands(f"runs/{self.name}")]


@dataclasses.dataclass(frozen=True)
class Study:
    """The rows of one table. Labels that differ only in ``, seed <n>`` are repetitions of one run."""

    # "pareto", "deciding", "grid" (of encoders and heads), "curves", or "envelope" (the best of a method's curves at
    # every radius)
    figure: str
    rows: dict[str, Run]  # by label
    references: tuple[
        str, ...
    ] = ()  # labels without seed: a second table compares the means of repetitions with theirs
    page: str = "cifar10"  # docs/results/<page>.md has the table, docs/results/<page>/ keeps the runs
    drawn: tuple[str, ...] = ()  # labels without seed of the runs in the figure; all runs if empty


def _run(variant, *flags):
    """A run of the study's network, named after its variant and the values of its flags."""
    name = "-".join([variant, *(flag.rpartition("=")[2] for flag in flags)])
    return Run(name, f"configs/cifar10_study.py:{variant}", ("certify.step=2", *flags))


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
    for method, start in itertools.product(FAMILIES, ("identity", "random")):
        flags = [f"model.method={method}"] * (method != "adaptive") + ["model.initializer=random"] * (start == "random")
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
    kinds = {"LSRS": f"split{SPLIT}", "ISRS, same network": f"split{SPLIT}_input", "ISRS, free network": "split0"}
    return {
        f"{kind}, σ {sigma:g}": _run(variant, *[f"sigma={sigma}"] * (sigma != 0.25))
        for sigma in (0.12, 0.25, 0.5, 1.0)
        for kind, variant in kinds.items()
    }


def _seeds(kinds, config, split="test_exact", **fields):
    """Label and seed → run, for kinds label → (name, variant, seeds, flags); `fields` are of the runs."""
    return {
        f"{label}, seed {seed}": Run(
            f"{name}-seed{seed}", f"{config}:{variant}", (f"seed={seed}", *flags), split, **fields
        )
        for label, (name, variant, seeds, *flags) in kinds.items()
        for seed in range(seeds)
    }


def _headline():
    """One pass of the encoder serves two noise samples, so 6,700 steps of LSRS take the FLOPs of 4,000 steps of ISRS.

    4,000 steps of LSRS with an attack on the latent take 83 % of these FLOPs, because the attack runs in the head only.
    """
    kinds = {
        "LSRS": ("lsrs", "lsrs", 3),
        "LSRS, 6,700 steps": ("lsrs-6700", "lsrs", 3, "train.steps=6700"),
        f"LSRS, {ATTACK_LOSS}": ("lsrs-attacked", "lsrs", 3, *ATTACKED),
        "LSRS, isometric encoder": ("isometric", "isometric", 1),
        f"LSRS, isometric encoder, {ATTACK_LOSS}": ("isometric-attacked", "isometric", 1, *ATTACKED),
        "ISRS, same network": ("isrs_split", "isrs_split", 3),
        f"ISRS, same network, {ATTACK_LOSS}": ("isrs_split-attacked", "isrs_split", 2, *ATTACKED),
        "ISRS, free network": ("free", "free", 3),
        f"LSRS, {ATTACK_LOSS}, 12,000 steps": ("lsrs-attacked-12000", "lsrs", 1, *ATTACKED, "train.steps=12000"),
    }
    return _seeds(kinds, "configs/cifar10_small.py")


def _full():
    """Runs for an accelerator, the most valuable first; base classifiers are certified in bfloat16."""
    flags = ("certify.step=1", "certify.head_dtype=bfloat16")
    gaussian = ("train.loss=gaussian", "train.noises=1")
    augmented, isometric = "Gaussian augmentation", "LSRS, isometric encoder"
    first = {
        f"ISRS, free network: {augmented}": ("free-gaussian", "free", *gaussian),
        f"LSRS: {augmented}": ("gaussian", "gaussian"),
        f"LSRS: {ATTACK_LOSS}": ("smoothadv", "smoothadv"),
    }
    every_second = (*gaussian, EVERY_SECOND)
    kinds = first | {
        f"ISRS, ResNet: {augmented} (every second image)": ("isrs_resnet-gaussian", "isrs_resnet", *every_second),
        f"{isometric}, ResNet: consistency": ("isometric_resnet", "isometric_resnet"),
        f"LSRS, ResNet: {ATTACK_LOSS}": ("lsrs_resnet", "lsrs_resnet", *ATTACKED, "train.steps=10000"),
        f"{isometric}, ResNet: {ATTACK_LOSS}": ("isometric_resnet-attacked", "isometric_resnet", *ATTACKED),
        f"{isometric}, ResNet: {augmented}": ("isometric_resnet-gaussian", "isometric_resnet", *gaussian),
        f"{isometric}: {ATTACK_LOSS}": ("isometric", "isometric"),
        f"{isometric}: {augmented}": ("isometric-gaussian", "isometric", *gaussian),
        "LSRS: consistency": ("lsrs", "lsrs"),
        "ISRS, free network: consistency": ("free", "free"),
        "ISRS, same network: consistency": ("isrs_split", "isrs_split"),
    }
    changes = {"σ 0.5": "sigma=0.5", "σ 1": "sigma=1.0", "seed 1": "seed=1", "seed 2": "seed=2"}
    for words, flag in changes.items():
        for label, (name, *rest) in first.items():
            kinds[f"{label}, {words}"] = (f"{name}-{flag.replace('=', '')}", *rest, flag)
    return {
        label: Run(f"full-{name}", f"configs/cifar10.py:{variant}", (*flags, *own))
        for label, (name, variant, *own) in kinds.items()
    }


def _second():
    """The second round on an accelerator: two encoders and three heads under one loss, ISRS, and a longer training."""
    certified = ("certify.step=1", "certify.head_dtype=bfloat16")
    short = (*ATTACKED, *certified, "train.steps=6000")
    learned = ("smoothadv", *short, "model.widths=(128,128,128,64,48)", "model.strides=(2,1,1,1,2)")
    haar = ("isometric", *short, "model.widths=(0,0)", "model.strides=(2,2)")
    linear = ("model.head=linear",)
    mlp = ("model.head=mlp", "model.head_widths=(1024,)", "certify.tile=(256,128)")
    kinds = {
        "ISRS, ResNet: consistency": ("isrs-consistency", "isrs_resnet", *certified, "train.steps=6000", EVERY_SECOND),
        f"ISRS, ResNet: {ATTACK_LOSS}": ("isrs-attacked", "isrs_resnet", *short, EVERY_SECOND),
        "LSRS, Haar, ResNet": ("haar-resnet", "isometric_resnet", *short),
        "LSRS, learned, blocks": ("learned-blocks", "smoothadv", *short),
        "LSRS, learned, MLP": ("learned-mlp", *learned, *mlp),
        "LSRS, Haar, blocks": ("haar-blocks", "isometric", *short),
        "LSRS, low-pass, MLP": ("lowpass-mlp", *haar, "model.encoder=lowpass", *mlp),
        "deterministic, learned, linear": ("learned-linear", *learned, *linear),
        "deterministic, Haar, linear": ("haar-linear", *haar, *linear),
        # Each checkpoint makes the statistics of batch normalisation again, which takes a second on a GPU.
        RECIPE: ("recipe", "haar_resnet", *certified, "train.checkpoint_every=4000", "train.evaluate_every=20000"),
    }
    return {
        label: Run(
            f"second-{name}",
            f"configs/cifar10.py:{variant}",
            tuple(flags),
            certify=(MARGIN,) if label.startswith("deterministic") else (),
        )
        for label, (name, variant, *flags) in kinds.items()
    }


def _small_heads():
    """A learned encoder and a fixed low-pass, each with its best head of .4 MFLOP on train[45000:], for equal seconds.

    On one core, 10,000 steps of the first take the seconds of 64,000 steps of the second.
    """
    wide = "model.head_widths=(1024,)"
    kinds = {
        "LSRS, learned encoder": ("learned", "learned", 3, AVERAGED, "model.head_norm=batch"),
        "ISRS, low-pass": ("lowpass", "lowpass", 3, AVERAGED, wide, "train.steps=64000"),
    }
    return _seeds(kinds, "configs/cifar10_mlp.py", decides=0.5, certify=(INTEGER,))


ENCODERS = {"lowpass": "low-pass, 3 channels", "bands": "low-pass, 12 channels", "haar": "Haar", "learned": "learned"}
HEADS = {"linear": "linear", "small": "MLP, 64", "mlp": "MLP, 512", "conv": "3 convolutions"}
STEPS = {  # head: in front of the encoders, in the order of `ENCODERS`; 540 seconds of one core each
    "linear": (65_000, 65_000, 29_000, 6_000),
    "small": (77_000, 55_000, 19_000, 5_500),
    "mlp": (46_000, 18_000, 5_600, 4_500),
    "conv": (16_000, 14_000, 8_100, 3_900),
}


def _grid():
    """Four encoders and four heads, trained for equal seconds with one recipe, of which nothing was chosen.

    Beside them the runs of `_small_heads`, trained for longer, and ISRS of a free network under the same loss, for the
    FLOPs (3,600 steps) and for the steps of the learned encoder there. The radii of convolutional classifiers are
    decided and not measured, which takes a fifth of the samples.
    """
    measured = {"linear": (MARGIN,), "conv": (INTEGER, RADII_ONLY)}
    rows = {}
    for seed, head, (number, encoder) in itertools.product(range(2), HEADS, enumerate(ENCODERS)):
        variant = encoder if head == "mlp" else f"{encoder}-{head}"
        flags = f"seed={seed}", AVERAGED, f"train.steps={STEPS[head][number]}"
        rows[f"{ENCODERS[encoder]}; {HEADS[head]}, seed {seed}"] = Run(
            f"grid-{variant}-seed{seed}",
            f"configs/cifar10_mlp.py:{variant}",
            flags,
            decides=0.5,
            certify=measured.get(head, (INTEGER,)),
        )
    for label, run in _small_heads().items():
        encoder, seed = ENCODERS[run.name.partition("-")[0]], label.rpartition(", ")[2]
        rows[f"{encoder}; MLP, tuned, 800 s, {seed}"] = run
    for steps in (3600, 10_000):
        # Under the whole attack from the first step on, this network does not begin to learn.
        attack = f"train.smoothadv.warmup_steps={steps // 3}"
        flags = "seed=0", *ATTACKED, attack, AVERAGED, "train.warmup_steps=150", f"train.steps={steps}"
        rows[f"none (ISRS); 7 conv., {steps:,} steps, seed 0"] = Run(
            f"free-{steps}-seed0", "configs/cifar10_small.py:free", flags, decides=0.5, certify=measured["conv"]
        )
    return rows


MNIST = {
    "LSRS": ("mnist-lsrs", "lsrs", 3),
    "ISRS, same network": ("mnist-isrs_split", "isrs_split", 3),
    "ISRS, head on the image": ("mnist-isrs", "isrs", 3),
}
_STRONGEST = "SmoothAdv, ε 0.5, and consistency"
DRAWN = {  # the curves that answer the question of a page
    "family": (*(f"{method}, identity start" for method in FAMILIES), "adaptive, random start"),
    "loss": tuple(
        f"{kind}: {loss}"
        for kind in ("LSRS", "ISRS, same network")
        for loss in ("Gaussian augmentation", "consistency", _STRONGEST)
    ),
    "headline": ("LSRS", f"LSRS, {ATTACK_LOSS}", "ISRS, same network", "ISRS, free network"),
    "full": (
        "ISRS, ResNet: Gaussian augmentation (every second image)",
        "LSRS, isometric encoder, ResNet: Gaussian augmentation",
        f"LSRS, isometric encoder, ResNet: {ATTACK_LOSS}",
        f"LSRS, ResNet: {ATTACK_LOSS}",
        f"LSRS: {ATTACK_LOSS}",
    ),
}
STUDIES = {
    "split": Study("pareto", _splits()),
    "family": Study("curves", _families(), drawn=DRAWN["family"]),
    "loss": Study("curves", _losses(), drawn=DRAWN["loss"]),
    "sigma": Study("envelope", _sigmas()),
    "headline": Study(
        "curves",
        _headline(),
        ("ISRS, same network", f"ISRS, same network, {ATTACK_LOSS}", "LSRS"),
        drawn=DRAWN["headline"],
    ),
    "small_heads": Study("deciding", _small_heads(), ("ISRS, low-pass",), "small_heads"),
    "grid": Study("grid", _grid(), page="small_heads"),
    "full": Study("curves", _full(), drawn=DRAWN["full"]),
    "second": Study("curves", _second(), page="accelerator"),
    "mnist": Study("curves", _seeds(MNIST, "configs/mnist.py", "test"), ("ISRS, same network",), "mnist"),
}
