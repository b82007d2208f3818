"""A valid file of every kind, and readers that check every content that they accept."""

import json
import types

import numpy as np

from lsrs_jax import report
from lsrs_jax.certification import from_counts, store, verify
from lsrs_jax.certification.identity import Identity
from lsrs_jax.certification.ledger import Ledger
from lsrs_jax.certification.rows import header_of
from lsrs_jax.certification.store import format_table
from lsrs_jax.certification.table import read_table
from lsrs_jax.config import check_config, config_from_dict, config_to_dict, default, load_config
from lsrs_jax.layers.lipschitz import LayerBound, LipschitzReport
from lsrs_jax.runtime.documents import plain
from lsrs_jax.runtime.format import AUDIT_COLUMNS
from lsrs_jax.smoothing import Certificates
from lsrs_jax.smoothing.arithmetic import make_arithmetic
from lsrs_jax.smoothing.counts import Row
from lsrs_jax.smoothing.schedule import Schedule
from support.hostile import answer, places


def table_text(rows):
    """The text that `format_table` makes of rows ``(idx, label, predict, radius, seconds, votes)``."""
    idx, label, predicted, radius, seconds, votes = zip(*rows, strict=True)
    counts = [
        types.SimpleNamespace(idx=i, label=y, seconds=s, slack=1e-6)
        for i, y, s in zip(idx, label, seconds, strict=True)
    ]
    predicted, p_a = np.array(predicted), np.full(len(rows), 0.9)
    found = Certificates(predicted, np.array(radius), p_a, np.array(votes), p_a, 1 - p_a, predicted == -1)
    return format_table(counts, found, 1.0)


TABLE = table_text([(0, 3, 3, 0.512, 0.25, 1000), (20, 1, -1, 0.0, 0.5, 1000), (40, 1, 2, 0.1, 1e-6, 300)])


def with_field(column, text):
    rows = [line.split("\t") for line in TABLE.splitlines()]
    rows[1][rows[0].index(column)] = text
    return "\n".join("\t".join(row) for row in rows) + "\n"


def check_table(table):
    """Checks the properties of every table that was read; the table can also be reported."""
    assert len(set(table.idx.tolist())) == len(table) > 0
    assert (table.idx >= 0).all()
    assert (np.isfinite(table.radius) & (table.radius >= 0)).all()
    assert (np.isfinite(table.seconds) & (table.seconds >= 0)).all() or np.isnan(table.seconds).all()
    np.testing.assert_array_equal(table.correct, table.predict == table.label)
    accuracy = [table.certified_accuracy(radius) for radius in (0, 0.25, 1e300)]
    assert 0 <= accuracy[2] <= accuracy[1] <= accuracy[0] <= 1 - table.abstention
    assert 0 <= table.average_certified_radius <= table.radius.max() * (1 + 1e-12)
    run = report.Run("x", table)
    lines = report.markdown([run], report.radius_grid([run])).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 3


def read(path, content, reader=read_table):
    path.write_bytes(content)
    found = answer(reader, path)
    table = found[0] if isinstance(found, tuple) else found
    if table is not None:
        check_table(table)
    return table


SCHEDULE = Schedule(10, (100,), 16)
RUN = "0123456789abcdef"  # the name of a run
HEADER = header_of(RUN)
ROWS = [
    Row(idx, 1, 1e-3, stream, first, stop, np.array(samples), 0.25)
    for idx in (4, 2)
    for stream, first, stop, samples in (
        ("selection", 0, 1, [1, 9, 0]),
        ("estimation", 0, 4, [2, 62, 0]),
        ("estimation", 4, 7, [0, 36, 0]),
    )
]


def counts_of(path, content):
    """The counts of a ledger with this content, or None if it is refused; a refused ledger stays unchanged."""

    def counts():
        with Ledger(path, SCHEDULE, 3, RUN) as ledger:
            return {
                idx: (image.label, image.slack, image.seconds, [part.tolist() for part in image.counts.values()])
                for idx, image in ledger.images.items()
            }

    path.write_bytes(content)
    found = answer(counts)
    assert found is not None or path.read_bytes() == content
    return found


def certified(home):
    """Writes a folder of certificates: ``(folder, config, content of certificates.json, bytes of the table)``."""
    config = default()
    config.certify.n0, config.certify.n, config.certify.tile = 10, 100, (2, 16)
    layers = (LayerBound("0 Dense", 1.25, 0.5, "SVD", 1e-15, 0.0), LayerBound("1 MaxMin", 1.0, 1.0, "permutation"))
    lipschitz = LipschitzReport(layers, (2, 2, 1), (4,))
    identity = Identity(
        certificate="smoothed",
        classes=3,
        checkpoint={"step": 3, "digest": "00"},
        data={"name": "digits", "version": "1.0.0", "split": "test", "digest": "00"},
        model=plain(config.model.to_dict()) | {"input_shape": [2, 2, 1]},
        platform="cpu cpu",
        images=5,
        format=2,
    ).sampled(config, make_arithmetic("sound", config.sigma), (4,))
    with Ledger(home / "votes.0.tsv", SCHEDULE, 3, identity.run) as ledger:
        ledger.append(ROWS)
    store.write(home, config, identity, lipschitz, [store.new_session(2)])
    from_counts.derive(home, config)
    stored = json.loads((home / "certificates.json").read_text())
    assert read_table(home / "certificates.tsv").radius.min() > 0
    return home, config, stored, (home / "certificates.tsv").read_bytes()


CONFIG = config_to_dict(default())
FIELDS = [".".join(map(str, path)) for path in places(CONFIG)]


def load(path, text):
    """Loads and checks a configuration that is stored as this text; None if it is refused."""
    path.write_bytes(text)
    config = answer(load_config, path)
    if config is not None:
        again = config_from_dict(config_to_dict(config))
        assert json.dumps(config_to_dict(again)) == json.dumps(config_to_dict(config))
    return config and answer(check_config, config)


def derive(certification, text):
    """Whether certificates can be derived beside a certificates.json of this text; they must be the right ones."""
    home, config, stored, table = certification
    path = home / "certificates.json"
    path.write_bytes(text)
    (home / "certificates.tsv").unlink(missing_ok=True)
    record = answer(store.read_same_run, path, Identity.from_dict(stored["identity"]))
    assert record is None or isinstance(record.record, list)
    (home / "certificates.tsv").write_bytes(table)
    answer(verify.run, home)
    (home / "certificates.tsv").unlink()
    answer(from_counts.derive, home, config)
    if (home / "certificates.tsv").exists():
        assert (home / "certificates.tsv").read_bytes() == table
        return True
    assert path.read_bytes() == text
    return False


AUDIT = "\t".join(AUDIT_COLUMNS) + "\n0\t3\t3\t0.5\t3\t12\t0\t2\t0.75\tpgd\n4\t1\t-1\t0.0\t-1\t0\t0\t0\tinf\tnone\n"


def reported(path):
    """The names and the notes of the runs in a folder."""
    runs = answer(report.load_runs, [str(path)])
    return None if runs is None else ([run.label for run in runs], report.notes(runs))
