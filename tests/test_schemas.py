"""The JSON Schemas in docs/schemas describe the files that are written and published, and the fields of config.py."""

import copy
import json

import jsonschema
import numpy as np
import pytest
from referencing import Registry, Resource

from lsrs_jax.auditing.table import Journal, Settings
from lsrs_jax.certification import store
from lsrs_jax.certification.identity import Identity
from lsrs_jax.config import FIELDS, REQUIRED, config_to_dict, default
from lsrs_jax.layers.lipschitz import LayerBound
from lsrs_jax.runtime.documents import plain
from lsrs_jax.runtime.format import FORMAT
from support import ROOT

SCHEMAS = {path.name: json.loads(path.read_text()) for path in (ROOT / "docs" / "schemas").glob("*.json")}
REGISTRY = Registry().with_resources((name, Resource.from_contents(schema)) for name, schema in SCHEMAS.items())


def validator(name, part=None):
    """The validator of a schema, or of a part of it; references to other files are resolved."""
    schema = {"$ref": f"{name}.schema.json" + ("" if part is None else f"#/{part}")}
    return jsonschema.Draft202012Validator(schema, registry=REGISTRY)


def check(name, document):
    errors = [f"{list(error.absolute_path)}: {error.message[:300]}" for error in validator(name).iter_errors(document)]
    assert not errors, errors


def test_the_schemas_are_schemas():
    assert sorted(SCHEMAS) == ["audit.schema.json", "certificates.schema.json", "config.schema.json"]
    for schema in SCHEMAS.values():
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        jsonschema.Draft202012Validator.check_schema(schema)
    for name in ("audit", "certificates", "config"):
        assert SCHEMAS[f"{name}.schema.json"]["properties"]["format"]["maximum"] == FORMAT


# ----------------------------------------------------------------------------------------------------- configuration
def pointer(name):
    """The place of a dotted field of the configuration in its schema."""
    *sections, last = name.split(".")
    if sections == ["model"]:
        return f"$defs/model/properties/{last}"
    return "/".join(f"properties/{part}" for part in (*sections, last))


def part_of(name):
    schema = SCHEMAS["config.schema.json"]
    for key in pointer(name).split("/"):
        schema = schema[key]
    return schema


def leaves(schema, prefix=""):
    """The dotted names of all fields in a schema of sections."""
    if "$ref" in schema:
        schema = SCHEMAS["config.schema.json"]["$defs"][schema["$ref"].rpartition("/")[2]]
    for name, inner in schema["properties"].items():
        if "properties" in inner or "$ref" in inner:
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", tuple: "array"}


def test_the_schema_has_the_fields_of_the_configuration_and_no_others():
    assert set(leaves(SCHEMAS["config.schema.json"])) == {*FIELDS, "format"}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_described_as_in_the_configuration(name):
    field, schema = FIELDS[name], part_of(name)
    described = {"type": TYPES[type(field.default)], "description": field.meaning, "default": plain(field.default)}
    if field.absent is not REQUIRED:
        described["x-absent"] = plain(field.absent)
    assert {key: value for key, value in schema.items() if key in {*described, "x-absent"}} == described
    section = SCHEMAS["config.schema.json"]
    for key in pointer(name).split("/")[:-2]:
        section = section[key]
    assert (name.split(".")[-1] in section.get("required", [])) == (field.absent is REQUIRED)


PROBES = [-3, -2, -1, 0, 1, 2, 3, 100, 2**27, 2**27 + 1, 2**32 - 1, 2**32, 4096, 4097, 1024, 1025]
PROBES += [-0.5, 0.0, 1e-300, 2.0**-61, 0.5, 1.0, 1.5, 1e18, 2e18, 1e300]
PROBES += ["", "a", "cifar10", "adam", "sgd", "cosine", "none", "a/b", "a b", "float32", "bfloat16", "sound", "pmap"]
PROBES += [
    "NHWC",
    "NCHW",
    "shard_map",
    "fixed",
    "staged",
    "anytime",
    "binary",
    "multiclass",
    "shared",
    "independent",
    "smoothed",
    "deterministic",
]
PROBES += ["gaussian", "consistency", "macer", "smoothadv", "smoothadv_consistency", "margin", "constant", True, None]
PROBES += ["NHWC", "NCHW"]
PROBES += [
    (),
    (0.0, 1.0),
    (0.5, 0.2),
    (0.1, 1.0),
    (0.2,),
    (-1.0,),
    (0.5, 2.0),
    (1, 1),
    (32, 8),
    (0, 4),
    (4, 1, 1),
    (3,),
]
# Their limits compare several fields or elements, or say more about a name than a schema can.
LOOSE = {"data.name", "data.crop", "data.area", "train.noises", "train.late_noises", "train.warmup_steps"}
LOOSE |= {"certify.name", "certify.stop"}


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.limit])
def test_the_schema_of_a_field_accepts_what_its_limit_accepts(name):
    field, valid = FIELDS[name], validator("config", pointer(name)).is_valid
    kind = (int, float) if isinstance(field.default, float) else type(field.default)
    tried = [value for value in PROBES if isinstance(value, kind) and isinstance(value, bool) == (kind is bool)]
    accepted = {repr(value) for value in tried if field.limit.holds(value, default())}
    found = {repr(value) for value in tried if valid(plain(value))}
    assert accepted <= found
    assert found == accepted or name in LOOSE
    assert accepted
    assert not valid(None)
    assert not valid({})


