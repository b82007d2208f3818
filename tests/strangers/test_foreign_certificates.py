"""A certificates.json from strangers gives the same certificates, or an error of one line."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lsrs_jax.certification import from_counts, store
from lsrs_jax.certification.identity import Identity
from lsrs_jax.runtime.errors import UserError
from support.hostile import JSON, STRANGE, changed, examples, json_text, places, sealed
from support.samples import derive


def test_numbers_from_which_a_radius_would_follow_are_not_believed(certification):
    stored = certification[2]
    for path, new in (
        (("identity", "arithmetic", "sigma"), 1.0),
        (("identity", "arithmetic", "tau"), 0.0),
        (("identity", "arithmetic", "spacing"), 2.0**-30),
        (("lipschitz", "constant"), 1.0),
        (("lipschitz", "layers", 0, "sigma_max"), 1.0),
        (("lipschitz", "output_shape"), [1]),
        (("lipschitz", "output_shape"), {}),
        (("identity", "model", "input_shape"), {}),
        (("identity", "classes"), 2.0),
        (("identity", "classes"), 10**12),
        (("identity", "classes"), "3"),
    ):
        assert not derive(certification, sealed(changed(stored, path, new)).encode()), path
    assert derive(certification, json_text(stored).encode())


def test_another_identity_is_told_in_words_that_a_user_knows(certification):
    home, _, stored, _ = certification
    path, identity = home / "certificates.json", stored["identity"]
    path.write_text(json.dumps(stored))
    assert store.read_same_run(path, Identity.from_dict(identity)).record == stored["record"]
    checkpoint, data = identity["checkpoint"], identity["data"] | {"version": "1.0.0", "split": "test"}
    for change, words in (
        (
            {"checkpoint": {"step": 5, "digest": "11"}},
            "of the checkpoint of step 3, not 5;",
        ),
        ({"checkpoint": checkpoint | {"digest": "11"}}, "the weights in the checkpoint of step 3 have changed;"),
        ({"data": data | {"name": "mnist", "digest": "11"}}, "data.name was 'digits' and is now 'mnist';"),
        ({"tile": [2, 32], "stages": [96]}, "certify.tile was [2, 16] and is now [2, 32];"),
        ({"stages": [96]}, "stages was"),
    ):
        with pytest.raises(UserError) as error:
            store.read_same_run(path, Identity.from_dict(identity | change))
        assert words in str(error.value), error.value
    old = stored | {"identity": identity | {"data": data | {"digest": "00"}}}
    path.write_text(sealed(old))
    with pytest.raises(UserError, match=r"images or labels of digits 1.0.0, split test, have changed \(digest"):
        store.read_same_run(path, Identity.from_dict(identity | {"data": data | {"digest": "11"}}))


@examples(300)
@given(st.data())
def test_a_changed_certificates_json_gives_the_same_certificates_or_none(certification, data):
    stored = certification[2]
    where = data.draw(st.sampled_from(list(places(stored))))
    text = sealed(changed(stored, where, data.draw(st.sampled_from(STRANGE) | JSON)))
    derive(certification, text.encode())


@examples(100)
@given(st.binary(max_size=50) | JSON.map(lambda value: json_text(value).encode()))
@example(b"[" * 100_000)
@example(b'{"identity": {}, "lipschitz": {}, "record": ' + b"[" * 950 + b"]" * 950 + b"}")
def test_any_certificates_json_is_refused_in_one_line(certification, text):
    assert not derive(certification, text)


def test_a_table_of_other_bytes_is_written_anew(certification):
    home, config, stored, table = certification
    (home / "certificates.json").write_text(json.dumps(stored))
    (home / "certificates.tsv").write_bytes(b"\xff\xfe")
    from_counts.derive(home, config)
    assert (home / "certificates.tsv").read_bytes() == table
