"""Derives published certificates again from their ledgers: python verify_certificates.py <workdir>/certify/<name>
Needs NumPy and SciPy alone. It shares no code with lsrs_jax, and executes nothing that it reads: it follows Cohen,
Rosenfeld and Kolter (2019) and docs/format.md, which also explains the exit codes."""

import contextlib
import json
import math
import re
import sys
import zlib
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from scipy import special, stats

ABSENT = {"bound": "binary", "schedule": "fixed", "arithmetic": "float32", "noise": "shared", "head_dtype": "float32"}
ABSENT |= {"certificate": "smoothed", "seed": -2, "fallback": ""}  # what a missing field of config.certify means
NAMELESS = {"folder", "npz", "hf", "arrays"}  # sets whose name and split an identity may record in another way
LEDGER = re.compile(r"votes\.(0|[1-9][0-9]{0,17})\.tsv")
FORMS = {int: r"[0-9]{1,18}", float: r"[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?"}


def need(condition: Any, problem: str) -> None:  # the files contradict each other, or the theorem
    if not condition:
        raise ValueError(problem)


@contextlib.contextmanager
def inside(where: Any) -> Any:
    try:
        yield
    except Exception as error:  # a damaged file gives one line, whatever it breaks
        known = error if isinstance(error, ValueError) else getattr(error, "strerror", None)
        raise ValueError(f"{where}: {known or repr(error)}") from error


def read(kind: Any, text: str) -> Any:
    need(re.fullmatch(FORMS[kind], text) and math.isfinite(float(text)), f"{text[:40]!r} is no number >= 0")
    return kind(text)


