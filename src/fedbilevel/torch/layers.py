"""Which of PyTorch's layers have second derivatives, and which way: python -m fedbilevel.torch.layers

Each layer, with its weights as y, in a small loss; H v by double backward and by forward over reverse, against central
differences of the gradient in 64 bits. "right" is within 1e-5 of it, "wrong" not, "none" raises; "symmetric" says of the
first way that is right whether u'H v is v'H u. A layer whose way depends on the precision is measured in the one that
it names. What is measured is PyTorch as it is; `fedbilevel.torch` takes attention's kernel "math" for second derivatives
by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

STEP, CLOSE = 1e-5, {torch.float64: 1e-5, torch.float32: 2e-2}

Value = Callable[[tuple[torch.Tensor, ...]], torch.Tensor]


class Layer(NamedTuple):
    """A layer in a loss of its weights.

    Attributes:
        name: as the table calls it.
        make: (dtype) -> (the loss, where it is looked at).
        kind: the precision in which it is measured.
    """

    name: str
    make: Callable[[torch.dtype], tuple[Value, tuple[torch.Tensor, ...]]]
    kind: torch.dtype = torch.float64


class Found(NamedTuple):
    """What was measured: of each way "right", "wrong", or "none"; and "yes", "no" or "" where there is none."""

    name: str
    backward: str
    forward: str
    symmetric: str


def measured(layer: Layer) -> Found:
    """Both ways, of a layer."""
    torch.manual_seed(0)
    value, y = layer.make(layer.kind)
    y = tuple(leaf.detach() for leaf in y)
    v = tuple(torch.randn_like(leaf) for leaf in y)
    try:
        exact = _difference(value, y, v, layer.kind)
    except RuntimeError:  # not even a first one
        return Found(layer.name, "none", "none", "")
    found, symmetric = [], ""
    u = tuple(torch.randn_like(leaf) for leaf in y)
    for way in (_backward, _forward):
        try:
            product = way(value, y, v)
        except (RuntimeError, NotImplementedError):
            found.append("none")
            continue
        one, other = _dot(u, product), _dot(v, way(value, y, u))  # u'H v and v'H u
        even = abs(one - other) <= CLOSE[layer.kind] * (abs(one) + abs(other))
        size = max(1e-12, max(float(part.abs().max()) for part in exact))
        gap = max(float((a - b).abs().max()) for a, b in zip(product, exact, strict=True)) / size
        found.append("right" if gap <= CLOSE[layer.kind] else "wrong")
        if symmetric == "" and found[-1] == "right":
            symmetric = "yes" if even else "no"
    return Found(layer.name, found[0], found[1], symmetric)


def _dot(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> float:
    return sum(float(torch.sum(a * b)) for a, b in zip(one, other, strict=True))


def _slope(value: Value, y: tuple[torch.Tensor, ...], graph: bool = False) -> tuple[torch.Tensor, ...]:
    y = y if graph else tuple(leaf.detach().requires_grad_() for leaf in y)
    return torch.autograd.grad(value(y), y, create_graph=graph)


def _backward(value: Value, y: tuple[torch.Tensor, ...], v: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    y = tuple(leaf.detach().requires_grad_() for leaf in y)
    found = torch.autograd.grad(_slope(value, y, graph=True), y, v, allow_unused=True)
    return tuple(torch.zeros_like(leaf) if one is None else one for leaf, one in zip(y, found, strict=True))


def _forward(value: Value, y: tuple[torch.Tensor, ...], v: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return torch.func.jvp(torch.func.grad(value), (y,), (v,))[1]


def _difference(
    value: Value, y: tuple[torch.Tensor, ...], v: tuple[torch.Tensor, ...], kind: torch.dtype
) -> tuple[torch.Tensor, ...]:
    step = STEP if kind is torch.float64 else 1e-2
    beside = lambda sign: _slope(value, tuple(leaf + sign * step * along for leaf, along in zip(y, v, strict=True)))
    return tuple((a - b) / (2 * step) for a, b in zip(beside(1), beside(-1), strict=True))


# The layers ---------------------------------------------------------------------------------------------------------------


def _module(
    make: Callable[[], nn.Module],
    *shape: int,
    indices: torch.Tensor | None = None,
    first: bool = False,
    times: int = 1,
    pooled: bool = False,
) -> Callable[..., Any]:
    """A module on random inputs of a shape (or on indices, or given its inputs `times`), its parameters the y.

    `first`: of what it gives only the first part counts; `pooled`: its sum over the second axis.
    """

    def made(kind: torch.dtype) -> tuple[Value, tuple[torch.Tensor, ...]]:
        module, inputs = make().to(kind), torch.randn(*shape, dtype=kind) if indices is None else indices
        names, y = zip(*module.named_parameters(), strict=True)

        def value(y: tuple[torch.Tensor, ...]) -> torch.Tensor:
            given = dict(zip(names, y, strict=True))
            out = torch.func.functional_call(module, given, (inputs,) * times)
            out = out[0] if first else out.sum(1) if pooled else out
            return torch.sin(out).sum()

        return value, y

    return made


def _behind(function: Callable[[torch.Tensor], torch.Tensor], features: int = 5) -> Callable[..., Any]:
    """A function of what a linear layer gives for four rows."""

    def made(kind: torch.dtype) -> tuple[Value, tuple[torch.Tensor, ...]]:
        rows, weight = torch.randn(4, 3, dtype=kind), torch.randn(features, 3, dtype=kind)
        return (lambda y: torch.sin(function(F.linear(rows, y[0]))).sum()), (weight,)

    return made


def _of_y(function: Callable[[torch.Tensor], torch.Tensor], *shape: int, zero: bool = False) -> Callable[..., Any]:
    """A function of y itself."""

    def made(kind: torch.dtype) -> tuple[Value, tuple[torch.Tensor, ...]]:
        start = torch.zeros(*shape, dtype=kind) if zero else torch.randn(*shape, dtype=kind)
        return (lambda y: function(y[0])), (start,)

    return made


def _attention(kernel: str = "") -> Callable[..., Any]:
    def made(kind: torch.dtype) -> tuple[Value, tuple[torch.Tensor, ...]]:
        start = tuple(torch.randn(1, 2, 4, 8, dtype=kind) for _ in range(3))

        def value(y: tuple[torch.Tensor, ...]) -> torch.Tensor:
            with sdpa_kernel(getattr(SDPBackend, kernel)) if kernel else contextlib.nullcontext():
                return torch.sin(F.scaled_dot_product_attention(y[0], y[1], y[2])).sum()

        return value, start

    return made


def _labels(loss: Callable[..., torch.Tensor], classes: int = 5) -> Callable[..., Any]:
    return _behind(lambda z: loss(z, torch.tensor([0, 3, 1, 4])), classes)


def _like(z: torch.Tensor, value: float = 0.0) -> torch.Tensor:
    return torch.full_like(z, value)


def _interpolated(y: torch.Tensor) -> torch.Tensor:
    return torch.sin(F.interpolate(y**2, scale_factor=2.0, mode="bilinear")).sum()


def _solved(y: torch.Tensor) -> torch.Tensor:
    one = torch.eye(3, dtype=y.dtype)
    root = torch.linalg.cholesky(y @ y.T + one)
    return (root + torch.linalg.inv(root) + torch.linalg.solve(root, one)).pow(2).sum()


def _spectra(y: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(y).sum() + torch.linalg.eigh(y + y.T)[0].pow(2).sum()


def _checkpointed(z: torch.Tensor, again: bool) -> torch.Tensor:
    return checkpoint(lambda z: torch.tanh(z) ** 2, z, use_reentrant=again)


_SEQUENCES = torch.tensor([[1, 2]]), torch.tensor([4]), torch.tensor([2])  # targets, and both lengths
_indices = torch.tensor([[0, 1, 2], [2, 3, 0]])
LAYERS = (
    Layer("Linear", _module(lambda: nn.Linear(3, 4), 5, 3)),
    Layer("Conv2d", _module(lambda: nn.Conv2d(2, 3, 3), 2, 2, 5, 5)),
    Layer("ConvTranspose2d", _module(lambda: nn.ConvTranspose2d(2, 3, 3), 2, 2, 4, 4)),
    Layer("MaxPool2d", _module(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2)), 2, 1, 6, 6)),
    Layer("AdaptiveAvgPool2d", _module(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(2)), 2, 1, 7, 7)),
    Layer("BatchNorm2d, eval()", _module(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval(), 2, 1, 5, 5)),
    Layer("GroupNorm", _module(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4)), 2, 1, 5, 5)),
    Layer("LayerNorm", _module(lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), 5, 3)),
    Layer("RMSNorm", _module(lambda: nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4)), 5, 3)),
    Layer("InstanceNorm2d", _module(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2)), 2, 1, 5, 5)),
    Layer("GELU, SiLU, Softplus, Mish", _behind(lambda z: F.gelu(z) + F.silu(z) + F.softplus(z) + F.mish(z))),
    Layer("ReLU, LeakyReLU, ELU, Hardswish", _behind(lambda z: F.relu(z) + F.leaky_relu(z) + F.elu(z) + F.hardswish(z))),
    Layer("softmax, log_softmax, logsumexp", _behind(lambda z: z.softmax(1) * z.log_softmax(1) + z.logsumexp(1)[:, None])),
    Layer("Embedding", _module(lambda: nn.Embedding(4, 3), indices=_indices, pooled=True)),
    Layer("Embedding(padding_idx=)", _module(lambda: nn.Embedding(4, 3, padding_idx=0), indices=_indices, pooled=True)),
    Layer("EmbeddingBag", _module(lambda: nn.EmbeddingBag(4, 3), indices=_indices)),
    Layer("LSTM, 64 bits", _module(lambda: nn.LSTM(3, 4, batch_first=True), 2, 4, 3, first=True)),
    Layer("LSTM, 32 bits", _module(lambda: nn.LSTM(3, 4, batch_first=True), 2, 4, 3, first=True), torch.float32),
    Layer("GRU, 64 bits", _module(lambda: nn.GRU(3, 4, batch_first=True), 2, 4, 3, first=True)),
    Layer("GRU, 32 bits", _module(lambda: nn.GRU(3, 4, batch_first=True), 2, 4, 3, first=True), torch.float32),
    Layer("RNN", _module(lambda: nn.RNN(3, 4, batch_first=True), 2, 4, 3, first=True)),
    Layer("MultiheadAttention", _module(lambda: nn.MultiheadAttention(4, 2), 3, 2, 4, first=True, times=3)),
    Layer("TransformerEncoderLayer, train()", _module(lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), 3, 2, 4)),
    Layer("TransformerEncoderLayer, eval()", _module(lambda: nn.TransformerEncoderLayer(4, 2, 8).eval(), 3, 2, 4)),
    Layer("scaled_dot_product_attention", _attention()),
    Layer("scaled_dot_product_attention, math", _attention(kernel="MATH")),
    Layer("scaled_dot_product_attention, flash", _attention(kernel="FLASH_ATTENTION")),
    Layer("cross_entropy", _labels(F.cross_entropy)),
    Layer("cross_entropy(label_smoothing=)", _labels(lambda z, label: F.cross_entropy(z, label, label_smoothing=0.1))),
    Layer("multi_margin_loss", _labels(F.multi_margin_loss)),
    Layer("binary_cross_entropy_with_logits", _behind(lambda z: F.binary_cross_entropy_with_logits(z, _like(z, 0.3)))),
    Layer("mse_loss", _behind(lambda z: F.mse_loss(z, _like(z)))),
    Layer("l1_loss", _behind(lambda z: F.l1_loss(z**2, _like(z)))),
    Layer("huber_loss", _behind(lambda z: F.huber_loss(z, _like(z)))),
    Layer("smooth_l1_loss", _behind(lambda z: F.smooth_l1_loss(z, _like(z)))),
    Layer("kl_div", _behind(lambda z: F.kl_div(z.log_softmax(1), _like(z, 0.2), reduction="batchmean"))),
    Layer("gaussian_nll_loss", _behind(lambda z: F.gaussian_nll_loss(z, _like(z), z.exp()))),
    Layer("ctc_loss", _behind(lambda z: F.ctc_loss(z.log_softmax(1)[:, None], *_SEQUENCES))),
    Layer("cosine_similarity, normalize", _behind(lambda z: F.cosine_similarity(z[:2], z[2:]) + F.normalize(z)[:2, 0])),
    Layer("cdist, up to 25 rows", _behind(lambda z: torch.cdist(z, torch.ones(3, 5, dtype=z.dtype)))),
    Layer("cdist, more rows", _behind(lambda z: torch.cdist(z.repeat(8, 1), torch.ones(30, 5, dtype=z.dtype)))),
    Layer("grid_sample", _of_y(lambda y: torch.sin(F.grid_sample(y, torch.tanh(y.permute(0, 2, 3, 1)))).sum(), 1, 2, 4, 4)),
    Layer("interpolate(mode='bilinear')", _of_y(_interpolated, 1, 1, 3, 3)),
    Layer("cumsum, cumprod", _behind(lambda z: z.cumsum(1) + z.cumprod(1))),
    Layer("sort, topk, max", _behind(lambda z: z.sort(1)[0][:, :2] * z.topk(2)[0] + z.max(1)[0][:, None])),
    Layer("linalg.solve, inv, cholesky", _of_y(_solved, 3, 3)),
    Layer("linalg.svd (values), eigh", _of_y(_spectra, 3, 3)),
    Layer("fft", _behind(lambda z: torch.fft.rfft(z).abs())),
    Layer("y.norm() ** 2 at zero", _of_y(lambda y: y.norm() ** 2, 4, zero=True)),
    Layer("(y ** 2).sum() at zero", _of_y(lambda y: (y**2).sum(), 4, zero=True)),
    Layer("checkpoint(use_reentrant=True)", _behind(lambda z: _checkpointed(z, True))),
    Layer("checkpoint(use_reentrant=False)", _behind(lambda z: _checkpointed(z, False))),
)  # fmt: skip


def table(layers: tuple[Layer, ...] = LAYERS) -> Iterator[str]:
    """The lines of the table, in Markdown."""
    yield f"| layer (torch {torch.__version__.partition('+')[0]}) | double backward | forward over reverse | symmetric |"
    yield "|---|---|---|---|"
    for layer in layers:
        yield "| " + " | ".join(measured(layer)) + " |"


if __name__ == "__main__":
    print("\n".join(table()))
