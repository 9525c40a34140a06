"""What the pages of the algorithms share: a task with closed forms, how stationary x is at the end, and the rounds."""

import fedbilevel as fb

task = fb.tasks.quadratic(clients=5)  # clients differ; everything has a closed form
AT_START = float(task.metrics["stationarity"](task.x, task.y))  # |grad Phi|^2
assert 3 < AT_START < 4


def slope(algorithm, iterations=300):
    """|grad Phi|^2 at the end."""
    metrics = {"stationarity": task.metrics["stationarity"]}
    result = fb.solve(
        task.problem,
        task.data,
        algorithm,
        task.x,
        task.y,
        iterations,
        key=task.key,
        metrics=metrics,
        evaluate_every=iterations,
    )
    return result.history[-1]["stationarity"]


def rounds(algorithm):
    """Of one iteration."""
    return fb.protocol(algorithm, task.problem, task.data, task.x, task.y).rounds