def read_document(path: Path) -> tuple[dict[str, Any], float, float]:  # with Lipschitz constant and least slack
    document = json.loads(
        path.read_text(encoding="utf-8"),
        object_pairs_hook=lambda pairs: need(len(dict(pairs)) == len(pairs), "a field stands twice") or dict(pairs),
        parse_constant=lambda name: need(False, f"{name} is no number"),
    )
    need("digest" in document, "it is unsealed: without a digest nobody can tell whether it was changed")
    content = json.dumps({name: value for name, value in document.items() if name != "digest"}, sort_keys=True)
    need(document["digest"] == sha256(content.encode()).hexdigest(), "it has changed: its digest is another one")
    version, begun = document.setdefault("format", 0), document["identity"].get("format", 1)
    known = type(version) is int and 0 <= version <= 2 and type(begun) is int and 1 <= begun <= max(version, 1)
    need(known, f"its format is {version!r}, begun in {begun!r}; this program knows the formats 0, 1 and 2")
    need(derivation := document["derivation"], "it describes samples, but no certificates yet")
    sized = begun == 1 or (type(document["identity"].get("images")) is int) != ("inputs" in derivation)
    need(sized, "it does not say how many images the split has")
    identity, config, report = document["identity"], document["config"], document["lipschitz"]
    config["certify"] = ABSENT | config["certify"]
    model = {name: config["model"].get(name, own) for name, own in identity["model"].items()}
    own, claimed = ((re.split("[:/]", one["data"]["name"])[0], one["data"].get("split")) for one in (config, identity))
    kinds = {identity["certificate"], config["certify"]["certificate"]}
    same = model == identity["model"] and kinds in ({"smoothed"}, {"deterministic"})
    need(same and (own[0] in NAMELESS or own == claimed), "identity and configuration differ in kind, model or data")
    factors, claimed = [layer["sigma_max"] for layer in report["layers"]], report["constant"]
    need(all(0 <= factor < math.inf for factor in factors) and 2.0**-200 <= claimed <= 2.0**200, "out of range")
    product = math.prod(map(Fraction, factors), start=Fraction(1))  # exact
    most = product * (1 + Fraction(len(factors) + 1, 10**15)) + Fraction(2, 10**12)
    need(product <= Fraction(claimed) <= most, f"the Lipschitz constant {claimed!r} is not the product of the layers'")
    if identity["certificate"] != "smoothed":
        return document, float(claimed), 0.0  # no samples
    certify, sigma, latent = config["certify"], config["sigma"], report["output_shape"]
    need(2.0**-60 <= sigma <= 2.0**60 and 1e-100 <= certify["alpha"] < 1, "sigma or alpha is out of range")
    n0, n, (_, block), classes, looks = *map(certify.get, ("n0", "n", "tile")), identity["classes"], set[int]()
    whole = all(type(size) is int and size >= 1 for size in (n0, n, block, classes, *latent))
    need(whole and max(n0, n) <= 2**27 and 2 <= classes <= 2**20, "n0, n, tile, classes or latent are out of range")
    target, growth = {"fixed": (n, 2), "staged": (1e3, 1.3), "anytime": (1e2, 1.1)}.get(certify["schedule"], (0, 0))
    need(target and certify["bound"] in ("binary", "multiclass"), "unknown schedule")
    while target * growth**0.5 < n:
        looks.add(-(-int(target) // block) * block)
        target *= growth
    composed = {"fallback" in one for one in (identity, document["derivation"])} | {bool(certify["fallback"])}
    need(composed in ({False}, {certify["bound"] == "multiclass"}), "its parts contradict each other on the fallback")
    digests = "".join(identity.get(name, {}).get("digest", "") for name in ("checkpoint", "data", "fallback")).encode()
    seeds, own = {-1: int.from_bytes(sha256(digests).digest()[:4], "big"), -2: config["seed"]}, certify["seed"]
    facts, least = {"sigma": min(sigma, float(np.float32(sigma))), "tau": 0.0}, 10 * 2.0**-22 * sigma * (1 - 2.0**-24)
    if certify["arithmetic"] == "sound":  # exact grid arithmetic; the spacing is a power of two
        facts = {"sigma": sigma, "spacing": 2.0 ** (math.frexp(sigma)[1] - 15), "tau": math.prod(latent) * 2.0**-44}
        least = math.sqrt(math.prod(latent)) * facts["spacing"]
    wanted = {name: certify[name] for name in ("n0", "n", "schedule", "tile", "noise", "head_dtype", "alpha", "bound")}
    wanted |= {"stages": [*sorted(look for look in looks if look < n), n], "sigma": sigma, "prng": "threefry2x32"}
    wanted |= {"arithmetic": facts | {"name": certify["arithmetic"]}, "seed": seeds.get(own, own)}
    for name, value in wanted.items():
        stated = document["derivation" if name in ("alpha", "bound") else "identity"][name]
        need(stated == value, f"its {name} is {stated!r}, the configuration gives {value!r}")
    return document, float(claimed), least * (1 - 1e-12)


class Image:  # its counts: of the selection, and of the estimation at every look that it has reached
    def __init__(self, label: int, slack: float, classes: int) -> None:
        self.label, self.slack, self.looks, self.seconds, self.fallback = label, slack, list[Any](), 0.0, (-1, 0.0)
        self.counts, self.done = np.zeros((2, classes), int), [0, 0]  # samples of the selection and the estimation

    def add(self, row: tuple, identity: dict[str, Any]) -> None:  # each block once, none over a look
        _, later, first, stop, label, slack, counts, seconds = row
        block, stops, start = identity["tile"][1], identity["stages"] if later else [identity["n0"]], self.done[later]
        following = first * block == start and first < stop and (stop - 1) * block < stops[-1]
        need(following, f"blocks [{first}, {stop}) do not follow the {start} samples before them")
        need(not later or self.done[0] == identity["n0"], "estimation samples before the selection is complete")
        end, look = min(stop * block, stops[-1]), next(samples for samples in stops if samples > start)
        need(end <= look, f"blocks [{first}, {stop}) reach over the look at {look} samples")
        need(sum(counts.values()) == end - start, f"{sum(counts.values())} samples, where {end - start} belong")
        need((label, slack) == (self.label, self.slack), "its label or slack changes between rows")
        self.counts[later, list(counts)] += list(counts.values())
        self.done[later], self.seconds = end, self.seconds + seconds
        self.looks += [self.counts[1].copy()] if later and end == look else []


def parse_row(text: str, run: str | bool) -> tuple:
    body, _, crc = text.rpartition("\t")
    need(crc == f"{zlib.crc32(body.encode()):08x}", "its checksum differs")
    idx, label, slack, purpose, first, stop, votes, seconds, *named = body.split("\t")
    need(named == ([run] if run else []), f"it names the run {named}, the folder is of the run {run!r}")
    need(purpose in ("selection", "estimation"), f"unknown purpose {purpose[:40]!r}")
    pairs = [(read(int, class_), read(int, found)) for class_, found in (pair.split(":") for pair in votes.split(","))]
    need(all(found for _, found in pairs) and len(dict(pairs)) == len(pairs), "bad counts")
    whole = read(int, idx), int(purpose == "estimation"), read(int, first), read(int, stop), read(int, label)
    return *whole, read(float, slack), dict(pairs), read(float, seconds)


def read_ledgers(folder: Path, votes: dict[str, Any], identity: dict[str, Any], least: float) -> dict[int, Image]:
    votes = {"votes.0.tsv": votes} if "sha256" in votes else votes  # the first sealed files named one ledger only
    run = identity.get("format", 1) > 1 and sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    header = "idx label slack purpose first stop votes seconds run crc\n".replace(" ", "\t")
    header, rows, images = header if run else header.replace("run\t", ""), [], dict[int, Image]()
    found = {path.name: path for path in sorted(folder.glob("votes.*.tsv")) if LEDGER.fullmatch(path.name)}
    lost = [name for name in votes if name not in found and votes[name].get("bytes", math.inf) > len(header)]
    need(votes and not lost, f"{folder}: {lost} is missing")
    for name, path in found.items():
        with inside(path):
            content = path.read_bytes()
            part = content[: votes.get(name, {"bytes": 0})["bytes"]]  # rows may follow it
            digest = {"bytes": len(part), "sha256": sha256(part).hexdigest()}
            need(votes.get(name, digest) == digest, "it has changed: its digest is not the one in certificates.json")
            whole = content[: content.rfind(b"\n") + 1].decode("utf-8")
            need(header.encode().startswith(content[: len(header)]), f"its first line is not {header!r}")
        for line, text in enumerate(whole.split("\n")[1:-1], start=2):
            with inside(f"{path} line {line}"):
                rows.append((parse_row(text, run), f"{path} line {line}"))
    named = 1 + max([0, *(max(row[4], *row[6]) for row, _ in rows)])  # a forger's classes shall take no memory
    need(identity["classes"] <= max(2**25 // (len(rows) + 1), 1000 * named), f"no sample is of a class above {named}")
    for row, where in sorted(rows, key=lambda found: found[0][:3]):
        with inside(f"{where} (image {row[0]})"):
            need(least <= row[5], f"its slack {row[5]} is below {least}, the rounding of a latent")
            images.setdefault(row[0], Image(row[4], row[5], identity["classes"])).add(row, identity)
    return {idx: image for idx, image in images.items() if image.done[1] in identity["stages"]}


def bounds(k: Any, n: Any, level: Any, upper: bool, horizon: int = 0) -> np.ndarray:  # or of bets up to it
    columns = np.stack([part.ravel() for part in np.broadcast_arrays(n - k if upper else k, n, level)]).astype(float)
    (k, n, level), inverse = np.unique(columns, axis=1, return_inverse=True)
    low, high, share = np.zeros(len(k)), np.ones(len(k)), np.where(n == horizon, 0.25, -1.0 if horizon else 1.0)
    goal, half = -np.log(0.75 * level), 0.5 ** np.arange(16)[:, None]
    for _ in range(70):
        refuted = stats.binom.sf(k - 1, n, p := (low + high) / 2) <= share * level
        if horizon:
            angle, stake = np.arcsin(np.sqrt(p)), np.sqrt(half) / np.sum(np.sqrt(half))
            q = np.minimum(angle + np.sqrt((goal + 3) / (2 * horizon * half)), np.pi / 2)
            won = special.xlogy(k, np.sin(q) / np.sin(angle)) + special.xlogy(n - k, np.cos(q) / np.cos(angle))
            refuted |= special.logsumexp(2 * won, axis=0, b=stake) >= goal
        low, high = np.where(refuted, p, low), np.where(refuted, high, p)
    found = (low * (1 - 1e-10) if horizon or not upper else low)[inverse.ravel()]
    return np.minimum(1 - found + 1e-10, 1.0) if upper else found


def buckets(selection: np.ndarray, n: int, level: float, bound: str) -> tuple[np.ndarray, np.ndarray]:  # candidate: 0
    rivals, order, options = selection.shape[1] - 1, np.argsort(-selection, axis=1, kind="stable"), []
    for alone in range(min(rivals, 17) if bound == "multiclass" else 1):
        for groups in range(1, 1 + (min(rivals - alone, 4) if bound == "multiclass" else 1)):
            turns = [*range(groups), *reversed(range(groups))]
            options.append([*range(1 + alone), *(1 + alone + turns[i % len(turns)] for i in range(rivals - alone))])
    ranked, inverse = np.unique(np.take_along_axis(selection, order, axis=1), axis=0, return_inverse=True)
    shares, largest = ranked / ranked.sum(axis=1, keepdims=True), np.zeros((len(options), len(ranked)))
    for row, option in enumerate(options):
        sums = np.zeros((max(option) + 1, len(ranked)))
        for rank in range(1, np.count_nonzero(ranked.any(axis=0))):  # rounding counts: float64 sums, strongest first
            sums[option[rank]] += shares[:, rank]
        largest[row] = sums[1:].max(axis=0)
    of_option = np.array([max(option) for option in options])
    levels = np.where(of_option == 1, level, level / (1 + of_option))[:, None]
    p_a = bounds(np.floor(shares[:, 0] * n), n, levels, upper=False).reshape(largest.shape)
    p_b = bounds(np.floor(largest * n), n, levels, upper=True).reshape(largest.shape)
    best = (stats.norm.ppf(p_a) - stats.norm.ppf(np.minimum(1 - p_a, p_b))).argmax(axis=0)[inverse.ravel()]
    return np.take_along_axis(np.array(options)[best], np.argsort(order, axis=1), axis=1), of_option[best]


def derive(images: list[Image], document: dict[str, Any], lipschitz: float) -> Any:  # class, radius, p_A, p_B
    derivation, looks, facts = document["derivation"], *map(document["identity"].get, ("stages", "arithmetic"))
    horizon, tau = looks[-1] * (document["identity"]["schedule"] == "anytime"), facts["tau"] * (1 + 1e-9)
    level, composed = derivation["alpha"] / (1 if horizon else len(looks)), "fallback" in derivation
    selection, slack = np.stack([image.counts[0] for image in images]), np.array([image.slack for image in images])
    answer, margin = map(np.array, zip(*(image.fallback for image in images), strict=True))
    apart = composed & (answer != (leader := selection.argmax(axis=1)))  # the fallback has another class
    bucket, count = buckets(selection, looks[-1], level, derivation["bound"])
    reached = [image.looks[-1 if horizon else 0 :] for image in images]
    owner = np.repeat(np.arange(len(images)), list(map(len, reached)))
    counts, aside = np.concatenate(reached), np.flatnonzero(apart[owner])
    levels, n = (level / np.where((count == 1) & ~apart, 1, 1 + count + apart))[owner], counts.sum(axis=1)
    lower = bounds(counts[np.arange(len(owner)), leader[owner]], n, levels, False, horizon)
    counts[aside, answer[owner[aside]]] = 0  # the class of the fallback needs no bound
    largest = np.array([np.bincount(bucket[row], counts[i])[1 - apart[row] :].max() for i, row in enumerate(owner)])
    above = np.where(apart[owner], above := bounds(largest, n, levels, True, horizon), np.minimum(1 - lower, above))
    starts = np.searchsorted(owner, np.arange(len(images)))  # the best bounds of the looks that an image has reached
    p_a = np.maximum(np.maximum.reduceat(lower, starts) - tau, 0.0)
    p_b = np.minimum(np.minimum(np.minimum.reduceat(above, starts) + tau, np.where(apart, 1, 1 - p_a)) + 1e-15, 1.0)
    both, radii = [(p_a, np.minimum(1 - p_a + 1e-15, 1.0)), (np.maximum(1 - p_b - 1e-15, 0.0), p_b)], []
    for z_a, z_b in map(stats.norm.ppf, both if composed else [(p_a, p_b)]):
        sides = np.where(z_b < z_a, z_a - z_b, -np.inf)
        absolute = 1e-14 * (np.abs(z_a) + np.abs(z_b)) if document["format"] >= 2 else 0.0
        latent = facts["sigma"] / 2 * np.minimum(sides * (1 - 1e-12), sides - absolute) - slack
        radii.append(np.maximum(latent, 0.0) / lipschitz * (1 - 1e-12))
    votes = apart & (radii[0] > 0)  # they answer another class than the fallback
    radius = np.where(votes, radii[0], np.maximum(radii[0], np.minimum(margin, radii[-1])))
    return zip(np.where(apart & ~votes, answer, leader), radius, p_a, p_b, strict=True)


def check_table(text: str, document: dict[str, Any], lipschitz: float, images: dict[int, Image] | None) -> set[int]:
    names = ["idx", "label", "predict", "radius", "correct", "time", "n"]
    names += ["lipschitz", "slack"] if images is None else ["p_a_lower", "p_b_upper", "lipschitz", "slack", "abstain"]
    first, _, rest = text.partition("\n")
    need(first.split("\t") == names, f"its columns are not {names}")
    need(re.fullmatch(r"([-+.0-9e\t]+\n)+", rest), "it holds more than lines of numbers")
    rows = [dict(zip(names, line.split("\t"), strict=True)) for line in rest.splitlines()]
    indices = [read(int, row["idx"]) for row in rows]
    need(len(set(indices)) == len(rows), "an image is there twice")
    need(images is None or images.keys() >= set(indices), "the ledgers have no certificate for some of its images")
    derived = derive([images[idx] for idx in indices], document, lipschitz) if images else iter(())
    for line, row in enumerate(rows, start=2):
        with inside(f"line {line} (image {row['idx']})"):
            predict, radius, _, near = int(row["predict"]), *(read(float, row[name]) for name in ("radius", "time")), []
            equal = {"correct": predict == read(int, row["label"]), "lipschitz": lipschitz, "n": 0}
            if images is not None:
                image, (candidate, proven, p_a, p_b) = images[int(row["idx"])], next(derived)
                unit = min(1.0, document["identity"]["arithmetic"]["sigma"] / lipschitz)
                near = [("radius", proven, 1e-6 * unit, 1e-9 * proven + 1e-12 * unit), ("p_a_lower", p_a, 2e-8, 1e-12)]
                near += [("p_b_upper", p_b, 1e-12, 2e-8), ("time", image.seconds, 1e-5, 1e-5)]
                tie = max(radius, proven) <= 1e-12 * unit  # rounding decides whether the image abstains
                equal |= {"predict": candidate if (radius if tie else proven) > 0 else -1, "abstain": predict == -1}
                equal |= {"label": image.label, "slack": image.slack, "n": image.looks[-1].sum()}
            for name, own, less, more in [*near, *((name, own, 0, 0) for name, own in equal.items())]:
                need(-less <= float(row[name]) - own <= more, f"{name} is {row[name]}, the counts give {own!r}")
    return set(indices)


def verify(folder: Path) -> int:
    path, table, ledgers = folder / "certificates.json", folder / "certificates.tsv", list(folder.glob("votes.*.tsv"))
    odd = [str(file) for file in (path, *folder.glob("*.tsv")) if file.exists() and not file.is_file()]
    need(not odd, f"{odd} is not a file")  # a reader of a pipe would wait
    with inside(path):
        document, lipschitz, least = read_document(path)
        identity, derivation, certify = document["identity"], document["derivation"], document["config"]["certify"]
        need(least or not ledgers, "deterministic certificates have no ledger")
    images = read_ledgers(folder, derivation["votes"], identity, least) if least else None
    for name in [name for name in ("fallback", "inputs") if name in derivation]:
        with inside(file := folder / f"{name}.tsv"):  # rows may follow the recorded part
            part = file.read_bytes()[: derivation[name]["bytes"]]
            need(sha256(part).hexdigest() == derivation[name]["sha256"], "it has changed: another digest")
            for idx, label, *answer in [line.split("\t") for line in part.decode("utf-8").splitlines()[1:]]:
                if image := (images or {}).get(read(int, idx)):
                    need(read(int, label) == image.label, f"image {idx} has another label there")
                    image.fallback = (read(int, answer[0]), read(float, answer[1])) if answer[1:] else (-1, 0.0)
    with inside(table):
        need(sha256(table.read_bytes()).hexdigest() == derivation["certificates"], "it has changed: another digest")
        found = check_table(table.read_text(encoding="utf-8"), document, lipschitz, images)
    need(max(found) < identity.get("images", 2**53), f"{table}: the split has no image {max(found)}")
    size = identity.get("images") or certify["stop"] or max(found) + 1  # of the split, if it was recorded
    wanted = range(certify["start"], min(certify["stop"] or size, size), certify["step"])
    missing = len(wanted) - (asked := sum(idx in wanted for idx in found))
    samples = sum(int(image.counts.sum()) for image in images.values()) if images else 0
    proof = f"follow from {samples} samples" if least else "are unchanged; they are deterministic, without samples"
    print(f"{len(found)} certificates {proof}; the Lipschitz constant {lipschitz} is the product of its layers")
    old = "; in format 1 nobody can: that no image of the split is missing; the run" * (identity.get("format", 1) == 1)
    print(f"not checked: that the network gives them (certify --recast=N); the audit (certify --verify){old}")
    print(f"{missing} of {len(wanted)} images are missing, of {wanted}; {len(found) - asked} certificates of others")
    return 3 if missing or asked < len(found) or old else 0


def main(arguments: list[str]) -> int:
    try:
        need(len(arguments) == 1, "usage: python verify_certificates.py FOLDER")
        return inside("error")(verify)(Path(arguments[0]))
    except ValueError as problem:
        print("".join(letter if letter.isprintable() else "?" for letter in str(problem))[:1000], file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
