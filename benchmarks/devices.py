"""Section e of benchmarks/certify.py: the same samples on 1 and on 8 simulated CPU devices, which take turns.

As a script it is one of the two processes: it reads a number of blocks per line and answers with counts and seconds.
"""

import json
import os
import subprocess
import sys
import time

from lsrs_jax.runtime.errors import UserError

SIMULATED = (1, 8)


def compare(tile, seconds, rounds):
    """Rounds of the same samples on each of SIMULATED devices, after compilation.

    Returns:
      ``(samples, equal, ratios)``: samples of a round, whether all counts agree, and seconds over those of the first.
    """
    workers = {count: _start(count, tile) for count in SIMULATED}
    try:
        asked = 8
        for count, worker in workers.items():
            if (found := _ask(worker, asked)["devices"]) != count:  # compiles
                raise UserError(f"JAX simulates {found} devices instead of {count}")
        while (took := _ask(workers[1], asked)["seconds"]) < seconds / 4:
            asked = int(asked * min(16, seconds / max(took, 1e-6))) + 1
        found = [{count: _ask(worker, asked) for count, worker in workers.items()} for _ in range(rounds)]
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    first = found[0][1]["counts"]
    equal = all(answer["counts"] == first for answers in found for answer in answers.values())
    ratios = {
        count: sorted(answers[count]["seconds"] / answers[1]["seconds"] for answers in found) for count in SIMULATED
    }
    return asked * tile[0] * tile[1], equal, ratios


def _start(count, tile):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}
    command = [sys.executable, __file__, *map(str, tile)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _ask(worker, blocks):
    worker.stdin.write(f"{blocks}\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise UserError("a process with simulated devices ended early; its message is above")
    return json.loads(line)


def main():
    import jax
    import numpy as np

    from lsrs_jax.models.heads import HEADS
    from lsrs_jax.runtime.rng import domain_key
    from lsrs_jax.smoothing.sampler import Sampler

    tile, shape = (int(sys.argv[1]), int(sys.argv[2])), (8, 8, 48)
    module = HEADS["convnet_light"](10)
    latents = np.asarray(jax.random.normal(domain_key(0, "probe"), (tile[0], *shape)))
    params = module.init(domain_key(0, "init"), latents[:1])
    loop = Sampler(lambda z: module.apply(params, z), shape, sigma=0.25, tile=tile)
    key = loop.keys(domain_key(0, "probe"))["estimation"]
    on_device = loop.put(loop.quantize(latents))
    for line in sys.stdin:
        blocks, start = int(line), time.perf_counter()
        counts = loop.collect(loop.launch(on_device, key, 0, blocks, blocks * tile[1]), tile[0])
        answer = {"seconds": time.perf_counter() - start, "counts": counts.tolist()}
        print(json.dumps(answer | {"devices": jax.local_device_count()}), flush=True)


if __name__ == "__main__":
    main()
