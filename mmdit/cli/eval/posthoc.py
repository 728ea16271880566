"""Averages of weights with any EMA length, computed after training (EDM2, Sec. 3.2).

Protocol `posthoc-1`: the combination of a run's snapshots whose profile is closest to the requested
power-function profile. The profile error is the L2 distance between the two over the steps,
relative to the norm of the requested profile.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mmdit.checks import expanded, whole_number
from mmdit.cli.eval.subject import made, numbers, table, write_results
from mmdit.cli.launch import Verbatim, launch
from mmdit.engine.posthoc import Combination, combine, reconstruct
from mmdit.errors import UserError
from mmdit.runs.native import save_module, weights_hash

PROTOCOL = "posthoc-1"
VERBATIM = ("run", "out")


def job(config: DictConfig, text: Verbatim) -> None:
    """Check the config, combine snapshots, write the averages and the results."""
    several = OmegaConf.is_list(config.sigma_rel)
    if not several:
        config.sigma_rel = [config.sigma_rel]
    sigma_rels = numbers(config, "sigma_rel", "numbers in (0, 0.2887]", low=0, high=12**-0.5)
    step = None if config.step is None else whole_number("step", config.step)
    run = run_folder(text)
    files = places(text, sigma_rels, several=several)
    plans = [combine(run, sigma_rel=sigma_rel, step=step) for sigma_rel in sigma_rels]
    rows = []
    for sigma_rel, plan, file in zip(sigma_rels, plans, files, strict=True):
        module = reconstruct(run, sigma_rel=sigma_rel, step=step)
        try:
            save_module(file, module)
        except OSError as error:
            raise UserError(f"{file} cannot be written: {error}") from error
        rows.append(row_of(sigma_rel, plan, file, weights_hash(module)))
    report = {"protocol": PROTOCOL, "weights": str(run), "seed": None, "rows": rows}
    out = files[0].parent
    write_results(out, "posthoc" if several else files[0].stem, report, as_markdown(report))


def run_folder(text: Verbatim) -> Path:
    """The run whose snapshots are averaged.

    Raises:
        UserError: run= is not given, or is not a folder.
    """
    if not text.get("run"):
        raise UserError("give run=<run folder> of a run with snapshots")
    run = expanded(text["run"])
    if not run.is_dir():
        raise UserError(f"run={run}: there is no such folder")
    return run


def places(text: Verbatim, sigma_rels: list[float], *, several: bool) -> list[Path]:
    """The file of each average, in a folder that is created.

    Raises:
        UserError: out= is not given, is not a .safetensors file for a single average, or its folder
            cannot be created.
    """
    if not text.get("out"):
        raise UserError("give out=<file.safetensors>, or out=<folder> if sigma_rel is a list")
    out = expanded(text["out"])
    if several:
        return [made(out) / f"sigma_rel_{sigma_rel:.4f}.safetensors" for sigma_rel in sigma_rels]
    if out.suffix != ".safetensors":
        raise UserError(f"out={out} must end in .safetensors")
    return [made(out.parent) / out.name]


def row_of(sigma_rel: float, plan: Combination, file: Path, sha256: str) -> dict[str, Any]:
    """The report's row for one average."""
    return {
        "sigma_rel": sigma_rel,
        "step": plan.step,
        "snapshots": len(plan.snapshots),
        "profile_error": plan.error,
        "file": str(file),
        "sha256": sha256,
    }


def as_markdown(report: dict[str, Any]) -> str:
    """A table with a row for each average."""
    header = ("sigma_rel", "ends at step", "snapshots", "profile error", "file")
    keys = ("sigma_rel", "step", "snapshots", "profile_error", "file")
    rows = [[row[key] for key in keys] for row in report["rows"]]
    return f"{report['protocol']}: {report['weights']}\n\n{table(header, rows)}"


def main() -> None:
    """Run the evaluation according to the command line."""
    launch(job, config_name="posthoc_average", verbatim=VERBATIM)
