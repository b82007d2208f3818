"""Files of old versions: all committed ones are read, missing fields get the old meaning, newer formats are refused."""

import gzip
import json
import shutil

import pytest

from lsrs_jax import report
from lsrs_jax.certification import ledger, store, verify
from lsrs_jax.config import FIELDS, REQUIRED, Field, config_from_dict, config_to_dict, default, load_config
from lsrs_jax.runtime.documents import digest, read_sealed, write_sealed
from lsrs_jax.runtime.errors import UserError
from lsrs_jax.runtime.format import FORMAT
from support.commands import ROOT

RESULTS = ROOT / "docs" / "results"
COMMITTED = sorted(RESULTS.rglob("certificates.json"))
PACKED = sorted((RESULTS / "accelerator" / "certificates").glob("*.json"))


def rewrite(path, change):
    """Changes a document and renews its digest."""
    content = json.loads(path.read_text())
    change(content)
    if "digest" in content:
        content["digest"] = digest(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("path", [*COMMITTED, *PACKED], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_committed_certificate_is_read_and_reported(path, tmp_path, capsys):
    stored, written = store.read(path), json.loads(path.read_text())
    model = stored.identity.model
    assert {**stored.identity.to_dict(), "model": {name: model[name] for name in written["identity"]["model"]}} == (
        written["identity"]
    )
    assert stored.sealed == ("digest" in written)
    assert (stored.config is not None) == ("config" in written)
    assert stored.lipschitz.constant == written["lipschitz"]["constant"]
    folder = path.parent
    if path in PACKED:
        folder = tmp_path / "packed"
        folder.mkdir()
        shutil.copy(path, folder / "certificates.json")
        (folder / "certificates.tsv").write_bytes(gzip.decompress(path.with_suffix(".tsv.gz").read_bytes()))
    report.run([f"A={folder}", f"--out={tmp_path / 'out'}", "--radii=0,0.25"])
    assert ("unsealed" in capsys.readouterr().out) == (not stored.sealed)
    if stored.sealed and stored.identity.certificate == "deterministic":
        verify.run(folder)
        return
    with pytest.raises(UserError, match=r"unsealed|is missing: without its samples"):
        verify.run(folder)


def test_the_committed_files_include_every_old_kind():
    stored = [store.read(path) for path in COMMITTED]
    unsealed = [one for one in stored if not one.sealed]
    assert len(COMMITTED) >= 101
    assert len(unsealed) == 31
    assert all(one.config is None for one in unsealed)
    smoothed = [one for one in unsealed if one.identity.certificate == "smoothed"]
    assert all(one.derivation["votes"] is None for one in smoothed)  # the old version did not record them
    assert [one.identity.classes for one in unsealed if one not in smoothed] == [None]
    ledgers = [one.derivation["votes"] for one in stored if one.sealed and one.identity.certificate == "smoothed"]
    assert all(list(names) == ["votes.0.tsv"] for names in ledgers)
    old = [p for p in COMMITTED if "area" not in json.loads(p.read_text()).get("config", {}).get("data", {"area": 0})]
    assert len(old) == 19
    assert all(store.read(path).settings.data.size == 0 for path in old)


def test_old_files_keep_their_meaning_when_a_field_is_added(monkeypatch, certification):
    folder, config, *_ = certification
    yesterday = config_to_dict(config)
    monkeypatch.setitem(FIELDS, "model.temperature", Field(0.5, 1.0, "Divides the logits."))
    assert default().model.temperature == 0.5
    assert config_from_dict(yesterday).model.temperature == 1.0
    stored = store.read(folder / "certificates.json")
    assert stored.settings.model.temperature == 1.0
    assert stored.identity.model["temperature"] == 1.0  # a resumed run compares it with its new identity
    verify.run(folder)
    changed = {**stored.identity.model, "temperature": 0.5}
    difference = stored.identity.how_it_differs(type(stored.identity)(**vars(stored.identity) | {"model": changed}))
    assert difference == "model.temperature was 1.0 and is now 0.5"


def test_a_field_has_a_meaning_where_it_is_absent_unless_every_version_wrote_it():
    later = {name: field for name, field in FIELDS.items() if field.absent is not REQUIRED}
    assert FIELDS["certify.arithmetic"].absent == "float32"  # the arithmetic before exact grid arithmetic existed
    old = config_to_dict(default())
    for name in later:
        *sections, last = name.split(".")
        section = old
        for part in sections:
            section = section[part]
        del section[last]
    del old["format"]
    config = config_from_dict(old)
    for name, field in later.items():
        value = config
        for part in name.split("."):
            value = value[part]
        assert value == field.absent, name
    for name in set(FIELDS) - set(later):
        broken = config_to_dict(default())
        *sections, last = name.split(".")
        section = broken
        for part in sections:
            section = section[part]
        del section[last]
        with pytest.raises(UserError, match=f"{name} is missing, which every version has written"):
            config_from_dict(broken)


def test_a_newer_format_and_an_unknown_field_say_so(certification, tmp_path):
    folder, config, *_ = certification
    copy = shutil.copytree(folder, tmp_path / "certify" / "default")
    path = copy / "certificates.json"
    for change, why in (
        (lambda content: content.update(format=FORMAT + 1), rf"it has format {FORMAT + 1}.*upgrade lsrs_jax"),
        (lambda content: content.update(format="1"), "its format number is '1'"),
        (lambda content: content.update(format=-1), "its format number is -1"),
        (lambda content: content.update(signature="x"), "unknown field 'signature'"),
        (lambda content: content["identity"].update(planet="x"), "unknown field 'identity.planet'; if a newer version"),
        (lambda content: content["identity"]["data"].update(licence="x"), "unknown field 'identity.data.licence'"),
        (lambda content: content["identity"]["model"].update(heda="x"), "unknown field 'identity.model.heda'"),
        (lambda content: content["derivation"].update(beta="x"), "unknown field 'derivation.beta'"),
        (lambda content: content["lipschitz"].update(beta="x"), "unknown field 'lipschitz.beta'"),
        (lambda content: content["config"].update(format=FORMAT + 1), "upgrade lsrs_jax"),
        (lambda content: content["config"]["model"].update(heda="x"), "unknown config field 'model.heda'.*model.head"),
    ):
        shutil.copy(folder / "certificates.json", path)
        rewrite(path, change)
        with pytest.raises(UserError, match=why):
            store.read(path)
    stored = tmp_path / "config.json"
    stored.write_text(json.dumps(config_to_dict(config) | {"format": FORMAT + 1}))
    with pytest.raises(UserError, match=rf"config.json: it has format {FORMAT + 1}"):
        load_config(stored)


def test_without_its_digest_a_file_is_never_called_intact(certification, tmp_path, capsys):
    folder, *_ = certification
    copy = shutil.copytree(folder, tmp_path / "certify" / "default")
    path = copy / "certificates.json"
    rewrite(path, lambda content: content.pop("digest"))
    with pytest.raises(UserError, match="its digest is missing"):  # files of this format are always sealed
        store.read(path)
    rewrite(path, lambda content: (content.pop("format"), content["identity"].pop("format")))
    assert not store.read(path).sealed
    for refused in (verify.run, lambda folder: store.read_folder(folder, "to attack")):
        with pytest.raises(UserError, match="is unsealed"):
            refused(copy)
    report.run([str(copy), f"--out={tmp_path / 'out'}"])
    assert "unsealed" in capsys.readouterr().out


def test_a_document_keeps_its_content_and_its_format_number(tmp_path):
    path = tmp_path / "x.json"
    write_sealed(path, {"a": (1, 2), "b": {"c": None}})
    assert json.loads(path.read_text())["format"] == FORMAT
    content = read_sealed(path, lambda content: content["a"], "do it again")
    assert content["a"] == [1, 2]
    assert content["b"] == {"c": None}
    assert content["format"] == FORMAT
    with pytest.raises(UserError, match=r"is damaged .*do it again"):
        read_sealed(path, lambda content: content["missing"], "do it again")


def test_a_ledger_of_the_first_format_is_read(certification):
    folder, *_ = certification
    assert ledger.files(folder)[0].read_text().split("\n")[0].split("\t")[3] == "purpose"
