"""Results as entries of the leaderboard of certified robustness (``_data/board.yml``; Li, Xie and Li 2023)."""

import json
import math
from collections.abc import Sequence

from lsrs_jax.reporting.runs import Run, incomparable


def board(runs: Sequence[Run], radii: Sequence[float], data: str, title: str) -> str:
    """YAML with one setting per radius above 0, and one record per run in it; strings are written as in JSON.

    The authors fill in ``link`` and ``venue``. Of several runs, the title of each names the run; a comment says if
    their numbers of samples differ.
    """
    different = incomparable(runs)
    lines = [f"# {json.dumps(different, ensure_ascii=False)}"] if different else []
    for radius in radii:
        if radius <= 0:
            continue
        lines += [f"- setting: {json.dumps(_setting(data, radius))}", "  records:"]
        for run in sorted(runs, key=lambda run: -run.table.certified_accuracy(radius)):
            samples = run.table.samples
            sampled = samples is None or bool(samples.any())
            name = title if len(runs) == 1 else f"{title} ({run.label})"
            cost = f", {samples.mean():,.0f} samples per image" if samples is not None and sampled else ""
            cost += f" of at most {run.sampling.n:,}, alpha {run.sampling.alpha:g}" if run.sampling else ""
            record = {
                "title": name,
                "link": "",
                "venue": "",
                "prob": sampled,
                "comment": f"{run.images} images{cost}",
            }
            percent = math.floor(1e4 * run.table.certified_accuracy(radius)) / 100  # never rounded up
            lines.append(f"  - score: {percent:.2f}%")
            lines += [f"    {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items()]
    return "\n".join(lines) + "\n"


def _setting(data: str, radius: float) -> str:
    """The heading of a table there, in MathJax."""
    return f"{data},&nbsp; \\(\\ell_2\\), &nbsp; \\(\\epsilon={radius:g}\\)"
