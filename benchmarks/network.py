"""What the network engine adds to a bare round of nvflare's collab calls: python benchmarks/network.py [--sites 3] [--quick]

In nvflare's simulator, a process for the server and one for each site. A round sends some float32 numbers to every site and
gets as many back: ours through `fed.average`, the site's own process and its worker; the bare one as a numpy array through
`collab.clients().echo(array)`, and the same as bytes. Blocks of rounds take turns in one run; medians over all blocks. Wire
bytes are those of nvflare's messages, as rounds.csv has them, over the payload.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from nvflare.collab import CollabRecipe, collab

from fedbilevel.app import load_app
from fedbilevel.engines.nvflare.server import Server, federate
from fedbilevel.engines.nvflare.site import Site

SIZES, BLOCKS, ROUNDS = (1_000, 1_000_000), 3, 40
QUICK = (100,), 1, 5
APP = """
import jax.numpy as jnp, numpy as np, fedbilevel as fb

class Echo(fb.Algorithm):
    def step(self, fed, state):
        return fb.State(state.x, fed.average(self.echo, state.y)), {{}}

    def echo(self, client, y):
        return y

loss = lambda x, y, example: jnp.sum(y) * 0 + jnp.sum(x) * 0 + 0 * example
rows = np.zeros(1, np.float32)
app = fb.App(fb.Problem(loss, loss), Echo(), lambda: (jnp.zeros(1), jnp.ones({size})), lambda site: (rows, rows),
             iterations={rounds}, name="echo")
"""


class EchoSite(Site):
    """A site that also answers bare calls."""

    @collab.publish
    def echo(self, message):
        return message


class Both(Server):
    """Blocks of our rounds and of bare ones in turns."""

    @collab.main
    def run(self) -> None:
        app, out, bare = load_app(self.app), Path(self.out), {"array": [], "bytes": []}
        rounds, blocks = app.iterations, BLOCKS if app.iterations == ROUNDS else QUICK[1]
        y = np.ones(app.begin()[1].shape, np.float32)
        for block in range(blocks):
            (folder := out / str(block)).mkdir(parents=True)
            federate(app, folder, False)
            for kind, message in (("array", y), ("bytes", y.tobytes())):
                for _ in range(rounds):
                    begin = time.perf_counter()
                    list(collab.clients(timeout=60.0).echo(message))
                    bare[kind].append(time.perf_counter() - begin)
        (out / "bare.json").write_text(json.dumps(bare))


def job(folder: Path, size: int, sites: int, rounds: int) -> None:
    """In a process of its own: run the job in the simulator."""
    from nvflare.recipe import SimEnv

    file = folder / "app.py"
    file.write_text(APP.format(size=size, rounds=rounds))
    recipe = CollabRecipe(
        "network", Both(app=str(file), out=str(folder / "out")), EchoSite(app=str(file)), min_clients=sites
    )
    recipe.run(SimEnv(num_clients=sites, workspace_root=str(folder / "nvflare"), log_config="concise"))


def measure(size: int, sites: int, blocks: int, rounds: int) -> dict[str, float]:
    """Medians in milliseconds, and wire bytes over payload bytes."""
    import pandas

    with tempfile.TemporaryDirectory() as place:
        words = [sys.executable, __file__, "--job", place, "--size", str(size), "--sites", str(sites)]
        words += ["--rounds", str(rounds)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
        out = Path(place) / "out"
        if not (out / "bare.json").is_file():
            sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
        bare = json.loads((out / "bare.json").read_text())
        books = pandas.concat([pandas.read_csv(out / str(block) / "rounds.csv").iloc[3:] for block in range(blocks)])
        payload = books["bytes_down"].sum() + books["bytes_up"].sum()
        return {
            "ours": 1e3 * books["seconds"].median(),
            **{kind: 1e3 * statistics.median(times) for kind, times in bare.items()},
            "wire": (books["wire_down"].sum() + books["wire_up"].sum()) / payload,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="one size, few rounds: to see that it works")
    given = parser.parse_args()
    if given.job:
        sys.path.insert(0, str(Path(__file__).parent))
        import network

        return network.job(
            given.job, given.size, given.sites, given.rounds
        )  # by a name that nvflare's other processes can import
    sizes, blocks, rounds = QUICK if given.quick else (SIZES, BLOCKS, ROUNDS)
    print(f"{given.sites} sites, medians of {blocks * rounds} rounds")
    print("  floats   ours, ms   bare array, ms   bare bytes, ms   ours/array   ours/bytes   wire/payload")
    for size in sizes:
        m = measure(size, given.sites, blocks, rounds)
        print(f"{size:8,} {m['ours']:10.1f} {m['array']:16.1f} {m['bytes']:16.1f} {m['ours'] / m['array']:12.2f} "
              f"{m['ours'] / m['bytes']:12.2f} {m['wire']:14.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
