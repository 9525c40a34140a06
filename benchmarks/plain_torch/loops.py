"""Lockstep and AggITD as plain PyTorch loops, written as well as we can: clients one by one, and a cohort at once."""

from __future__ import annotations

from collections.abc import Callable

from .problem import BATCH, CLIENTS, COHORT, LAM, LR, OUTER_LR, ROWS, STEPS, TURNS, problem


def plain(model: str, algorithm: str, kind: str) -> Callable[[int], None]:
    import torch

    inner, outer, x, y, levels = problem(model)
    rows = [[tuple(map(torch.from_numpy, one)) for one in level] for level in levels]
    weights = torch.full((BATCH,), 1 / BATCH)
    oracles = (OneByOne if kind == "one by one" else Together)(inner, outer, weights)
    draw = torch.Generator().manual_seed(0)
    make = {"lockstep": Lockstep, "aggitd": AggITD}[algorithm]
    server = make(oracles, x, y)

    def turn(_: int) -> None:
        with torch.no_grad():
            server.turn(lambda cohort, level: oracles.batch(rows[level], cohort, draw), draw)

    return turn


class OneByOne:
    """Oracles of one client at a time; a cohort is a list."""

    def __init__(self, inner, outer, weights):
        self.inner, self.outer, self.weights = inner, outer, weights

    def each(self, method, cohort, *args):
        """The replies of a cohort, each by itself."""
        return mean([method([client], *args) for client in cohort])

    def batch(self, rows, cohort, draw):
        import torch

        place = torch.randint(ROWS, (BATCH,), generator=draw)
        return tuple(leaf[place] for leaf in rows[cohort[0]])

    def gradient(self, loss, x, y, batch, wrt, graph=False):
        import torch

        with torch.enable_grad():
            x, y = (
                {n: leaf.detach().requires_grad_(name in wrt) for n, leaf in tree.items()}
                for name, tree in (("x", x), ("y", y))
            )
            of = [*(x.values() if "x" in wrt else ()), *(y.values() if "y" in wrt else ())]
            found = torch.autograd.grad(loss(x, y, batch, self.weights), of, allow_unused=True)
        found = [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(of, found, strict=True)]
        split = len(x) if "x" in wrt else 0
        return dict(zip(x, found[:split], strict=False)), dict(zip(y, found[split:], strict=False))

    def inner_gradient(self, x, y, batch):
        return self.gradient(self.inner, x, y, batch, "y")[1]

    def outer_gradients(self, x, y, batch):
        return self.gradient(self.outer, x, y, batch, "xy")

    def product(self, x, y, v, batch, of):
        import torch

        with torch.enable_grad():
            x = {n: leaf.detach().requires_grad_(of == "x") for n, leaf in x.items()}
            y = {n: leaf.detach().requires_grad_() for n, leaf in y.items()}
            slopes = torch.autograd.grad(self.inner(x, y, batch, self.weights), list(y.values()), create_graph=True)
            wrt = x if of == "x" else y
            found = torch.autograd.grad(slopes, list(wrt.values()), [v[n] for n in y], allow_unused=True)
        return {
            n: torch.zeros_like(leaf) if one is None else one for (n, leaf), one in zip(wrt.items(), found, strict=True)
        }


class Together(OneByOne):
    """Oracles of a cohort at once, by `torch.vmap`; every leaf has an axis of clients first."""

    def each(self, method, cohort, *args):

        wide = lambda tree: {n: leaf.expand(COHORT, *leaf.shape) for n, leaf in tree.items()}
        out = method(cohort, *map(wide, args))
        narrow = lambda tree: {n: leaf.mean(0) for n, leaf in tree.items()}
        return tuple(map(narrow, out)) if isinstance(out, tuple) else narrow(out)

    def batch(self, rows, cohort, draw):
        import torch

        places = [torch.randint(ROWS, (BATCH,), generator=draw) for _ in cohort]
        picked = [tuple(leaf[place] for leaf in rows[client]) for client, place in zip(cohort, places, strict=True)]
        return tuple(torch.stack(leaves) for leaves in zip(*picked, strict=True))

    def inner_gradient(self, x, y, batch):
        import torch

        return torch.vmap(torch.func.grad(lambda y, x, b: self.inner(x, y, b, self.weights)))(y, x, batch)

    def outer_gradients(self, x, y, batch):
        import torch

        return torch.vmap(torch.func.grad(lambda x, y, b: self.outer(x, y, b, self.weights), argnums=(0, 1)))(
            x, y, batch
        )

    def product(self, x, y, v, batch, of):
        import torch
        from torch.func import grad

        def along(x, y, v, b):
            slopes = grad(lambda y: self.inner(x, y, b, self.weights))(y)
            return sum((slopes[n] * v[n]).sum() for n in slopes)

        return torch.vmap(grad(along, argnums=0 if of == "x" else 1))(x, y, v, batch)


