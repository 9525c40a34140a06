"""Quadratics whose clients grow apart while their mean stays the same; in numpy, everything that algorithms do to them.

    g_i(x, y) = y'H_i y / 2 - y'(B_i x + b_i)        f_i(x, y) = (y - t_i)'A_i (y - t_i) / 2 + c |x|^2 / 2

H_i = R (I + s E_i) R with R the root of H and sum E_i = 0, and likewise for the others: at every heterogeneity s the means
H, B, b, A (and A t) are the same, and with them y*(x), Phi and its gradient. What then differs is due to s alone.
With H x-independent, y* = H^-1 (B x + b), v* = H^-1 A (y* - t), grad Phi = c x + B'v*.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fedbilevel import FederatedData, Problem

from ..kinds import Row

DX, DY = 4, 6
CURVATURE = 0.01  # c
KAPPA, KAPPA_UPPER = 13.0, 56.0  # condition numbers of H and of the Hessian of Phi, whose largest eigenvalues are 1
Loop = tuple[np.ndarray, np.ndarray]  # (P, the fixed point) of a lower loop
power = np.linalg.matrix_power


def inner_loss(x: Float[Array, " upper"], y: Float[Array, " lower"], row: Row) -> Float[Array, ""]:
    """g_i; a client has one row."""
    return 0.5 * y @ row["H"] @ y - y @ (row["B"] @ x + row["b"])


def outer_loss(x: Float[Array, " upper"], y: Float[Array, " lower"], row: Row) -> Float[Array, ""]:
    """f_i."""
    return 0.5 * (y - row["t"]) @ row["A"] @ (y - row["t"]) + 0.5 * CURVATURE * jnp.sum(x**2)


PROBLEM = Problem(inner_loss, outer_loss)


@dataclasses.dataclass(frozen=True)
class Family:
    """One instance. Attributes: the clients' H_i, B_i, b_i, A_i, t_i, each with the client first; a start (x, y)."""

    H: np.ndarray
    B: np.ndarray
    b: np.ndarray
    A: np.ndarray
    t: np.ndarray
    x: np.ndarray
    y: np.ndarray

    def data(self) -> FederatedData:
        """The clients for the library, a row each."""
        row = lambda names, i: {name: getattr(self, name)[i : i + 1] for name in names}
        clients = range(len(self.H))
        return FederatedData.stack([row("HBb", i) for i in clients], [row("At", i) for i in clients])

    @property
    def eigenvalues(self) -> np.ndarray:
        """Of the mean H, ascending."""
        return np.linalg.eigvalsh(self.H.mean(0))

    def outer_y(self, y: np.ndarray) -> np.ndarray:
        """d_y f_i, a row for each client."""
        return np.einsum("iab,ib->ia", self.A, y - self.t)

    def solution(self, x: np.ndarray) -> np.ndarray:
        """y*(x)."""
        return np.linalg.solve(self.H.mean(0), self.B.mean(0) @ x + self.b.mean(0))

    def adjoint(self, x: np.ndarray) -> np.ndarray:
        """v*(x)."""
        return np.linalg.solve(self.H.mean(0), self.outer_y(self.solution(x)).mean(0))

    def compose(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        """d_x f - J v."""
        return CURVATURE * x + self.B.mean(0).T @ v

    def hypergradient(self, x: np.ndarray) -> np.ndarray:
        """grad Phi(x)."""
        return self.compose(x, self.adjoint(x))

    def upper(self) -> tuple[np.ndarray, np.ndarray]:
        """(G, g) in grad Phi(x) = G x + g."""
        zero = self.hypergradient(np.zeros(DX))
        return np.stack([self.hypergradient(e) - zero for e in np.eye(DX)], axis=1), zero

    # The lower loops: y^{t+1} - fixed = P (y^t - fixed)

    def _local(self, lr: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """(I - lr H_i)^steps, and the sum of the lower powers times lr."""
        contracted = [np.eye(DY) - lr * H for H in self.H]
        sums = [lr * sum(power(M, s) for s in range(steps)) for M in contracted]
        return np.stack([power(M, steps) for M in contracted]), np.stack(sums)

    def corrected(self, x: np.ndarray, lr: float, steps: int) -> Loop:
        """(P, fixed point y*) of the anchored rounds of FedNest and AggITD."""
        return np.eye(DY) - self._local(lr, steps)[1].mean(0) @ self.H.mean(0), self.solution(x)

    def plain(self, x: np.ndarray, lr: float, steps: int) -> Loop:
        """(P, fixed point) of plain local steps; off y* as soon as steps > 1 and clients differ."""
        powers, sums = self._local(lr, steps)
        pull = np.einsum("iab,ib->a", sums, self.B @ x + self.b) / len(self.H)
        return powers.mean(0), np.linalg.solve(np.eye(DY) - powers.mean(0), pull)

    def path(self, loop: Loop, rounds: int) -> list[np.ndarray]:
        """[y^0, ..., y^rounds] of a lower loop (P, fixed) from the start."""
        P, fixed = loop
        path, error = [self.y], self.y - fixed
        for _ in range(rounds):
            error = P @ error
            path.append(fixed + error)
        return path


def family(spread: float, clients: int = 8, seed: int = 0) -> Family:
    """The instance of heterogeneity `spread` (0: all clients alike; up to 2)."""
    draw = np.random.default_rng(seed)
    rotation = lambda: np.linalg.qr(draw.normal(size=(DY, DY)))[0]
    U, V = rotation(), rotation()
    root = lambda basis, values: basis @ np.diag(np.sqrt(values)) @ basis.T
    R, S = root(U, np.geomspace(1 / KAPPA, 1, DY)), root(V, np.geomspace(0.5, 2, DY))
    # B = H W with W'AW = diag(e) - c I: the Hessian of Phi is then diag(e)
    upper = np.geomspace(1 / KAPPA_UPPER, 1, DX)
    W = np.linalg.solve(S, rotation()[:, :DX] @ np.diag(np.sqrt(upper - CURVATURE)))
    symmetric = _apart(draw, clients, (2, DY, DY))
    symmetric = symmetric + np.swapaxes(symmetric, -1, -2)
    symmetric *= 0.45 / np.abs(np.linalg.eigvalsh(symmetric)).max()  # s <= 2 keeps every client strongly convex
    eye, H = np.eye(DY), R @ R
    vary = lambda mean, size: mean + spread * size * _apart(draw, clients, mean.shape)
    A = S @ (eye + spread * symmetric[:, 1]) @ S
    wish = vary(S @ S @ draw.normal(size=DY), 0.5)  # A_i t_i
    return Family(
        H=R @ (eye + spread * symmetric[:, 0]) @ R, B=vary(H @ W, 0.2), b=vary(H @ draw.normal(size=DY), 0.2),
        A=A, t=np.linalg.solve(A, wish[..., None])[..., 0], x=draw.normal(size=DX), y=np.zeros(DY),
    )  # fmt: skip


def _apart(draw: np.random.Generator, clients: int, shape: tuple[int, ...]) -> np.ndarray:
    """(clients, *shape) normal numbers with mean zero over the clients."""
    numbers = draw.normal(size=(clients, *shape))
    return numbers - numbers.mean(0)
