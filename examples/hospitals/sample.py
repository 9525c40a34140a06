"""Sample data: the breast cancer rows that come with scikit-learn, dealt to three sites."""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer

folder = Path(__file__).parent / "data"
folder.mkdir(exist_ok=True)
rows = load_breast_cancer()
a = (rows.data - rows.data.mean(0)) / rows.data.std(0)
order = np.random.default_rng(0).permutation(len(a))
for number, mine in enumerate(np.split(order, [120, 300])):
    np.savez(folder / f"site-{number + 1}.npz", a=a[mine], label=rows.target[mine])
    print(f"site-{number + 1}: {len(mine)} patients, {rows.target[mine].mean():.0%} benign")
