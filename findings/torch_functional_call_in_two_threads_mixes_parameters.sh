#!/usr/bin/env bash
# torch 2.13.0 (CPU). Two threads call one module by `torch.func.functional_call`, each with parameters of its own, at the
# same time. The module waits in its forward until both are there.
#
# Expected: a function of its arguments: each thread gets what its own parameters give, as `functional_call` takes a module
#           and a dictionary and returns a value.
# Seen:     both threads compute with the same parameters, those of the one that came second. The module holds the
#           parameters while it runs, and there is one module. Afterwards the dictionaries that were passed may hold other
#           tensors than before. With a module for each thread both are right.
#
# Why it matters here: a compiled program asks for several oracles at a time, from threads of its own, for one module and
# several clients' parameters. Five of 72 runs differed from JAX's by a percent, without a word. So all that torch computes
# is computed one call after the other (fedbilevel.beside; tests/torch/test_problem.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy>=2"
"$folder/venv/bin/python" - <<'PYTHON'
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

BOTH = threading.Barrier(2)


class Waiting(nn.Linear):
    def forward(self, inputs):
        BOTH.wait(timeout=30)
        return super().forward(inputs)


def seen(modules):
    """What each thread got."""
    given = [{"weight": torch.full((1, 1), value)} for value in (1.0, 2.0)]
    call = lambda module, own: torch.func.functional_call(module, own, (torch.ones(1, 1),)).item()
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(call, modules, given))


one = Waiting(1, 1, bias=False)
shared, apart = seen([one, one]), seen([Waiting(1, 1, bias=False), Waiting(1, 1, bias=False)])
print("torch", torch.__version__.partition("+")[0])
print("weights given            1.0 and 2.0, inputs 1")
print(f"one module               {shared[0]} and {shared[1]}")
print(f"a module for each thread {apart[0]} and {apart[1]}")
assert shared[0] == shared[1], "this has changed"
assert apart == [1.0, 2.0], "this has changed"
PYTHON
