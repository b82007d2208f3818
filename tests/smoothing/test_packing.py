"""Packed launches: later sample blocks in the slots that few images leave free. The counts stay the same."""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsrs_jax.smoothing.counts import Counts
from lsrs_jax.smoothing.engine import Engine, Images, Status
from lsrs_jax.smoothing.first_layer import FirstLayer
from lsrs_jax.smoothing.packing import Packing, Waste
from lsrs_jax.smoothing.sampler import Sampler
from lsrs_jax.smoothing.schedule import block_count, make_schedule
from lsrs_jax.smoothing.settings import SPMD
from support import threefry

SHAPE, RNG = (6, 6, 3), np.random.default_rng(5)
IMAGES = RNG.uniform(0, 1, (9, *SHAPE))
DENSE = RNG.standard_normal((math.prod(SHAPE), 24)).astype(np.float32) / 8
LAST = RNG.standard_normal((24, 4)).astype(np.float32)


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))((x - 0.5) / 0.25))
        return nn.Dense(4, use_bias=False)(nn.Conv(8, (3, 3), (2, 2))(x).reshape(len(x), -1))


def convolutional(dtype=jnp.float32):
    params = Convolutional().init(threefry(1), jnp.zeros((1, *SHAPE)))
    params = jax.tree.map(lambda leaf: (3 * leaf).astype(dtype), params)
    return lambda z: Convolutional().apply(params, z.astype(dtype)).astype(jnp.float32)


