"""The inputs of a certification that came in batches: label and digest of each, in inputs.tsv beside the ledgers.

Nobody knows such a set beforehand, so no digest of all of it can be a part of the identity. Instead, the row of an
input is on disk before its first sample, and every later session compares what it is given.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from lsrs_jax.certification import OTHER_NAME
from lsrs_jax.runtime import files
from lsrs_jax.runtime.errors import UserError

FILE = "inputs.tsv"
_HEADER = "idx\tlabel\tsha256\n"


class Inputs:
    """Labels (int32) and SHA-256 digests of the inputs 0, 1, … of a folder; without a folder they are not written."""

    def __init__(self, folder: Path | None = None, recorded: dict[str, Any] | None = None) -> None:
        """Reads the file in a folder; if a table was `recorded` with it, its part must be as it was.

        Raises UserError for a damaged file. A last line that a kill has cut off does not count.
        """
        self.path, self._digests, self._labels = folder and folder / FILE, bytearray(), np.zeros(1024, np.int32)
        self._total, self._size = hashlib.sha256(_HEADER.encode()), len(_HEADER)
        content = self.path.read_bytes() if self.path and self.path.exists() else b""
        if recorded:
            part = content[: recorded["bytes"]]
            if {"bytes": len(part), "sha256": hashlib.sha256(part).hexdigest()} != recorded:
                problem = "has changed: its digest is not the one in certificates.json" if content else "is missing"
                raise UserError(f"{self.path} {problem}; restore it, or {OTHER_NAME}")
        header, *lines = content[: content.rfind(b"\n") + 1].decode("utf-8", "replace").splitlines(keepends=True) or [
            ""
        ]
        labels = list[int]()
        try:
            if header not in ("", _HEADER):
                raise ValueError("its first line is another one")
            for line in lines:
                idx, label, digest = line.rstrip("\n").split("\t")
                if idx != str(len(labels)) or len(digest) != 64:
                    raise ValueError(f"{line[:80]!r} is not the row of input {len(labels)}")
                labels.append(int(label))
                self._digests += bytes.fromhex(digest)
        except ValueError as error:
            raise UserError(f"{self.path} is damaged ({error}); restore it, or {OTHER_NAME}") from error
        self._keep(0, labels)
        for line in lines:
            self._total.update(line.encode())
            self._size += len(line)

    def __len__(self) -> int:
        return len(self._digests) // 32

    @property
    def labels(self) -> Int32[np.ndarray, " inputs"]:
        """The labels of all inputs so far."""
        return self._labels[: len(self)]

    def _keep(self, first: int, labels: Sequence[int]) -> None:
        while len(self._labels) < first + len(labels):
            self._labels = np.concatenate([self._labels, self._labels])
        self._labels[first : first + len(labels)] = labels

    def digest(self) -> dict[str, Any]:
        """Size and SHA-256 of the file."""
        return {"bytes": self._size, "sha256": self._total.hexdigest()}

    def take(self, first: int, inputs: np.ndarray, labels: Sequence[int]) -> None:
        """Takes the inputs `first`, `first` + 1, …, and writes those that are new.

        Raises UserError for one that is another input, or has another label, than in an earlier session.
        """
        lines = list[str]()
        for idx, (one, label) in enumerate(zip(inputs, labels, strict=True), first):
            digest = hashlib.sha256(one.tobytes()).digest()
            if idx < len(self):
                if digest != self._digests[32 * idx : 32 * idx + 32] or label != self.labels[idx]:
                    remedy = f"give the same batches in the same order, not shuffled or augmented, or {OTHER_NAME}"
                    raise UserError(f"input {idx} or its label is not the one of an earlier call; {remedy}")
                continue
            self._digests += digest
            lines.append(f"{idx}\t{label}\t{digest.hex()}\n")
        if lines and self.path:
            text = "".join(lines)
            if not self.path.exists():
                files.write_atomic(self.path, _HEADER)
            with self.path.open("r+b") as file:
                file.truncate(self._size)  # what a kill has cut off
            files.append(self.path, text)
            self._total.update(text.encode())
            self._size += len(text)
        self._keep(first, labels)
