"""`SmoothedClassifier.certify` of inputs that come in batches."""

import contextlib
import io
import itertools
import json
import tracemalloc

import numpy as np
import pytest

import verify_certificates
from lsrs_jax import SmoothedClassifier
from lsrs_jax.api.batches import Batches
from lsrs_jax.runtime.errors import UserError
from support import threefry
from support.commands import ended, fingerprint, run, without_time

RNG = np.random.default_rng(3)
X = RNG.random((10, 9))
W = RNG.normal(size=(9, 3)).astype(np.float32)
LABELS = (X @ W).argmax(axis=1)
OPTIONS = {"n": 2000, "schedule": "staged", "radii": (0.1, 0.2)}


def made(weights=W, **changes):
    return SmoothedClassifier(lambda z: z.reshape(len(z), -1) @ weights, **{"sigma": 0.25, "tile": (4, 16)} | changes)


def batches(sizes=(4, 3, 3), inputs=X, labels=LABELS):
    ends = list(itertools.accumulate(sizes))
    yield from ((inputs[end - size : end], labels[end - size : end]) for size, end in zip(sizes, ends, strict=True))


class Loader:
    """Batches that can be iterated again, as those of data loaders."""

    def __len__(self):
        return 3

    def __iter__(self):
        return batches()


def same(found, expected):
    for name in ("predict", "radius", "counts", "n", "p_a_lower", "p_b_upper", "abstain", "labels"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert (found.class_names, found.sigma, found.radii) == (expected.class_names, expected.sigma, expected.radii)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"noise": "independent"},
        {"encoder": lambda x: 2 * x, "lipschitz": 2.0},
        {"fallback": lambda x: 0.1 * (x @ W)[:, :3] - 1},
    ],
)
def test_batches_have_the_certificates_of_one_array(changes):
    options = OPTIONS | {"key": threefry(5)} | ({"bound": "multiclass"} if "fallback" in changes else {})
    expected = made(**changes).certify(X, LABELS, **options)
    same(made(**changes).certify(batches(), **options), expected)
    same(made(**changes).certify(Loader(), **options), expected)
    same(made(**changes).certify(batches((1, 9)), **options), expected)
    unlabelled = made(**changes).certify((inputs for inputs, _ in batches()), **options)
    np.testing.assert_array_equal(unlabelled.radius, expected.radius)
    assert unlabelled.labels is None


def test_files_of_batches_are_read_by_all(tmp_path):
    workdir = tmp_path / "w"
    found = made().certify(batches(), out=workdir, key=threefry(5), **OPTIONS)
    memory = made().certify(X, LABELS, key=threefry(5), **OPTIONS)
    np.testing.assert_array_equal(found.counts, memory.counts)
    np.testing.assert_allclose(found.radius, memory.radius, rtol=1e-11, atol=0)
    arrays = made().certify(X, LABELS, out=tmp_path / "arrays", key=threefry(5), **OPTIONS)
    assert without_time(found.folder / "certificates.tsv") == without_time(arrays.folder / "certificates.tsv")
    code, out, _ = ended("certify", f"--workdir={workdir}", "--verify", "--json")
    verdict = json.loads(out)
    assert (code, verdict["verdict"], verdict["certificates"], verdict["wanted"]) == (0, "intact", 10, 10)
    with contextlib.redirect_stdout(io.StringIO()) as report:
        assert verify_certificates.main([str(found.folder)]) == 0
    assert "0 of 10 images are missing" in report.getvalue()
    run("certify", f"--workdir={workdir}", "--from-counts", "--config.certify.alpha=0.01")
    assert ended("certify", f"--workdir={workdir}", "--verify")[0] == 0
    assert "| 10 |" in run("report", str(workdir), f"--out={tmp_path / 'report'}")
    rows = found.folder / "inputs.tsv"
    rows.write_text(rows.read_text().replace("3\t", "4\t", 1))
    assert "inputs.tsv has changed" in ended("certify", f"--workdir={workdir}", "--verify")[2]