def step(tree, lr, *directions):
    return {n: leaf - lr * sum(d[n] for d in directions) for n, leaf in tree.items()}


def minus(a, b):
    return {n: leaf - b[n] for n, leaf in a.items()}


def mean(replies):
    if isinstance(replies[0], tuple):
        return tuple(mean([reply[k] for reply in replies]) for k in range(len(replies[0])))
    return {n: sum(reply[n] for reply in replies) / len(replies) for n in replies[0]}


class Lockstep:
    """One round: five steps on y, one on x and one on v, each with its control variate."""

    def __init__(self, oracles, x, y):
        import torch

        zeros = lambda tree: {n: torch.zeros_like(leaf) for n, leaf in tree.items()}
        self.o, self.x, self.y, self.v = oracles, x, y, zeros(y)
        self.c = [zeros(x), zeros(y), zeros(y)]
        self.kept = [[zeros(x), zeros(y), zeros(y)] for _ in range(CLIENTS)]

    def turn(self, batch, draw):
        import torch

        cohort = torch.randperm(CLIENTS, generator=draw)[:COHORT].tolist()

        def moves(clients, x, y, v, cx, cy, cv):
            o = self.o
            if isinstance(o, Together):
                kept = [{n: torch.stack([self.kept[i][k][n] for i in clients]) for n in self.c[k]} for k in range(3)]
            else:
                kept = self.kept[clients[0]]
            inner, outer = (lambda: batch(clients, 0)), (lambda: batch(clients, 1))
            pull = o.outer_gradients(x, y, outer())[1]
            adjoint = minus(o.product(x, y, v, inner(), "y"), pull)
            direct = o.outer_gradients(x, y, outer())[0]
            along_x, along_y = minus(direct, o.product(x, y, v, inner(), "x")), o.inner_gradient(x, y, inner())
            fix = [minus(c, k) for c, k in zip((cx, cy, cv), kept, strict=True)]
            z = step(y, LR, along_y, fix[1])
            for _ in range(STEPS - 1):
                z = step(z, LR, o.inner_gradient(x, z, inner()), fix[1])
            ends = step(x, OUTER_LR, along_x, fix[0]), z, step(v, LAM, adjoint, fix[2])
            a = [along_x, along_y, adjoint]
            if isinstance(o, Together):
                for place, i in enumerate(clients):
                    self.kept[i] = [{n: leaf[place] for n, leaf in tree.items()} for tree in a]
            else:
                self.kept[clients[0]] = a
            moved = [minus(end, start) for end, start in zip(ends, (x, y, v), strict=True)]
            return (*moved, *(minus(one, k) for one, k in zip(a, kept, strict=True)))

        *moved, dx, dy, dv = self.o.each(moves, cohort, self.x, self.y, self.v, *self.c)
        self.x, self.y, self.v = (step(z, -1, m) for z, m in zip((self.x, self.y, self.v), moved, strict=True))
        self.c = [step(c, -COHORT / CLIENTS, d) for c, d in zip(self.c, (dx, dy, dv), strict=True)]


class AggITD:
    """N turns of two rounds (a gradient with a term of the series; FedSVRG steps), the vector, its hypergradient, a step."""

    def __init__(self, oracles, x, y):
        self.o, self.x, self.y = oracles, x, y

    def turn(self, batch, draw):
        import torch

        o, r = self.o, None
        cohort = lambda: torch.randperm(CLIENTS, generator=draw)[:COHORT].tolist()

        def vector(clients, x, y, *r):
            pull = o.outer_gradients(x, y, batch(clients, 1))[1]
            if not r:
                return pull
            product = o.product(x, y, r[0], batch(clients, 0), "y")
            return step(r[0], -1, minus(pull, {n: LAM * leaf for n, leaf in product.items()}))

        def anchor(clients, x, y, *r):
            return o.inner_gradient(x, y, batch(clients, 0)), vector(clients, x, y, *r)

        def lower(clients, x, y, q):
            z = step(y, LR, q)
            for _ in range(STEPS - 1):
                rows = batch(clients, 0)
                z = step(z, LR, minus(o.inner_gradient(x, z, rows), o.inner_gradient(x, y, rows)), q)
            return z

        for _ in range(TURNS):
            q, r = o.each(anchor, cohort(), self.x, self.y, *([] if r is None else [r]))
            self.y = o.each(lower, cohort(), self.x, self.y, q)
        r = o.each(vector, cohort(), self.x, self.y, r)
        v = {n: LAM * leaf for n, leaf in r.items()}

        def upper(clients, x, y, v):
            direct = o.outer_gradients(x, y, batch(clients, 1))[0]
            return minus(direct, o.product(x, y, v, batch(clients, 0), "x"))

        h = o.each(upper, cohort(), self.x, self.y, v)
        self.x = o.each(lambda clients, x, h: step(x, OUTER_LR, h), cohort(), self.x, h)
