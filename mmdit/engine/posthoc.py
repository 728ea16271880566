"""Averages of any memory, made after training (EDM2: Karras et al. 2024, Sec. 3.2 and Algorithm 3).

Training keeps averages of a few power-function profiles and, now and then, a snapshot of them. The
profile that turns out to be wanted is a linear combination of the snapshots' profiles, found by
least squares; the same combination of the snapshots themselves is its average.

runs/shapes-001/snapshots/
    step_00000500.safetensors    `<weight>:power_<sigma_rel>`, float32
    step_00000500.json           step, profiles, size and hash; written last
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmdit.atomic import file_hash, write_atomically
from mmdit.checks import listed, whole_number
from mmdit.engine.ema import PowerFunction, gamma_of, take_in
from mmdit.engine.parallel import whole
from mmdit.errors import UserError, first_line
from mmdit.printable import logger
from mmdit.runs.checkpoint import checkpoints_in, read_weights
from mmdit.runs.files import writing
from mmdit.runs.native import load_tensors, save_tensors

log = logger(__name__)


class PostHoc:
    """Averages of several power-function profiles at once, and their snapshots.

    Two are enough to make any other from. They cost their float32 weights in memory and in each
    snapshot; frozen weights and buffers are not among them.

    Args:
        module: what is trained.
        sigma_rels: of the profiles, each in (0, 0.2887]; a profile between them is made best.
        snapshot_every: steps between two snapshots; the last step has one, too.

    Raises:
        UserError: no profile, or the same one twice; `snapshot_every` is not positive.
    """

    def __init__(
        self, module: nn.Module, *, sigma_rels: Sequence[float], snapshot_every: int
    ) -> None:
        whole_number("snapshot_every", snapshot_every, 1)
        listed("sigma_rels", sigma_rels)
        self.profiles = {name_of(s): PowerFunction(sigma_rel=s) for s in sigma_rels}
        if not 0 < len(self.profiles) == len(sigma_rels):
            raise UserError(
                f"sigma_rels {list(sigma_rels)} must be one number or several, which "
                "differ in the first four decimal places"
            )
        self.snapshot_every = snapshot_every
        self.weights = {n: w for n, w in module.named_parameters() if w.requires_grad}
        self.averages = {
            profile: {
                name: weight.detach().float().clone() for name, weight in self.weights.items()
            }
            for profile in self.profiles
        }

    def update(self, step: int, run: Path, *, last: bool, writes: bool = True) -> None:
        """Take in the weights after `step` steps, and keep a snapshot where one is due.

        Args:
            step: number of steps made.
            run: run folder.
            last: whether it is the last step.
            writes: whether this process is the one that writes.

        Raises:
            UserError: the disk is full or the folder cannot be written to.
        """
        for name, profile in self.profiles.items():
            averages = list(self.averages[name].values())
            take_in(averages, list(self.weights.values()), profile.decay(step))
        if last or step % self.snapshot_every == 0:
            self.snapshot(step, run, writes=writes)

    def tensors(self) -> dict[str, Tensor]:
        """`<weight>:<profile>` -> average, for a checkpoint."""
        return {
            f"{name}:{profile}": average
            for profile, averages in self.averages.items()
            for name, average in averages.items()
        }

    def take(self, tensors: dict[str, Tensor]) -> None:
        """Take what `tensors` gave out of the tensors of a checkpoint."""
        for key, average in self.tensors().items():
            average.copy_(tensors.pop(key))

    def snapshot(self, step: int, run: Path, *, writes: bool = True) -> None:
        """Write the averages into the run folder; a resumed run writes the same ones again."""
        tensors = {key: whole(average) for key, average in self.tensors().items()}
        if not writes:
            return
        path = run / "snapshots" / f"step_{step:08d}.safetensors"
        with writing(path, run):
            path.parent.mkdir(exist_ok=True)
            save_tensors(path, tensors, {})
        facts = {
            "step": step,
            "sigma_rels": {name: profile.sigma_rel for name, profile in self.profiles.items()},
            "bytes": path.stat().st_size,
            "sha256": file_hash(path),
        }
        note = path.with_suffix(".json")
        with writing(note, run):
            write_atomically(note, json.dumps(facts, indent=1).encode())


def name_of(sigma_rel: float) -> str:
    """What the tensors of a profile are called: power_0.0500."""
    return f"power_{sigma_rel:.4f}"


def remove_snapshots(run: Path, beyond: int) -> None:
    """Delete the snapshots of steps after `beyond`, from which a run goes on.

    An attempt that got further without a checkpoint, perhaps of another seed, has left them.

    Raises:
        UserError: they cannot be deleted.
    """
    for path in sorted((run / "snapshots").glob("step_*")):  # the .json of each comes first
        found = re.fullmatch(r"step_(\d+)\..+", path.name)
        if found and int(found[1]) > beyond:
            with writing(path, run):
                path.unlink()


class Snapshot(NamedTuple):
    """The averages of a run after some step, on disk."""

    path: Path
    step: int
    sigma_rels: dict[str, float]  # by the names of the profiles
    sha256: str

    def tensors(self) -> dict[str, Tensor]:
        """`<weight>:<profile>` -> average.

        Raises:
            UserError: the file is missing, or its content has changed since it was written.
        """
        if not self.path.is_file() or file_hash(self.path) != self.sha256:
            raise UserError(
                f"snapshot {self.path} is missing or damaged (its SHA-256 differs): move "
                f"{self.path.with_suffix('.json').name} beside it elsewhere to do without it"
            )
        return load_tensors(self.path)[0]


def snapshots_in(run: Path) -> list[Snapshot]:
    """The complete snapshots of a run, oldest step first.

    Steps beyond the newest checkpoint were not kept: the run goes on, or is resumed, before them.

    Raises:
        UserError: the .json of one is damaged.
    """
    reached = max((checkpoint.step for checkpoint in checkpoints_in(run)), default=0)
    found = []
    for path in sorted((run / "snapshots").glob("step_*.json")):
        try:
            facts: dict[str, Any] = json.loads(path.read_bytes())
            file = path.with_suffix(".safetensors")
            snapshot = Snapshot(file, facts["step"], dict(facts["sigma_rels"]), facts["sha256"])
            kept = snapshot.step <= reached
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"snapshot {path} is damaged ({first_line(error)}): move it elsewhere to do "
                "without it"
            ) from error
        if kept:
            found.append(snapshot)
    return found


class Point(NamedTuple):
    """A power-function profile and the step it ends at."""

    gamma: float
    step: float


class Fit(NamedTuple):
    """Profiles combined.

    Attributes:
        coefficients: of each profile.
        error: distance to the profile wanted, relative to its norm.
    """

    coefficients: np.ndarray
    error: float


def fit(points: Sequence[Point], wanted: Point) -> Fit:
    """The combination of `points` nearest to the profile `wanted`, in L2 over the steps."""
    gram = np.array([[inner(p, q) for q in points] for p in points])
    target = np.array([inner(p, wanted) for p in points])
    # Neighbouring snapshots have nearly the same profile. In units of their norms the numbers stay
    # comparable, and directions that float64 cannot tell apart are left alone.
    norms = np.sqrt(np.diag(gram))
    scaled = np.linalg.lstsq(gram / np.outer(norms, norms), target / norms, rcond=1e-13)[0]
    x = scaled / norms
    square = inner(wanted, wanted) - 2 * x @ target + x @ gram @ x
    return Fit(x, float(np.sqrt(max(0.0, square) / inner(wanted, wanted))))


def inner(p: Point, q: Point) -> float:
    """Integral over tau of two profiles (gamma + 1) tau^gamma / T^(gamma + 1), 0 < tau < T."""
    shorter, longer = sorted((p, q), key=lambda point: point.step)
    factor = (p.gamma + 1) * (q.gamma + 1) / (p.gamma + q.gamma + 1)
    return factor * (shorter.step / longer.step) ** longer.gamma / longer.step


class Combination(NamedTuple):
    """How an average is made of the snapshots of a run."""

    step: int  # where its profile ends
    snapshots: list[Snapshot]
    shares: dict[tuple[Path, str], float]  # of each profile of each snapshot
    error: float  # see `Fit`


def combine(run: Path, *, sigma_rel: float, step: int | None = None) -> Combination:
    """What `reconstruct` does, told beforehand; arguments and errors are the same."""
    found = snapshots_in(run)
    snapshots = [s for s in found if step is None or s.step <= step]
    if not snapshots:
        until = "" if step is None else f" up to step {step}"
        raise UserError(f"run {run} has no snapshots{until}: train with posthoc=power_functions")
    end = snapshots[-1].step if step is None else step
    if end > found[-1].step:
        raise UserError(f"step {step} is beyond the newest snapshot of {run}: {found[-1].step}")
    kept = [(s, name, sigma) for s in snapshots for name, sigma in s.sigma_rels.items()]
    points = [Point(gamma_of(sigma), s.step) for s, _, sigma in kept]
    coefficients, error = fit(points, Point(gamma_of(sigma_rel), end))
    shares = {(s.path, name): float(c) for (s, name, _), c in zip(kept, coefficients, strict=True)}
    return Combination(end, snapshots, shares, error)


@torch.no_grad()
def reconstruct(run: Path, *, sigma_rel: float, step: int | None = None) -> nn.Module:
    """The average of a profile that was not kept, from the snapshots of a run.

    Args:
        run: run folder with snapshots.
        sigma_rel: of the profile wanted, in (0, 0.2887].
        step: where it ends; None is the newest snapshot's.

    Returns:
        The averaged module of the newest checkpoint, with these weights instead; `save_module`
        writes it as a file that `sample.py` takes.

    Raises:
        UserError: the run has no snapshot up to that step, or none from it on, or one is damaged.
    """
    combination = combine(run, sigma_rel=sigma_rel, step=step)
    log.info(
        "sigma_rel %g at step %d from %d snapshots: the profile departs by %.2g of its norm",
        *(sigma_rel, combination.step, len(combination.snapshots), combination.error),
    )
    module = read_weights(run).module()
    total: dict[str, Tensor] = {}
    for snapshot in combination.snapshots:
        for key, average in snapshot.tensors().items():
            name, _, profile = key.rpartition(":")
            share = combination.shares[snapshot.path, profile] * average.double()
            total[name] = total[name] + share if name in total else share
    for name, weight in module.named_parameters():
        if name in total:
            weight.data = total[name].float()
    return module
