"""What benchmarks/accelerator.py found, read back and shown as Markdown."""

import collections
import json
import re

import measure
import precision
import throughput

from lsrs_jax.runtime.errors import UserError


def named(facts):
    """The device of a `machine`."""
    return facts["device"] + (", at tiny size" if facts.get("tiny") else "")


def load(folder):
    """Section → piece → what it found, of the pieces that are there; and the machines they belong to."""
    found, machines = collections.defaultdict(dict), []
    for path in sorted(folder.glob("*.*.json")):
        section, name = path.name.removesuffix(".json").split(".", 1)
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            found[section][name], machine = facts["result"], facts["machine"]
            named(machine)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} holds no result ({error}); remove it, and run makes it again") from error
        if machine not in machines:
            machines.append(machine)
    return found, machines


def _precision(found):
    """Tables of section precision."""
    rows = []
    for flag in precision.FLAGS:
        for method, sigma in found.get(f"kernels-{flag}", {}).items():
            cells = [" / ".join(f"{value:.1e}" for value in sigma[kind]) for kind in ("built", "trained", "certified")]
            share = found.get(f"encoder-{flag}", {}).get(method, {})
            refused = "yes" if share.get("float32_refused") else "NO" if share else "-"
            cells.append(f"{share['share_of_the_charge']:.1e}" if share else "-")
            rows.append([flag, method, *cells, refused])
    if rows:
        columns = "matmul precision|family|float32 kernels as built|float32 layer as it runs|float64 layer as certified"
        measure.table(f"{columns}|of the charged rounding|float32 encoder refused", rows)
    if noise := found.get("noise"):
        print(
            f"Noise: {noise['draws']:,} draws on the device, χ² p-value {noise['p_value']:.2g}; against a σ wrong by "
            f"0.1 % {noise['wrong_p_value']:.2g}.\n"
        )
    if same := found.get("same-votes"):
        here, cpu = (same["average_certified_radius"][name] for name in ("here", "cpu"))
        print(
            f"One model of the digits certified here and on the CPU: {same['votes_that_differ']:g} of "
            f"{same['votes']:,} votes differ, {same['predictions_that_differ']} of {same['images']} predictions; "
            f"radii by at most {same['largest_difference_of_radii']:.1e}; ACR {here:.5f} and {cpu:.5f}.\n"
        )


def _throughput(found):
    """Tables of section throughput."""
    ceilings = found.get("ceilings")
    if not ceilings:
        return
    row = [f"{ceilings[name] / 1e12:.4g}" for name in ("float32", "tf32", "bfloat16", "copy")]
    measure.table("matrix products, float32: TFLOP/s|TF32|bfloat16|copy, TB/s (read and written)", [row])
    rows = []
    for name, votes in found.items():
        if not name.startswith("votes-"):
            continue
        head, dtype = name.removeprefix("votes-").rsplit("-", 1)
        share = votes["votes"] * votes["flops"] / votes["ceiling"]
        cells = [f"{votes['votes'] / 1e6:.3g} M", "x".join(map(str, votes["tile"])), f"{votes['flops'] / 1e6:.3g}"]
        rows.append([head, dtype, *cells, f"{share:.0%}", f"{votes['ceiling'] / 1e12:.4g}"])
    if rows:
        columns = "head|dtype|votes/s|tile|MFLOP/vote|of the matmul ceiling|the ceiling, measured in turns, TFLOP/s"
        measure.table(columns, rows)
    if noise := found.get("noise"):
        print(
            f"Drawing the noise takes {noise['noise_share']:.1%} of the default head's loop; with a draw of its own "
            f"for every image of a tile it casts {noise['independent_over_shared']:.1%} of the votes.\n"
        )
    for dtype in throughput.DTYPES:
        _layers(dtype, found, ceilings[dtype])
    if encoder := found.get("encoder"):
        rows = [[f"{encoder[kind]:,.0f}" for kind in ("float64", "float32")] + [f"{encoder['flops'] / 1e6:.1f}"]]
        measure.table("default encoder in float64, images/s|in float32|MFLOP/image", rows)
    if steps := found.get("train-steps"):
        rows = [[name, f"{1e3 * seconds:.1f}"] for name, seconds in steps.items()]
        measure.table("training step of configs/cifar10.py|ms", rows)
    for variant, profile in found.get("profile", {}).items():
        busy, span = (f"{1e3 * profile[name]:.2f} ms" for name in ("busy", "span"))
        print(f"A training step of {variant}, traced: {profile['kernels']:.0f} kernels, {busy} of {span}. Longest:\n")
        measure.table("kernel|ms of a step", [[name[:60], f"{1e3 * took:.3f}"] for name, took in profile["top"]])
    if host := found.get("bookkeeping"):
        print(
            f"Bookkeeping of {host['images']:,} staged images on the host, votes drawn from multinomial laws: "
            f"{host['seconds']:.1f} s, {1e6 * host['seconds'] / host['looks']:.0f} µs per image and look.\n"
        )
    if "families" in found:
        print(found["families"]["markdown"])


def _layers(dtype, found, ceiling):
    """Table of the default head's layers alone, and their share of a vote in the loop."""
    loop = re.compile(f"votes-configs.*py-lsrs-on.*-{dtype}")
    votes = next((votes for name, votes in found.items() if loop.fullmatch(name)), None)
    rows = []
    for layer in found.get(f"layers-{dtype}", []) if votes else []:
        share = layer["count"] * layer["flops"] / layer["rate"] * votes["votes"]
        rows.append([layer["layer"], str(layer["count"]), f"{layer['flops'] / 1e6:.2f}"])
        rows[-1] += [f"{layer['rate'] / ceiling:.0%}", f"{share:.0%}"]
    if rows:
        measure.table(f"default head in {dtype}|layers|MFLOP|of the matmul ceiling|of a vote's time", rows)


def _whole(found):
    """Table of section whole."""
    rows = []
    for name, whole in found.items():
        seconds = whole["command_seconds"]
        cells = [f"{whole['images']:,}", f"{whole['votes']:,}", f"{seconds:.1f}" if seconds else "-"]
        cells += [f"{whole['loop_seconds']:.1f}", str(whole["sessions"]), f"{whole['average_certified_radius']:.3f}"]
        rows.append([name, *cells])
    if rows:
        measure.table("schedule and dtype|images|votes|command, s|votes and decisions, s|sessions|ACR", rows)


def render(options):
    """Prints what is there as Markdown."""
    found, machines = load(options.out)
    if not machines:
        raise UserError(f"{options.out} holds no results: run makes them")
    for facts in machines:
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        print(f"{named(facts)} ({facts['backend']}), {facts['day']}; {versions}\n")
    for section, show in {"precision": _precision, "throughput": _throughput, "whole": _whole}.items():
        if found[section] and any(section == chosen.partition(".")[0] for chosen in options.sections):
            print(f"## {section.capitalize()}\n")
            show(found[section])
