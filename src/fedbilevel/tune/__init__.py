"""Looking for what nobody knows beforehand: `fb.tune(...)` for x in one run, `fb.tune.search(...)` for step sizes."""

from .grid import Curve, points, sweep
from .search import Found, search
from .tuning import Tuned, tune

for _offered in (
    Curve,
    Found,
    Tuned,
    points,
    search,
    sweep,
):  # `fb.tune` is the function, and has what the package offers
    setattr(tune, _offered.__name__, _offered)
