"""`SmoothedClassifier.certify(out=...)`: the files of the command, resumption, and what is refused."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import verify_certificates
from lsrs_jax import SmoothedClassifier
from lsrs_jax.runtime.errors import UserError
from support import ROOT, threefry
from support.commands import ended, run, without_time

DIM = (3, 3, 1)
RNG = np.random.default_rng(3)
X = RNG.random((10, *DIM))
W = RNG.normal(size=(9, 3)).astype(np.float32)
LABELS = (X.reshape(10, -1) @ W).argmax(axis=1)
SETTINGS = {"sigma": 0.25, "tile": (4, 16)}


def linear(weights):
    return lambda z: z.reshape(len(z), -1) @ weights


def made(weights=W, **changes):
    return SmoothedClassifier(linear(weights), **SETTINGS | changes)


def table(workdir, name="default"):
    return workdir / "certify" / name / "certificates.tsv"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("out") / "mine"
    return workdir, made(class_names=["a", "b", "c"]).certify(X, LABELS, out=workdir, n=2000)


def test_every_reader_reads_the_folder(written, tmp_path):
    workdir, found = written
    assert found.folder == workdir / "certify" / "default"
    code, out, _ = ended("certify", f"--workdir={workdir}", "--verify", "--json")
    verdict = json.loads(out)
    assert (code, verdict["verdict"], verdict["certificates"]) == (0, "intact", 10)
    assert "given in Python" in str(verdict["beyond"])
    with contextlib.redirect_stdout(io.StringIO()) as report:
        assert verify_certificates.main([str(found.folder)]) in (None, 0)
    assert "10 certificates follow" in report.getvalue()
    run("certify", f"--workdir={workdir}", "--from-counts", "--config.certify.alpha=0.01")
    out = run("report", f"mine={workdir}", f"--out={tmp_path / 'report'}")
    assert f"| {found.accuracy():.3f} |" in out
    made(class_names=["a", "b", "c"]).certify(X, LABELS, out=workdir, n=2000)  # back to alpha 0.001


@pytest.mark.parametrize("changes", [{}, {"noise": "independent"}, {"encoder": lambda x: 2 * x, "lipschitz": 2.0}])
def test_counts_and_radii_are_those_in_memory(tmp_path, changes):
    options = {"n": 2000, "schedule": "staged", "radii": (0.1, 0.2)}
    memory = made(**changes).certify(X, LABELS, **options)
    files = made(**changes).certify(X, LABELS, out=tmp_path, **options)
    np.testing.assert_array_equal(files.counts, memory.counts)
    np.testing.assert_allclose(files.radius, memory.radius, rtol=1e-11, atol=0)
    keyed = made(**changes).certify(X, LABELS, out=tmp_path, name="keyed", key=threefry(5), **options)
    np.testing.assert_array_equal(keyed.counts, made(**changes).certify(X, LABELS, key=threefry(5), **options).counts)


def test_a_constant_that_its_author_claims_is_not_intact(tmp_path):
    made(encoder=lambda x: 2 * x, lipschitz=2.0).certify(X, LABELS, out=tmp_path, n=500)
    code, out, _ = ended("certify", f"--workdir={tmp_path}", "--verify")
    assert code == 3
    assert "the Lipschitz constant 2.00000000000" in out


def test_a_second_call_draws_nothing_and_other_levels_come_from_the_ledger(written, tmp_path):
    workdir, found = written
    ledger = (workdir / "certify" / "default" / "votes.0.tsv").read_bytes()
    again = made(class_names=["a", "b", "c"]).certify(X, LABELS, out=workdir, n=2000, alpha=0.01)
    assert (workdir / "certify" / "default" / "votes.0.tsv").read_bytes() == ledger
    assert (again.radius > found.radius)[found.radius > 0].all()
    np.testing.assert_array_equal(again.counts, found.counts)


PROGRAM = """
import sys, numpy as np
sys.path.insert(0, {tests!r})
from api_classifier import classifier, X, LABELS
classifier().certify(X, LABELS, out=sys.argv[1], n=2_000_000, progress=print)
"""


def test_a_killed_call_resumes_to_the_same_bytes(tmp_path):
    module = (
        "import numpy as np\nfrom lsrs_jax import SmoothedClassifier\nrng = np.random.default_rng(3)\n"
        "X = rng.random((12, 64)); W = rng.normal(size=(64, 3)).astype(np.float32)\nLABELS = (X @ W).argmax(axis=1)\n"
        "def classifier(): return SmoothedClassifier(lambda z: z @ W, sigma=0.25, tile=(4, 16))\n"
    )
    (tmp_path / "api_classifier.py").write_text(module)
    program = [sys.executable, "-c", PROGRAM.format(tests=str(tmp_path))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([*program, str(killed)], env=environment, stdout=subprocess.DEVNULL)
    ledger, deadline = killed / "certify" / "default" / "votes.0.tsv", time.monotonic() + 120
    while time.monotonic() < deadline and not (ledger.exists() and ledger.read_bytes().count(b"\n") > 6):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert ledger.exists()
    for out in (killed, whole):
        subprocess.run([*program, str(out)], env=environment, stdout=subprocess.DEVNULL, check=True)
    assert without_time(table(killed)) == without_time(table(whole))
    assert len(json.loads((killed / "certify" / "default" / "certificates.json").read_text())["record"]) == 2


def other_function(z):
    return jnp.tanh(z.reshape(len(z), -1) @ W)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda out: made(W + 1e-6).certify(X, LABELS, out=out, n=2000),
            "the parameters of the classifier have changed",
        ),
        (lambda out: made().certify(X, (LABELS + 1) % 3, out=out, n=2000), "images or labels"),
        (lambda out: made().certify(X + 1e-9, LABELS, out=out, n=2000), "images or labels"),
        (lambda out: made(sigma=0.3).certify(X, LABELS, out=out, n=2000), "sigma was 0.25"),
        (lambda out: made(tile=(4, 8)).certify(X, LABELS, out=out, n=2000), "tile"),
        (lambda out: made().certify(X, LABELS, out=out, n=3000), "certify.n was 2000"),
        (lambda out: made().certify(X, LABELS, out=out, n=2000, key=threefry(3)), "seed"),
        (
            lambda out: made(class_names=["a", "x", "c"]).certify(X, LABELS, out=out, n=2000),
            "class 0 was '0', and it is 'a' now; use another name",
        ),
        (
            lambda out: SmoothedClassifier(other_function, **SETTINGS).certify(X, LABELS, out=out, n=2000),
            "another function of the same parameters",
        ),
        (lambda out: made(encoder=lambda x: x, lipschitz=1.0).certify(X, LABELS, out=out, n=2000), "another out"),
        (lambda out: made().certify(X, LABELS, out=out, n=2000, name="../x"), "plain folder name"),
        (lambda out: made().certify(X, LABELS, out=out, n=2000, alpha=2), "alpha"),
        (
            lambda out: made().certify(X, LABELS, out=out, key=jax.random.wrap_key_data(np.uint32([7, 7]))),
            "seed below 2",
        ),
    ],
)
def test_a_folder_of_something_else_is_refused_with_the_reason(tmp_path_factory, change, message):
    out = tmp_path_factory.mktemp("refused")
    made().certify(X, LABELS, out=out, n=2000)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        change(out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_another_encoder_is_another_classifier(tmp_path):
    """Also if it has the same constant: its latents are others."""
    scale = np.linspace(0.5, 1, 9).reshape(DIM)

    def with_encoder(factors):
        made(encoder=lambda x: x * factors, lipschitz=1.0).certify(X, LABELS, out=tmp_path, n=500)

    with_encoder(scale)
    with_encoder(scale.copy())
    with pytest.raises(UserError, match="the parameters of the classifier have changed"):
        with_encoder(scale[::-1].copy())
    for other in (lambda x: jnp.sin(x * scale), lambda x: x * scale * 0.5):
        with pytest.raises(UserError, match="another function of the same parameters"):
            made(encoder=other, lipschitz=1.0).certify(X, LABELS, out=tmp_path, n=500)


def test_a_resumption_after_an_upgrade_of_jax_names_it(tmp_path, monkeypatch):
    made().certify(X, LABELS, out=tmp_path, n=500)
    made().certify(X, LABELS, out=tmp_path, n=500)
    monkeypatch.setattr(jax, "__version__", "0.99")
    made().certify(X, LABELS, out=tmp_path, n=500)  # the same program
    with pytest.raises(UserError, match=r"or JAX 0.99 writes it otherwise than 0"):
        SmoothedClassifier(other_function, **SETTINGS).certify(X, LABELS, out=tmp_path, n=500)


def test_the_workdir_of_a_training_is_refused(copy):
    with pytest.raises(UserError, match="holds a training"):
        made().certify(X, LABELS, out=copy)


def test_commands_that_need_the_classifier_say_where_it_is(written):
    workdir, _ = written
    for command in (["certify"], ["certify", "--recast=2"], ["audit"]):
        code, _, err = ended(command[0], f"--workdir={workdir}", *command[1:])
        assert code == 2
        assert "given in Python" in err
        assert len(err.strip().splitlines()) == 1


def test_attacks_are_written_beside_the_certificates(tmp_path):
    classifier = made()
    classifier.certify(X, LABELS, out=tmp_path, n=2000)
    audit = classifier.audit(X, LABELS, out=tmp_path, steps=5, votes=200)
    assert len(audit.idx) == 10
    assert audit.flips.sum() == 0
    assert "attacked at" in run("report", f"mine={tmp_path}", f"--out={tmp_path / 'report'}")
    code, out, _ = ended("certify", f"--workdir={tmp_path}", "--verify")
    assert (code, "0 flips" in out) == (0, True)
    with pytest.raises(UserError, match="images was 10 and is now 3"):
        classifier.audit(X[:3], LABELS[:3], out=tmp_path)


class Callback:
    """A head whose parameters JAX does not see."""

    def __init__(self, weights, digest):
        self.weights = weights
        if digest:
            self.digest = digest

    def __call__(self, z):
        shape = jax.ShapeDtypeStruct((len(z), 3), np.float32)
        return jax.pure_callback(lambda z: np.asarray(z).reshape(len(z), -1) @ self.weights, shape, z)


def test_a_head_that_calls_python_needs_a_digest_of_its_own(tmp_path):
    with pytest.raises(UserError, match="attribute digest"):
        SmoothedClassifier(Callback(W, ""), **SETTINGS).certify(X, LABELS, out=tmp_path, n=200)
    first = SmoothedClassifier(Callback(W, "one"), **SETTINGS).certify(X, LABELS, out=tmp_path, n=200)
    again = SmoothedClassifier(Callback(W, "one"), **SETTINGS).certify(X, LABELS, out=tmp_path, n=200)
    np.testing.assert_array_equal(first.counts, again.counts)
    with pytest.raises(UserError, match="the parameters of the classifier have changed"):
        SmoothedClassifier(Callback(W, "two"), **SETTINGS).certify(X, LABELS, out=tmp_path, n=200)


def test_slack_that_the_folder_does_not_have_is_refused(tmp_path):
    made().certify(X, LABELS, out=tmp_path, n=500)
    with pytest.raises(UserError, match="that is given now"):
        made().certify(X, LABELS, out=tmp_path, n=500, slack=0.1)
    more = made().certify(X, LABELS, out=tmp_path, n=500, slack=0.1, name="more")
    less = made().certify(X, LABELS, out=tmp_path, n=500, slack=0.01, name="more")
    np.testing.assert_array_equal(less.radius, more.radius)  # the larger slack of its ledger holds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": -W}, "the parameters of the classifier have changed"),
        ({"sigma": 0.3}, "sigma was 0.25"),
        ({"tile": (4, 8)}, "tile"),
        ({"noise": "independent"}, "noise"),
        ({"arithmetic": "float32"}, "arithmetic"),
        ({"encoder": lambda x: x, "lipschitz": 1.0}, "the parameters of the classifier have changed"),
    ],
)
def test_attacks_on_certificates_of_another_classifier_are_refused(written, changes, message):
    workdir, _ = written
    with pytest.raises(UserError, match=message):
        made(class_names=["a", "b", "c"], **changes).audit(X, LABELS, out=workdir)
    with pytest.raises(UserError, match="images or labels"):
        made(class_names=["a", "b", "c"]).audit(X + 1e-9, LABELS, out=workdir)
    with pytest.raises(UserError, match="another function of the same parameters"):
        SmoothedClassifier(other_function, class_names=["a", "b", "c"], **SETTINGS).audit(X, LABELS, out=workdir)
    assert not (workdir / "certify" / "default" / "audit.tsv").exists()


def test_parameters_that_changed_in_place_are_not_filed_under_their_new_name(tmp_path):
    weights = W.copy()
    classifier = made(weights)
    classifier.predict(X, key=threefry(0), n=100)
    weights *= -1
    with pytest.raises(UserError, match="make a new SmoothedClassifier"):
        classifier.certify(X, LABELS, out=tmp_path, n=500)
    assert not (tmp_path / "certify").exists()
    found = made(weights).certify(X, LABELS, out=tmp_path, n=500)
    np.testing.assert_array_equal(found.counts, made(-W).certify(X, LABELS, n=500).counts)


def test_a_head_with_a_policy_for_its_gradient_has_an_identity(tmp_path):
    """The policy is a function of Python that no sample calls; it is made anew with every head."""

    def head(scale):
        policy = jax.checkpoint_policies.save_only_these_names("x")
        return jax.checkpoint(lambda z: jnp.tanh(scale * z.reshape(len(z), -1)) @ W, policy=policy)

    first = SmoothedClassifier(head(1.0), **SETTINGS).certify(X, LABELS, out=tmp_path, n=200)
    again = SmoothedClassifier(head(1.0), **SETTINGS).certify(X, LABELS, out=tmp_path, n=200)
    np.testing.assert_array_equal(first.counts, again.counts)
    with pytest.raises(UserError, match="another function of the same parameters"):
        SmoothedClassifier(head(2.0), **SETTINGS).certify(X, LABELS, out=tmp_path, n=200)