def test_configurations_are_valid_and_wrong_ones_are_not():
    config = config_to_dict(default())
    check("config", config)
    check("config", {name: value for name, value in config.items() if name != "format"})
    for section, field, value in (
        ("certify", "alpha", "0.001"),
        ("certify", "alpha", 1),
        ("certify", "tile", [1, 1]),
        ("certify", "unknown", 1),
        ("model", "unknown", 1),
        ("train", "optimizer", "lion"),
    ):
        wrong = copy.deepcopy(config)
        wrong[section][field] = value
        assert not validator("config").is_valid(wrong), field
    del config["model"]["head"]
    assert not validator("config").is_valid(config)


# ------------------------------------------------------------------------------------------------------------- files
RESULTS = ROOT / "docs" / "results"
KINDS = [("certificates", p) for p in (*RESULTS.rglob("certificates.json"), *RESULTS.glob("*/certificates/*.json"))]
KINDS += [(path.stem, path) for name in ("audit", "config") for path in RESULTS.rglob(f"{name}.json")]


@pytest.mark.parametrize(("name", "path"), KINDS, ids=lambda part: part if isinstance(part, str) else part.parent.name)
def test_every_published_document_is_valid(name, path):
    document = json.loads(path.read_text())
    if "format" not in document:
        if "digest" not in document:
            assert not validator(name).is_valid(document)  # unsealed
            return
        document["format"] = 1  # sealed files of format 0 differ from format 1 in the number, and in one field:
        if "sha256" in (votes := document["derivation"]["votes"]):
            document["derivation"]["votes"] = {"votes.0.tsv": votes}
    check(name, document)


def test_what_the_commands_write_is_valid(certified):
    workdir = certified.parents[2]
    check("config", json.loads((workdir / "config.json").read_text()))
    document = json.loads((certified.parent / "certificates.json").read_text())
    check("certificates", document)
    check("certificates", document | {"derivation": None})
    for path, value in (
        (("digest",), "0"),
        (("record",), None),
        (("format",), FORMAT + 1),
        (("unknown",), 1),
        (("identity", "sigma"), "0.5"),
        (("identity", "images"), 0),
        (("identity", "arithmetic", "spacing"), -1),
        (("identity", "model", "unknown"), 1),
        (("identity", "certificate"), "deterministic"),
        (("derivation", "bound"), "margin"),
        (("derivation", "votes"), {}),
        (("derivation", "votes", "../votes.0.tsv"), {"bytes": 1, "sha256": "0" * 64}),
        (("lipschitz", "layers", 0, "sigma_max"), -1.0),
        (("lipschitz", "output_shape"), [0]),
        (("config", "certify", "n"), 0),
        (("training",), "0"),
    ):
        wrong = copy.deepcopy(document)
        part = wrong
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        assert not validator("certificates").is_valid(wrong), path
    for name in ("seed", "checkpoint", "images", "arithmetic"):
        wrong = copy.deepcopy(document)
        del wrong["identity"][name]
        assert not validator("certificates").is_valid(wrong), name


def test_other_kinds_of_certificates_are_valid(tmp_path):
    config = default()
    config.certify.certificate = "deterministic"
    model = plain(config.model.to_dict()) | {"input_shape": [8, 8, 1]}
    data = {"name": "digits", "version": "1", "split": "test", "digest": "1" * 64}
    facts = {"classes": 10, "checkpoint": {"step": 3, "digest": "0" * 64}, "data": data, "model": model}
    report = store.LipschitzReport((LayerBound("0 Dense", 0.5, 0.5, "SVD"),), (8, 8, 1), (4,))
    for begun, images in ((1, None), (2, 5)):
        identity = Identity("deterministic", platform="cpu cpu", format=begun, images=images, **facts)
        columns = {"idx": np.arange(2), "label": np.zeros(2, int), "predict": np.zeros(2, int), "time": np.ones(2)}
        text = store.format_columns(columns | {"radius": np.ones(2), "n": 0})
        store.write(tmp_path / str(begun), config, identity, report, [store.new_session(2)], {"bound": "margin"}, text)
        document = json.loads((tmp_path / str(begun) / "certificates.json").read_text())
        check("certificates", document)
        document["derivation"]["bound"] = "binary"
        assert not validator("certificates").is_valid(document)


def test_an_audit_is_valid(tmp_path):
    settings = SCHEMAS["audit.schema.json"]["properties"]["settings"]
    assert tuple(settings["properties"]) == tuple(settings["required"]) == Settings._fields
    journal = Journal(tmp_path, Settings(0, (0.5, 1.0), 2, 20, 16, 1000), "0" * 64)
    unfinished = json.loads((tmp_path / "audit.json").read_text())
    assert unfinished["audit"] is None
    check("audit", unfinished)
    journal.finish()
    document = json.loads((tmp_path / "audit.json").read_text())
    check("audit", document)
    for change in ({"audit": "0"}, {"settings": {}}, {"unknown": 1}, {"format": 0}):
        assert not validator("audit").is_valid(document | change), change
