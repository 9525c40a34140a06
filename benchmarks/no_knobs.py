"""No step given, against the best of a grid of step sizes: rounds to arrive, gain, bytes, blow-ups.

    python benchmarks/no_knobs.py [--task NAME ...] [--algorithm NAME ...] [--seeds 10 ...] [--adam] [--folder DIR] [--quick]

Eight tasks: quadratic, ridge, scaled, bank, regularisation, cleaning, loss-tuning (everyone, all rows), and
hyper-representation (cohort 5 of 20, minibatches of 32). Lockstep and SimFBO with 300 rounds, AggITD and FedNest (N = 5, all
terms) with 1,300; 5 local steps; 64 bits. Phi(x) = f(x, y*(x)) at every fifth round (every iteration, where that is more);
for the two networks f after 100 rounds of `fb.train` of y at x (`knobs/quality.py`).

The grid (`knobs/grids.py`) knows the largest curvature L of the clients and five powers of ten for outer_lr, from a coarse
search. Its best point has the lowest median of Phi at the end; "fastest" is the point that arrives first among those that
end within a hundredth of the gain of it. G is what the best point gains over the start with y trained. It arrives at the
first look at or below the best end + .1 G whose next three stay below it + .15 G, the end and G of its own seed. "Gain" is
that of the returned x, in G. All numbers are medians over seeds, ratios those of medians. Later seeds of the last four
tasks leave out points that gain less than nine tenths of the best one on the first seed.

What the grid computes is kept in --folder, and a second call goes on from there; the runs without steps are made anew.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from knobs.contender import Outcome, contend
from knobs.figure import draw
from knobs.grids import Grid, Point, arrival
from knobs.problems import CASES, CONTESTANTS

SEEDS = (10, 11, 12, 13, 14)
HEAD = (
    f"{'task':21} {'algorithm':9} {'outer':5} {'best point':>13} {'arrives':>7} {'fastest':>13} {'arrives':>7} "
    f"{'blown up':>8} | {'no step':>7} {'ratio':>6} {'least':>6} {'gain':>6} {'lowest':>6} {'bytes':>5}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--algorithm", nargs="+", choices=CONTESTANTS, default=["lockstep"])
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument(
        "--adam", action="store_true", help="also the grid with optax.adam, where there is such an option"
    )
    parser.add_argument("--folder", type=Path, default=Path("results/no_knobs"))
    parser.add_argument(
        "--quick", action="store_true", help="the quadratic, one seed, nothing kept: to see that it works"
    )
    given = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    if not given.quick:
        return compare(given.task, given.algorithm, tuple(given.seeds), given.adam, given.folder)
    with tempfile.TemporaryDirectory() as folder:
        compare(["quadratic"], ["simfbo"], (10,), False, Path(folder))


def compare(tasks: list[str], algorithms: list[str], seeds: tuple[int, ...], adam: bool, folder: Path) -> None:
    print(f"seeds {', '.join(map(str, seeds))}; a point: inner_lr L, hessian_lr L, outer_lr\n{HEAD}", flush=True)
    begin, curves = time.perf_counter(), {}
    for name in algorithms:
        contestant = CONTESTANTS[name]
        for task in tasks:
            case = CASES[task]
            found = None
            for optimizer in (False, True) if adam and contestant.has_optimizer else (False,):
                grid = Grid(case, contestant, optimizer, seeds, folder)
                grid.run()
                found = found or [contend(case, contestant, seed) for seed in seeds]
                print(line(grid, found), flush=True)
                for seed, each in zip(seeds, found, strict=True):
                    if each.words:
                        print(f"    seed {seed}: {each.words}", flush=True)
                if not optimizer:
                    curves[task, name] = grid, found
    figure = draw(curves, folder / "no_knobs.png")
    print(f"{time.perf_counter() - begin:.1f} seconds in all; {figure}")


def line(grid: Grid, found: list[Outcome]) -> str:
    """A line of the table."""
    best, fastest, seeds = grid.best(), grid.fastest(), grid.seeds
    middle = lambda values: float(np.median(list(values)))
    at = lambda curve, seed: arrival(curve, grid.goal(seed), grid.gain(seed))
    of = lambda point: middle(at(grid.curves(seed, [point])[point], seed) for seed in seeds)
    start = {seed: float(grid.curves(seed, [best])[best].values[0]) for seed in seeds}
    ours = middle(at(each.curve, seed) for seed, each in zip(seeds, found, strict=True))
    gains = [(start[seed] - each.end) / grid.gain(seed) for seed, each in zip(seeds, found, strict=True)]
    blown, points = grid.blown_up()
    return (
        f"{grid.case.name:21} {grid.contestant.name:9} {'adam' if grid.adam else 'plain':5} "
        f"{_point(best):>13} {of(best):7.0f} {_point(fastest):>13} {of(fastest):7.0f} {f'{blown}/{points}':>8} | "
        f"{ours:7.0f} {ours / of(best):6.2f} {ours / of(fastest):6.2f} {middle(gains):6.2f} {min(gains):6.2f} "
        f"{middle(each.bytes for each in found):5.2f}"
    )


def _point(point: Point) -> str:
    return f"{point[0]:g} {point[1]:g} 1e{point[2]}"


if __name__ == "__main__":
    main()
