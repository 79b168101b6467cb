"""The public package `chinchilla` on the same points, objective and a part of the grid.

    PYTHON -m bench.peers.chinchilla POINTS.csv STARTS.json

in an environment that has the package (bench/peers/requirements-chinchilla.txt). It fits by scipy's
BFGS with numeric gradients from every start, in one process per core, and prints one JSON object.
"""

import argparse
import json
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

DELTA = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers.chinchilla",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("points", type=Path, help="a .csv with C, N, D and loss")
    parser.add_argument("starts", type=Path, help="the values of every parameter's starts")
    options = parser.parse_args()
    # Here, because the project's environment, where this explains itself, has no such packages.
    import numpy as np
    import pandas as pd
    from chinchilla import Chinchilla
    from chinchilla._metrics import log_huber

    starts = json.loads(options.starts.read_text())
    with tempfile.TemporaryDirectory() as directory:
        pd.read_csv(options.points).to_csv(f"{directory}/df.csv", index=False)
        fitter = Chinchilla(
            directory,
            param_grid={name: np.array(values) for name, values in starts.items()},
            loss_fn=partial(log_huber, delta=DELTA),
            log_level=40,
        )
        started = time.perf_counter()
        fitter.fit(parallel=True)
        seconds = time.perf_counter() - started
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in used)
    names = ("E", "A", "alpha", "B", "beta")
    parameters = {name: float(getattr(fitter, name)) for name in names}
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "parameters": parameters}))


if __name__ == "__main__":
    main()
