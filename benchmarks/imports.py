"""What `import fedbilevel` costs, beside the libraries that it builds on: python benchmarks/imports.py [--quick]

Cpu time of processes of their own, in turns, medians of seven. "to use" asks for what a first run needs as well, by name.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

BASE = "import jax, equinox, optax, jaxtyping, numpy"
USE = "fb.Problem, fb.FederatedData, fb.AggITD, fb.Simulation, fb.solve"
WAYS = {
    "python alone": "pass",
    "import jax, equinox, ...": BASE,
    "import fedbilevel": "import fedbilevel",
    "both": f"{BASE}; import fedbilevel",
    "to use": f"{BASE}; import fedbilevel as fb; {USE}",
}
ALLOWED = 1.05


def seconds(code: str) -> float:
    """Cpu seconds of a process that runs it, the user's and the system's."""
    before = os.times()
    subprocess.run([sys.executable, "-c", code], check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="once: to see that it works")
    turns = 1 if parser.parse_args().quick else 7
    for code in WAYS.values():
        seconds(code)  # bytecode and files are at hand from here on
    found = [{name: seconds(code) for name, code in WAYS.items()} for _ in range(turns)]
    medians = {name: statistics.median(one[name] for one in found) for name in WAYS}
    base = medians["import jax, equinox, ..."]
    print(f"cpu time, medians of {turns} in turns; Python {sys.version.split()[0]}")
    print(f"{'':28} {'seconds':>8} {'ratio':>7}")
    for name, median in medians.items():
        print(f"{name:28} {median:8.3f} {median / base:7.3f}")
    print(f"allowed: {ALLOWED}")


if __name__ == "__main__":
    main()
