"""No content of a file or a flag from strangers is executed."""

import os
import pickle
import shutil
import subprocess
import sys

import pytest

from lsrs_jax import report
from lsrs_jax.config import default
from lsrs_jax.flags import config_from_flags
from lsrs_jax.training.metrics import Metrics
from support.executions import Payload, nothing_executed, payloads
from support.hostile import answer, changed, json_text, places
from support.samples import CONFIG, FIELDS, HEADER, TABLE, counts_of, derive, load, read


@pytest.mark.parametrize("attack", ["eval", "exec", "pickle", "system", "process"])
def test_the_listener_hears_an_execution(tmp_path, attack):
    canary = tmp_path / "canary"
    attacks = {
        "eval": lambda: eval("1 + 1"),
        "exec": lambda: exec("pass"),
        "pickle": lambda: pickle.loads(pickle.dumps(Payload(tmp_path / "other"))),
        "system": lambda: os.system("true"),
        "process": lambda: subprocess.run(["true"], check=True),
    }
    with pytest.raises(AssertionError), nothing_executed(canary):
        attacks[attack]()
    with pytest.raises(AssertionError), nothing_executed(canary):
        canary.touch()


def everywhere(value, texts):
    """One copy of the value for each of its parts, in which one of the texts replaces that part."""
    return [changed(value, where, texts[number % len(texts)]) for number, where in enumerate(places(value))]


def test_no_file_and_no_flag_is_executed(folder, certification, tmp_path, monkeypatch):
    """Puts code into every field of every file that is read, and into every flag."""
    canary = tmp_path / "canary"
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # this library unpickles its own data
    home, _, stored, table = certification
    texts = payloads(canary)
    whole = [*(text.encode() for text in texts), pickle.dumps(Payload(canary)), pickle.dumps(Payload(canary), 0)]
    rows = [line.split("\t") for line in TABLE.splitlines()]
    tables = ["\n".join("\t".join(map(str, row)) for row in table).encode() for table in everywhere(rows, texts)]
    derive(certification, json_text(stored).encode())  # done once before, because lazy imports execute code
    load(folder / "config.json", json_text(CONFIG).encode())
    answer(config_from_flags, ["--config.certify.n=5"], default())
    with nothing_executed(canary):
        for text in [*(json_text(value).encode() for value in everywhere(stored, texts)), *whole]:
            derive(certification, text)
            (home / "certificates.tsv").write_bytes(table)
            answer(report.load_runs, [str(home)])
        for text in [*(json_text(value).encode() for value in everywhere(CONFIG, texts)), *whole]:
            load(folder / "config.json", text)
            shutil.copy(folder / "config.json", folder / "metrics.jsonl")
            Metrics(folder, 10, 10).close()
        for text in [*tables, *whole]:
            read(folder / "table.tsv", text)
            counts_of(folder / "ledger.tsv", HEADER.encode() + text)
        for field in FIELDS:
            for text in texts:
                answer(config_from_flags, [f"--config.{field}={text}"], default())
