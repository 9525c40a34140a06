"""Files like those of the heart-disease data, with made-up patients."""

from __future__ import annotations

from pathlib import Path

import numpy as np

ROWS = {"cleveland": 24, "hungarian": 20, "switzerland": 16, "va": 12}


def write(folder: Path, rows: dict[str, int] = ROWS, stem: str = "processed.") -> Path:
    """Put the four files into `folder`, and return it.

    Ages and heart rates tell who is ill. Switzerland writes 0 for cholesterol, which it never measured,
    Hungary does not know `ca`, and one in ten of the other numbers is missing.
    """
    draw = np.random.default_rng(4)
    for hospital, count in rows.items():
        ill = np.arange(count) % 3 > 0
        age, rate = 50 + 6 * draw.normal(size=count) + 5 * ill, 150 + 9 * draw.normal(size=count) - 12 * ill
        codes = {name: draw.integers(low, high, count) for name, (low, high) in CODES.items()}
        columns = [age.round(), codes["sex"], codes["cp"], 130 + 10 * draw.normal(size=count).round()]
        columns += [np.zeros(count) if hospital == "switzerland" else 240 + 40 * draw.normal(size=count).round()]
        columns += [codes["fbs"], codes["restecg"], rate.round(), codes["exang"], draw.integers(0, 30, count) / 10]
        columns += [codes["slope"], codes["ca"], draw.choice([3, 6, 7], count), ill * draw.integers(1, 5, count)]
        missing = draw.random((count, 14)) < 0.1
        missing[:, 11] |= hospital == "hungarian"
        missing[:, [0, 1, 13]] = False
        words = np.where(missing, "?", np.stack(columns, 1).astype(str))
        (folder / f"{stem}{hospital}.data").write_text("\n".join(",".join(line) for line in words) + "\n")
    return folder


CODES = {"sex": (0, 2), "cp": (1, 5), "fbs": (0, 2), "restecg": (0, 3), "exang": (0, 2), "slope": (1, 4), "ca": (0, 4)}
