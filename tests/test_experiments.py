"""The CIFAR-10 experiments from configuration to certificates, on a small set of random images in the same format."""

import numpy as np
import pytest

from lsrs_jax.certification.table import read_table
from support.commands import run

NARROW = "model.widths=(8,8,8,8,12,8,8,8)"  # XLA's CPU back end takes most of a minute for 128 channels


@pytest.mark.usefixtures("fast_compilation")
@pytest.mark.parametrize(
    ("experiment", "flags", "samples"),
    [
        (
            "cifar10.py",
            (
                NARROW,
                "train.head_dtype=bfloat16",
                "certify.head_dtype=bfloat16",
                "train.warmup_steps=1",
                "train.ema=0.9",
            ),
            100,
        ),
        pytest.param("cifar10_small.py", ("train.loss=smoothadv",), 100, marks=pytest.mark.soak),
        pytest.param("cifar10_small.py:isrs_split", ("train.loss=macer", "train.ema=0.9"), 100, marks=pytest.mark.soak),
        pytest.param("cifar10_study.py:split6_haar", ("certify.bound=multiclass",), 100, marks=pytest.mark.soak),
        pytest.param("cifar10_study.py:margin", (), 0, marks=pytest.mark.soak),
    ],
)
def test_an_experiment_runs_from_its_configuration_to_certificates(
    tmp_path, random_cifar10, experiment, flags, samples
):
    small = ("train.steps=2", "train.log_every=1", "data.batch_size=8", "certify.n=100", "certify.n0=10")
    small += ("certify.step=3", "certify.tile=(4, 8)", f"data.dir={random_cifar10}")
    out = run(
        "train",
        f"--config=configs/{experiment}",
        f"--workdir={tmp_path / 'w'}",
        *(f"--config.{flag}" for flag in (*small, *flags)),
    )
    assert "MFLOP per sample" in out
    out = run("certify", f"--workdir={tmp_path / 'w'}")
    assert "MFLOP per sample" in out
    table = read_table(tmp_path / "w" / "certify" / "default" / "certificates.tsv")
    np.testing.assert_array_equal(table.idx, [0, 3, 6, 9])
    assert (table.samples == samples).all()