HEADS = {
    "dense": lambda z: jax.nn.relu(z.reshape(len(z), -1) @ DENSE) @ LAST,
    "integer first layer": (FirstLayer(DENSE, np.zeros(24)), lambda h: jax.nn.relu(h) @ LAST),
    "convolutions": convolutional(),
    "bfloat16": convolutional(jnp.bfloat16),
}


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(1, 70), st.data())
def test_every_block_of_every_image_is_counted_once(slots, data):
    images, devices = data.draw(st.integers(1, slots)), data.draw(st.integers(1, 5))
    first, length = data.draw(st.integers(0, 1000)), data.draw(st.integers(1, 90))
    packing = Packing(slots, images, -(-length // devices))
    stop, stride, seen = first + length, devices * packing.blocks, []
    for device in range(devices):
        for start in range(first + packing.blocks * device, stop, stride):
            blocks = start + packing.lanes.astype(np.int64)
            seen += [(slot % images, block) for slot, block in enumerate(blocks) if block < stop]
    assert sorted(seen) == sorted(itertools.product(range(images), range(first, stop)))
    counts = np.arange(2 * slots).reshape(slots, 2)
    expected = [counts[image::images].sum(axis=0) for image in range(images)]
    np.testing.assert_array_equal(packing.summed(counts), expected)


def counted(sampler, images, n, cuts, packed):
    """The counts of a stream in launches between `cuts`."""
    assert sampler.pack()
    program = sampler._packed
    sampler._packed = program if packed else False
    batch = sampler.put(sampler.quantize(IMAGES[:images]), np.arange(images) + 3)
    key, edges = sampler.keys(threefry(0))["estimation"], [0, *cuts, block_count(n, sampler.tile[1])]
    launches = [sampler.launch(batch, key, *ends, n) for ends in itertools.pairwise(edges)]
    kinds = {launch.result().packing is not None for launch in launches}
    sampler._packed = program
    return np.array([sampler.collect(launch, images) for launch in launches]), kinds


@pytest.mark.parametrize("noise", ["shared", "independent"])
@pytest.mark.parametrize("head", HEADS)
def test_counts_do_not_depend_on_the_packing(head, noise):
    sampler = Sampler(HEADS[head], SHAPE, sigma=0.5, tile=(9, 8), noise=noise, devices=jax.devices()[:3])
    for images, n, cuts in ((1, 1003, (7, 40)), (4, 333, ())):
        plain, kinds = counted(sampler, images, n, cuts, False)
        assert kinds == {False}
        packed, kinds = counted(sampler, images, n, cuts, True)
        assert True in kinds
        np.testing.assert_array_equal(packed, plain)
        assert (packed.sum(axis=(0, 2)) == n).all()
        assert (np.count_nonzero(packed.sum(axis=0), axis=1) > 1).all()  # so that other noise would be seen


@pytest.mark.parametrize("spmd", SPMD)
def test_packed_counts_on_all_devices(spmd):
    samplers = [
        Sampler(HEADS["dense"], SHAPE, sigma=0.5, tile=(9, 8), spmd=spmd, devices=jax.devices()[:devices])
        for devices in (1, 8)
    ]
    (one, _), (many, _) = (counted(sampler, 2, 2005, (100,), True) for sampler in samplers)
    np.testing.assert_array_equal(one, many)
    others, _ = counted(samplers[0], 2, 2005, (101,), True)  # one more block in the first launch
    assert (others[0] != one[0]).any()


def decided(images):
    return np.array([image.idx % 4 < len(image.looks) for image in images])


def test_a_schedule_gives_the_same_rows_packed_or_not():
    found = []
    for packed in (False, True):
        sampler = Sampler(HEADS["dense"], SHAPE, sigma=0.5, tile=(8, 8))
        sampler._packed = packed and (sampler.pack(), sampler._packed)[1]
        counts = Counts(make_schedule("staged", 50, 4000, 8), sampler.num_classes)
        images = Images(list(range(9)), [0] * 9, [0.0] * 9, sampler.quantize(IMAGES))
        Engine(sampler, threefry(0), counts, decided, Status(counts.schedule, 9, lambda line: None)).run(images)
        found.append({idx: image.looks.tolist() for idx, image in counts.images.items()})
    assert found[0] == found[1]


def test_a_second_program_is_compiled_once_free_slots_have_cost_as_much():
    waste, packing = Waste(), Packing(64, 16, 100)
    waste.add(4.0, packing)
    assert waste.left(2.5) == 0
    assert waste.left(3.5) == 0.5
    sampler = Sampler(HEADS["dense"], SHAPE, sigma=0.5, tile=(8, 8))
    sampler._loop.seconds = 1000.0
    sampler.one_batch(IMAGES[:1], threefry(0), "estimation", 4000)
    assert sampler.traces == 1
    assert 0 < sampler.until_packed[0] < sampler.until_packed[1] == 1000.0
    sampler._loop.seconds = 0.0
    sampler.one_batch(IMAGES[:1], threefry(0), "estimation", 4000)
    assert sampler.traces == 2
    assert sampler.until_packed == (0.0, 0.0)


def test_what_could_round_otherwise_or_has_changed_is_not_packed():
    """Float32 sums may round differently in another program; a head that was changed in place is another head."""
    sampler = Sampler(HEADS["dense"], SHAPE, sigma=0.5, tile=(8, 8), arithmetic="float32")
    assert sampler.put(sampler.quantize(IMAGES[:1])).packed is None
    weights = {"last": LAST.copy()}
    sampler = Sampler(lambda z: z.reshape(len(z), -1) @ DENSE @ weights["last"], SHAPE, sigma=0.5, tile=(8, 8))
    before = sampler.one_batch(IMAGES[:1], threefry(0), "estimation", 1000)
    weights["last"] *= -1
    assert not sampler.pack()
    np.testing.assert_array_equal(sampler.one_batch(IMAGES[:1], threefry(0), "estimation", 1000), before)


def test_a_packed_program_that_counts_otherwise_is_not_used():
    sampler = Sampler(HEADS["dense"], SHAPE, sigma=0.5, tile=(8, 8))
    before = sampler.one_batch(IMAGES[:1], threefry(0), "estimation", 1000)
    assert sampler.pack()
    right = sampler._packed
    sampler._packed = lambda *arguments: jnp.roll(right(*arguments), 1, axis=-1)
    np.testing.assert_array_equal(sampler.one_batch(IMAGES[:1], threefry(0), "estimation", 1000), before)
    assert sampler._packed is False
