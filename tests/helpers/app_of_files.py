"""An app of several files: modules, data files, a package."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np

APP = """
    from __future__ import annotations

    import importlib
    import json
    import os
    from pathlib import Path
    from typing import TYPE_CHECKING

    import jax.numpy as jnp
    import numpy as np

    import fedbilevel as fb
    import helper
    from models import deep

    if TYPE_CHECKING:
        import not_there_at_all
    try:
        import not_installed_here
    except ImportError:
        not_installed_here = None
    computed = importlib.import_module("com" + "puted")

    HERE = Path(__file__).parent

    def inner(x, y, e):
        return 0.5 * jnp.sum((e["a"] - y) ** 2) + 0.5 * helper.PENALTY * jnp.sum(y**2) + jnp.sum(x * y)

    def outer(x, y, e):
        return 0.5 * jnp.sum((e["a"] - y) ** 2) + 0.5 * jnp.sum(x**2)

    def load(site):
        from loading import rows
        return rows(site)

    def start():
        scale = json.loads((HERE / "scale.json").read_text())["scale"]
        return scale * jnp.ones(2), deep.start(HERE / "weights" / "first.npy")

    app = fb.App(
        name="parts", problem=fb.Problem(inner, outer), algorithm=fb.Lockstep(inner_lr=0.1, hessian_lr=0.1, outer_lr=0.1),
        start=start, load=load, iterations=3, precision=64, files=["scale.json", "./weights/*.npy"],
    )
    EXTRA
"""
FILES = {
    "helper.py": "PENALTY = 0.1\n\n\ndef later():\n    import late\n    return late.VALUE\n",
    "late.py": "VALUE = 1\n",
    "computed.py": "VALUE = 5\n",
    "loading.py": "import numpy as np\nfrom site_driver import connect\n\n\ndef rows(site): ...\n",
    "models/__init__.py": "from . import shallow\n",
    "models/shallow.py": "from .parts.bits import BIT\n",
    "models/parts/__init__.py": "",
    "models/parts/bits.py": "BIT = 1\n",
    "models/deep.py": "import numpy as np\n\n\ndef start(path):\n    return np.load(path)\n",
    "models/unused.py": "1 / 0\n",
    "places/of_no_package.py": "",
    "scale.json": '{"scale": 1.0}',
    "weights/first.npy": None,
    "weights/second.npy": None,
    "site.csv": "1,2,3\n",
}
FILES["loading.py"] = """\
import numpy as np


def rows(site):
    import places.of_no_package

    each = {"a": np.full((3, 2), float(site[-1]))}
    return each, each


def driver():
    import driver_of_one_site
"""
SHIPPED = sorted({"app.py", *FILES} - {"models/unused.py", "site.csv"})


def write(folder: Path, extra: str = "", **changes: str) -> Path:
    """The app in a folder, files changed by their names with _ for / and ."""
    changed = {name: changes.get(name.replace("/", "_").replace(".", "_"), text) for name, text in FILES.items()}
    changed["app.py"] = textwrap.dedent(APP).replace("EXTRA", extra)
    for name, content in changed.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        np.save(place, np.ones(2)) if content is None else place.write_text(content)
    return folder / "app.py"
