"""How well predicted losses agree with measured ones (arXiv 2504.07951, tables 10 and C)."""

import numpy as np


def agreement(predicted: np.ndarray, *, measured: np.ndarray) -> dict[str, float | None]:
    """`mse` (nats squared), `r2` and `mae_percent` (mean of |error| / measured, times 100).

    R2 compares with the mean of the measured losses and is None where these do not differ.
    """
    error = predicted - measured
    spread = np.square(measured - measured.mean()).sum()
    return {
        "mse": float(np.square(error).mean()),
        "r2": float(1 - np.square(error).sum() / spread) if spread > 0 else None,
        "mae_percent": float(100 * np.mean(np.abs(error) / measured)),
    }
