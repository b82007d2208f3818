"""Workdirs with certificates of random votes on images in a file, and what is inside a page about them."""

import json
import re

import numpy as np

from lsrs_jax.auditing.table import Attacked, Found, Journal, Settings, attacked_rows
from lsrs_jax.certification import from_counts, store
from lsrs_jax.certification.identity import Identity
from lsrs_jax.certification.ledger import Ledger
from lsrs_jax.certification.table import read_table
from lsrs_jax.config import default
from lsrs_jax.data import load_split
from lsrs_jax.layers.lipschitz import LayerBound, LipschitzReport
from lsrs_jax.runtime.documents import plain
from lsrs_jax.runtime.files import digest_of
from lsrs_jax.smoothing.arithmetic import make_arithmetic
from lsrs_jax.smoothing.counts import Row
from lsrs_jax.smoothing.schedule import Schedule

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><!--<script>"


def noise(count, shape=(8, 8, 3), seed=0):
    """Images of noise, which compress worst, and labels of three classes."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *shape), dtype=np.uint8), np.arange(count) % 3


def write_data(path, images, labels, names=("cat", "dog", HOSTILE)):
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels, class_names=np.array(names))
    return path


def write_run(workdir, data, indices, seed=0, audited=0):
    """Certifies images `indices` of the file `data` with random votes, and audits some; returns the table."""
    rng, config, home = np.random.default_rng(seed), default(), workdir / "certify" / "default"
    config.data.name, config.data.dir = "npz", str(data)
    config.certify.n0, config.certify.n, config.certify.tile = 10, 100, (2, 16)
    dataset = load_split(config.data, "test")
    facts = {name: getattr(dataset, name) for name in ("name", "version", "split")} | {"digest": dataset.digest()}
    identity = Identity(
        certificate="smoothed",
        classes=3,
        checkpoint={"step": 3, "digest": "00"},
        data=facts | {"class_names": list(dataset.class_names)},
        model=plain(config.model.to_dict()) | {"input_shape": list(dataset.shape)},
        platform="cpu cpu",
        images=len(dataset),
        format=2,
    ).sampled(config, make_arithmetic("sound", config.sigma), (4,))
    with Ledger(home / "votes.0.tsv", Schedule(10, (100,), 16), 3, identity.run) as ledger:
        for idx in map(int, indices):
            label, share = int(dataset.labels[idx]), rng.dirichlet([0.3, 0.3, 0.3])
            share[(label + (idx % 5 == 4)) % 3] += 1  # each fifth image is wrong
            for stream, stop, n in (("selection", 1, 10), ("estimation", 7, 100)):
                counts = rng.multinomial(n, share / 2).astype(np.int64)
                ledger.append([Row(idx, label, 1e-3, stream, 0, stop, counts, 0.01)])
    lipschitz = LipschitzReport((LayerBound("0 Dense", 1.0, 1.0, "SVD"),), dataset.shape, (4,))
    store.write(home, config, identity, lipschitz, [store.new_session(len(indices))])
    from_counts.derive(home, config)
    table = read_table(home / "certificates.tsv")
    if audited:
        rows = attacked_rows(audited, len(table))
        attacked = Attacked(*(getattr(table, name)[rows] for name in Attacked._fields))
        zeros, distance = np.zeros(audited, int), attacked.radius + rng.uniform(0.1, 1, audited)
        distance[::7] = np.inf
        names = np.where(np.isinf(distance), "none", "pgd")
        away = rng.standard_normal((audited, *dataset.shape))
        scale = np.where(np.isinf(distance), 0, distance) / np.linalg.norm(away.reshape(audited, -1), axis=1)
        away *= scale[:, None, None, None]
        points = (dataset.read(attacked.idx, np.float64)[0] + away).astype(np.float32)
        journal = Journal(home, Settings(audited, (1.0,), 1, 1, 1, 100), digest_of(home / "certificates.tsv"))
        journal.append(attacked, Found(attacked.predict, zeros + 1, zeros, zeros, distance, names, points, zeros + 2))
        journal.finish()
    return table


def blocks(page):
    """The JSON of a page: its numbers, and its sheets of images."""
    text = page.read_text(encoding="utf-8")
    pattern = '<script type="application/json" id="{}">(.*?)</script>'
    return [json.loads(re.search(pattern.format(name), text, re.S)[1]) for name in ("data", "sheets")]
