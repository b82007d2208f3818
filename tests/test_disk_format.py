"""The constants of the on-disk format are pinned. A change needs a new format number and code that reads old files."""

import hashlib

import jax
import numpy as np
import pytest

from lsrs_jax.runtime import format as constants
from lsrs_jax.smoothing import from_counts
from lsrs_jax.smoothing.discrete_gaussian import grid
from lsrs_jax.smoothing.sampler import Sampler
from lsrs_jax.smoothing.schedule import make_schedule
from support import threefry

PINNED = {
    "FORMAT": 2,
    "PRNG": "threefry2x32",
    "KEY_DOMAINS": {"init": 1, "train": 2, "evaluate": 3, "certify": 0xE35A18C7, "probe": 5, "audit": 6},
    "STREAMS": {"selection": 1, "estimation": 2, "prediction": 3},
    "NOISE_OFFSETS": {"shared": 0, "independent": 16},
    "FIRST_LOOK": 1000,
    "LOOK_GROWTH": 1.3,
    "ANYTIME_FIRST_LOOK": 100,
    "ANYTIME_LOOK_GROWTH": 1.1,
    "COLUMN_BITS": 18,
    "THRESHOLD_BITS": 45,
    "GRID_BITS": 15,
    "LEDGER_COLUMNS": {
        1: ("idx", "label", "slack", "purpose", "first", "stop", "votes", "seconds", "crc"),
        2: ("idx", "label", "slack", "purpose", "first", "stop", "votes", "seconds", "run", "crc"),
    },
    "FIELD_COLUMNS": ("idx", "label", "predict", "radius", "correct", "time"),
    "AUDIT_COLUMNS": (
        *("idx", "label", "predict", "radius", "unperturbed"),
        *("pairs", "flips", "undecided", "distance", "attack"),
    ),
}
# SHA-256 of the sample blocks 0, 1 and 5 of every stream, as drawn by the code before these constants had one file.
NOISE = {"shared": "42c8fb72689eb0bb", "independent": "5e3a3876cb1871b1"}


def test_every_constant_of_the_format_is_pinned():
    found = {name: value for name, value in vars(constants).items() if name.isupper()}
    assert found == PINNED


def test_looks_grow_as_they_did():
    schedule = make_schedule("staged", 100, 100_000, 8)
    assert schedule.looks[:6] == (1000, 1304, 1696, 2200, 2856, 3712)
    assert schedule.looks[-3:] == (66_544, 86_504, 100_000)
    looks = (
        104,
        112,
        128,
        136,
        152,
        168,
        184,
        200,
        216,
        240,
        264,
        288,
        320,
        352,
        384,
        424,
        464,
        512,
        560,
        616,
        672,
        744,
        816,
        896,
        1000,
    )
    assert make_schedule("anytime", 100, 1000, 8).looks == looks


def test_blocks_of_noise_are_the_same_bits_as_ever():
    assert grid(0.5).spacing == 2.0**-15
    for noise, expected in NOISE.items():
        sampler = Sampler(lambda z: z, (3,), sigma=0.5, tile=(2, 4), noise=noise, devices=jax.local_devices()[:1])
        keys, ids, total = sampler.keys(threefry(7)), jax.numpy.asarray([4, 9]), hashlib.sha256()
        for stream in constants.STREAMS:
            for block in (0, 1, 5):
                drawn = sampler.blocks.noise(keys[stream], ids, block, sampler._tables)
                total.update(np.asarray(drawn).tobytes())
        assert total.hexdigest()[:16] == expected, noise


# --verify and other machines compare the radii of tables digit by digit. So the safety margins of the bounds and the
# rule for buckets are part of the format, too. These radii were computed before the format had a number.
SELECTION, ESTIMATION = [[60, 30, 10], [34, 33, 33]], [[7000, 2500, 500], [3600, 3300, 3100]]
AT_LOOKS = [[[800, 150, 50], [2100, 390, 110]], [[400, 350, 250]]]
RADII = [
    ({}, "0x1.ef2f45b417f2ap-3"),
    ({"bound": "multiclass"}, "0x1.1b86fe8627092p-2"),
    ({"slack": 1e-4, "lipschitz": 1.00000000005, "tau": 1e-10}, "0x1.eefad7e900443p-3"),
    ({"estimation": AT_LOOKS, "looks": (1000, 2600, 5000), "bound": "multiclass"}, "0x1.b0d09bc25c243p-2"),
]


@pytest.mark.parametrize(("change", "radius"), RADII, ids=["binary", "multiclass", "charges", "looks"])
def test_radii_are_the_same_digits_as_ever(change, radius):
    arguments = {"selection": SELECTION, "estimation": ESTIMATION, "sigma": 0.5, "alpha": 0.001}
    assert [found.hex() for found in from_counts(**arguments | change).radius.tolist()] == [radius, "0x0.0p+0"]
