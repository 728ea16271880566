"""Which noise levels a formulation emphasizes, recorded at the start of a run."""

import json
from pathlib import Path

import torch

from mmdit.atomic import write_atomically
from mmdit.flow.objective import Objective
from mmdit.plots import plot
from mmdit.printable import logger

log = logger(__name__)


def report_formulation(objective: Objective, folder: Path, points: int = 400) -> None:
    """Write the density of training and the effective weight over log-SNR, and log a summary.

    `objective.json` has the density of the drawn times and w of Eq. 12, `objective.png` both over
    the log-SNR lambda, which all paths share, each relative to its maximum.

    Args:
        objective: the formulation.
        folder: where the files are written.
        points: number of times t, equally spaced in (0, 1).
    """
    t = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    log_snr, density = objective.path.log_snr(t), objective.density(t)
    drawn = density / objective.path.d_log_snr(t).abs()
    weight = objective.weight(t)
    rows = {
        "t": t,
        "sigma": objective.path.straight(t),
        "log_snr": log_snr,
        "density_t": density,
        "density_log_snr": drawn,
        "weight": weight,
    }
    content = {name: values.tolist() for name, values in rows.items()}
    write_atomically(folder / "objective.json", json.dumps(content, indent=1).encode())
    curves = {
        "density of lambda": (drawn / drawn.max()).tolist(),
        "weight w(lambda)": (weight / weight.max()).tolist(),
    }
    shown = {name: list(zip(log_snr.tolist(), y, strict=True)) for name, y in curves.items()}
    plot(shown, folder / "objective.png", x_label="lambda = log a^2/b^2", y_label="relative")
    cumulative = (density / density.sum()).cumsum(0)
    low, middle, high = (log_snr[(cumulative < part).sum()].item() for part in (0.1, 0.5, 0.9))
    log.info(
        "formulation: %s, %s, %s; log-SNR drawn: median %.2f, 80 %% from %.2f to %.2f; see %s",
        *(type(part).__name__ for part in (objective.path, objective.timesteps)),
        *(type(objective.prediction).__name__, middle, high, low, folder / "objective.png"),
    )