def test_a_killed_call_goes_on_and_encodes_no_decided_input_again(tmp_path, monkeypatch):
    def call(out, given):
        return made(encoder=lambda x: 2 * x, lipschitz=2.0).certify(given, out=out, key=threefry(0), **OPTIONS)

    def stopping():
        yield from itertools.islice(batches(), 2)
        raise KeyboardInterrupt

    whole, folder = tmp_path / "whole" / "certify" / "default", tmp_path / "stopped" / "certify" / "default"
    call(tmp_path / "whole", batches())
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path / "stopped", stopping())
    with (folder / "inputs.tsv").open("a") as file:
        file.write("7\t1\tcut")
    before, read = (folder / "votes.0.tsv").read_bytes(), []
    own = Batches.read
    monkeypatch.setattr(Batches, "read", lambda self, index, dtype: read.extend(index) or own(self, index, dtype))
    call(tmp_path / "stopped", batches())
    assert set(read) == {7, 8, 9}
    assert (folder / "votes.0.tsv").read_bytes().startswith(before)
    assert without_time(folder / "certificates.tsv") == without_time(whole / "certificates.tsv")
    assert (folder / "inputs.tsv").read_bytes() == (whole / "inputs.tsv").read_bytes()
    # What was certified must come again, as it was.
    files = fingerprint(folder)
    other = X.copy()
    other[5, 0] += 1e-9
    for given, message in (
        (batches(inputs=other), "input 5 or its label is not the one of an earlier call"),
        (batches(labels=(LABELS + 1) % 3), "input 0 or its label"),
        (batches((4,)), "the batches end after 4 inputs, and an earlier call had 10"),
    ):
        with pytest.raises(UserError, match=message):
            call(tmp_path / "stopped", given)
        assert {name: fingerprint(folder)[name] for name in ("certificates.tsv", "votes.0.tsv", "inputs.tsv")} == {
            name: files[name] for name in ("certificates.tsv", "votes.0.tsv", "inputs.tsv")
        }
    call(tmp_path / "stopped", batches())


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (iter(()), {}, "no batch"),
        (batches((4,)), {"labels": LABELS}, "batches bring their labels"),
        ((x for x, _ in batches()), {"out": "w"}, "out needs labels"),
        (batches(labels=LABELS + 5), {"out": "w"}, "input 0 has the label"),
        (iter([(X[:4], LABELS[:4]), X[4:]]), {}, "or only one has labels"),
        (iter([X[:4], X[4:, :5]]), {}, "batch 1 has inputs of another shape"),
        (iter([(X[:4], LABELS[:3])]), {}, "labels must have shape"),
        (iter([X[:4], (255 * X[4:]).astype(np.uint8)]), {}, "batch 1 must be floating point"),
    ],
)
def test_bad_batches_are_refused(given, options, message, tmp_path):
    if "out" in options:
        options = {"out": tmp_path / "w"}
    with pytest.raises(UserError, match=message):
        made().certify(given, n=100, **options)


def test_only_one_batch_is_in_memory(tmp_path):
    """1,000 inputs of 80 kB: all of them together would take 80 MB."""
    weights, size = np.zeros((10_000, 3), np.float32), 25

    def many():
        for number in range(40):
            yield np.full((size, 10_000), number / 40), np.zeros(size, int)

    classifier = SmoothedClassifier(lambda z: z @ weights, sigma=0.25, tile=(25, 2))
    settings = {"n0": 2, "n": 4, "key": threefry(1)}
    classifier.certify(itertools.islice(many(), 2), out=tmp_path / "few", **settings)
    tracemalloc.start()
    try:
        found = classifier.certify(many(), out=tmp_path / "many", **settings)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == 1000
    assert peak < 25e6


def test_samples_of_other_inputs_are_of_another_run(tmp_path):
    """Rows of another stream with the same labels, put beside the inputs of this one."""
    for name, inputs in (("one", X), ("other", X[::-1].copy())):
        made().certify(batches(inputs=inputs, labels=np.zeros(len(X), int)), out=tmp_path / name, **OPTIONS)
    one, other = (tmp_path / name / "certify" / "default" for name in ("one", "other"))
    (one / "votes.1.tsv").write_bytes((other / "votes.0.tsv").read_bytes())
    with pytest.raises(UserError, match="another run"):
        made().certify(batches(labels=np.zeros(len(X), int)), out=tmp_path / "one", **OPTIONS)
