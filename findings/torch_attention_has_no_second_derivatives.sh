#!/usr/bin/env bash
# torch 2.13.0 (CPU). The second derivative of a transformer's layer in its weights: a product with the Hessian of a smooth
# loss of `nn.TransformerEncoderLayer` without dropout, in the modes train and eval.
#
# Expected: as for every other layer of softmaxes, products and norms: its first derivative can be differentiated again, by
#           double backward and by forward over reverse.
# Seen:     the first derivative is there; both ways to a second one raise, in both modes: attention takes a kernel by
#           itself whose backward has no derivative. Under `sdpa_kernel(SDPBackend.MATH)` both ways are there, and agree with
#           central differences of the first derivative.
#
# Why it matters here: hypergradients are made of such products. fedbilevel.torch takes the kernel "math" for second
# derivatives, so that a model with attention needs no care (tests/torch/test_look.py; the table on "My PyTorch model").
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy>=2"
"$folder/venv/bin/python" - <<'PYTHON'
import contextlib

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.manual_seed(0)
STEP = 1e-5


def seen(mode, kernel):
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0).double()
    layer = layer.train() if mode == "train" else layer.eval()
    inputs = torch.randn(3, 2, 4).double()
    names, y = zip(*((name, one.detach()) for name, one in layer.named_parameters()))
    v = [torch.randn_like(one) for one in y]
    value = lambda y: torch.sin(torch.func.functional_call(layer, dict(zip(names, y)), (inputs,))).sum()

    def slope(y, graph=False):
        y = [one if graph else one.detach().requires_grad_() for one in y]
        return torch.autograd.grad(value(y), y, create_graph=graph)

    def backward():
        at = [one.clone().requires_grad_() for one in y]
        return torch.autograd.grad(slope(at, graph=True), at, v)

    def forward():
        return torch.func.jvp(torch.func.grad(lambda y: value(y)), (y,), (tuple(v),))[1]

    with sdpa_kernel(SDPBackend.MATH) if kernel == "math" else contextlib.nullcontext():
        beside = [slope([a + sign * STEP * b for a, b in zip(y, v)]) for sign in (1, -1)]
        exact = [(a - b) / (2 * STEP) for a, b in zip(*beside)]
        words = []
        for way in (backward, forward):
            try:
                gap = max(float((a - b).abs().max()) for a, b in zip(way(), exact))
                words.append("right" if gap < 1e-5 else f"off by {gap:.1e}")
            except (RuntimeError, NotImplementedError) as error:
                words.append("none: " + str(error).splitlines()[0][:70])
    return words


print("torch", torch.__version__.partition("+")[0])
rows = {(mode, kernel): seen(mode, kernel) for mode in ("train", "eval") for kernel in ("as it is", "math")}
for (mode, kernel), (backward, forward) in rows.items():
    print(f"{mode:6} kernel {kernel:9} double backward: {backward:80} forward over reverse: {forward}")
for (mode, kernel), words in rows.items():
    assert all(one == "right" if kernel == "math" else one.startswith("none") for one in words), "this has changed"
PYTHON
