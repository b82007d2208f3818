"""Makes the tables of docs/results/accelerator.md from the JSON files of benchmarks/accelerator.py."""

import collections
import json
import re

from lsrs_jax.runtime.errors import UserError


def device_name(machine):
    """The name of the device of a result, as a reader should see it."""
    return machine["device"] + (", at tiny size" if machine.get("tiny") else "")


def load(folder):
    """Section → piece → result, for the pieces in a folder; and the machines that made them."""
    found, machines = collections.defaultdict(dict), []
    for path in sorted(folder.glob("*.*.json")):
        section, name = path.name.removesuffix(".json").split(".", 1)
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            found[section][name], machine = facts["result"], facts["machine"]
            device_name(machine)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} holds no result ({error}); remove it, and run makes it again") from error
        if machine not in machines:
            machines.append(machine)
    return found, machines


def markdown(folder, sections=("precision", "throughput", "whole")):
    """The tables of the results in a folder."""
    found, machines = load(folder)
    if not machines:
        raise UserError(f"{folder} holds no results: run makes them")
    parts = []
    for one in machines:
        versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        parts.append(f"{device_name(one)} ({one['backend']}), {one['day']}; {versions}")
    for section, parts_of in {"precision": _precision, "throughput": _throughput, "whole": _whole}.items():
        if found[section] and section in sections:
            parts += [f"## {section.capitalize()}", *map(folded, parts_of(found[section]))]
    return "\n\n".join(parts)


def table(header, rows):
    """A Markdown table; the header may be one text with bars between the columns."""
    header = header.split("|") if isinstance(header, str) else header
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def folded(part, most=10):
    """A part of a page; a table of more than `most` rows is folded behind their number."""
    rows = part.count("\n") - 1 if part.startswith("| ") else 0
    return f"<details>\n<summary>Table of {rows} rows</summary>\n\n{part}\n\n</details>" if rows > most else part


def _precision(found):
    """Tables and sentences of section precision."""
    rows = []
    for flag in ("default", "bfloat16", "highest"):
        for method, sigma in found.get(f"kernels-{flag}", {}).items():
            cells = [" / ".join(f"{value:.1e}" for value in sigma[kind]) for kind in ("built", "trained", "certified")]
            share = found.get(f"encoder-{flag}", {}).get(method, {})
            refused = "yes" if share.get("float32_refused") else "NO" if share else "-"
            cells.append(f"{share['share_of_the_charge']:.1e}" if share else "-")
            rows.append([flag, method, *cells, refused])
    if rows:
        columns = "matmul precision|family|float32 kernels as built|float32 layer as it runs|float64 layer as certified"
        yield table(f"{columns}|share of the rounding budget|float32 encoder refused", rows)
    if noise := found.get("noise"):
        values = f"χ² p-value {noise['p_value']:.2g}; against a σ wrong by 0.1 % {noise['wrong_p_value']:.2g}."
        yield f"Noise: {noise['draws']:,} draws on the device, {values}"
    if same := found.get("same-votes"):
        here, cpu = (same["average_certified_radius"][name] for name in ("here", "cpu"))
        yield (
            f"One model of the digits certified here and on the CPU: {same['votes_that_differ']:g} of "
            f"{same['votes']:,} samples differ, {same['predictions_that_differ']} of {same['images']} predictions; "
            f"radii by at most {same['largest_difference_of_radii']:.1e}; ACR {here:.5f} and {cpu:.5f}."
        )


def _throughput(found):
    """Tables and sentences of section throughput."""
    if ceilings := found.get("ceilings"):
        row = [f"{ceilings[name] / 1e12:.4g}" for name in ("float32", "tf32", "bfloat16", "copy")]
        yield table("matrix products, float32: TFLOP/s|TF32|bfloat16|copy, TB/s (read and written)", [row])
    rows = []
    for name, head in found.items():
        if name.startswith("votes-"):
            label, dtype = name.removeprefix("votes-").rsplit("-", 1)
            share = head["votes"] * head["flops"] / head["ceiling"]
            cells = [f"{head['votes'] / 1e6:.3g} M", "x".join(map(str, head["tile"])), f"{head['flops'] / 1e6:.3g}"]
            rows.append([label, dtype, *cells, f"{share:.0%}", f"{head['ceiling'] / 1e12:.4g}"])
    if rows:
        columns = "head|dtype|samples/s|batch|MFLOP per sample|share of the matmul ceiling"
        yield table(f"{columns}|this ceiling, measured in turns, TFLOP/s", rows)
    if noise := found.get("noise"):
        yield (
            f"Drawing the noise takes {noise['noise_share']:.1%} of the default head's loop; with independent noise for"
            f" every image, the loop draws {noise['independent_over_shared']:.1%} of the samples per second."
        )
    for dtype in ("float32", "bfloat16") if ceilings else ():
        yield from _layers(dtype, found, ceilings[dtype])
    if one := found.get("encoder"):
        row = [f"{one['float64']:,.0f}", f"{one['float32']:,.0f}", f"{one['flops'] / 1e6:.1f}"]
        yield table("default encoder in float64, images/s|in float32|MFLOP/image", [row])
    if steps := found.get("train-steps"):
        yield table("training step of configs/cifar10.py|ms", [[name, f"{1e3 * s:.1f}"] for name, s in steps.items()])
    if host := found.get("bookkeeping"):
        time = f"{host['seconds']:.1f} s, {1e6 * host['seconds'] / host['looks']:.0f} µs per image and look"
        yield f"Counting and deciding {host['images']:,} staged images on the host, samples drawn by NumPy: {time}."
    if "families" in found:
        yield found["families"]["markdown"].strip()


def _layers(dtype, found, ceiling):
    """Table of the layers of the default head alone, and their share of the time of a sample."""
    name = re.compile(f"votes-configs.*py-lsrs-on.*-{dtype}")
    head = next((head for key, head in found.items() if name.fullmatch(key)), None)
    rows = []
    for layer in found.get(f"layers-{dtype}", []) if head else []:
        share, rate = layer["count"] * layer["flops"] / layer["rate"] * head["votes"], layer["rate"] / ceiling
        rows.append([layer["layer"], str(layer["count"]), f"{layer['flops'] / 1e6:.2f}", f"{rate:.0%}", f"{share:.0%}"])
    if rows:
        yield table(f"default head in {dtype}|layers|MFLOP|share of the matmul ceiling|share of a sample's time", rows)


def _whole(found):
    """Table of section whole."""
    rows = []
    for name, one in found.items():
        seconds = f"{one['command_seconds']:.1f}" if one["command_seconds"] else "-"
        rows.append([name, f"{one['images']:,}", f"{one['votes']:,}", seconds, f"{one['loop_seconds']:.1f}"])
        rows[-1] += [str(one["sessions"]), f"{one['average_certified_radius']:.3f}"]
    yield table("schedule and dtype|images|samples|command, s|sampling and decisions, s|sessions|ACR", rows)
