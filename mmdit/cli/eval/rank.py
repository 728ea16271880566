"""The paper's ranking of training formulations by a study's scores (Table 1).

Protocol `rank-1`: the control settings are six samplers (Euler; 50 steps at guidance 1.0, 2.5 and
5.0; 5, 10 and 25 steps at 5.0), each with averaged and raw weights, on each dataset. In every
setting the variants are sorted into non-dominated fronts of (CLIP score up, Frechet distance down),
and a variant's front numbers are averaged over the settings. With several seeds, runs are ranked
within each seed, and ranks are averaged over the seeds.
"""

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mmdit.checks import flag, seed_number, whole_number
from mmdit.cli.eval.results import write_new
from mmdit.cli.eval.subject import cell
from mmdit.cli.launch import Verbatim, launch
from mmdit.errors import UserError
from mmdit.printable import show
from mmdit.study.ranking import (
    Control,
    RankTable,
    average_ranks,
    correlation,
    power_law,
    rank_table,
)
from mmdit.study.records import (
    SETTINGS,
    SOLVER,
    Setting,
    as_run,
    finite,
    read_runs,
    read_table,
)
from mmdit.study.report import DASH, NO_PLOTS, rank_cell, write_report

PROTOCOL = "rank-1"


# The settings that each column averages over. All ranks in the paper's columns for 5 and 50 steps
# are multiples of 1/4, hence averages over four settings: EMA and raw weights on two datasets, at
# one guidance. At 5 steps it is 5.0; it is assumed at 50, too, so that only the steps differ.
COLUMNS: dict[str, tuple[int, float] | None] = {
    "all": None,
    "5 steps": (5, 5.0),
    "50 steps": (50, 5.0),
}

# Table 1 of arXiv 2403.03206: the two best members of each family, in the order of `COLUMNS`.
PAPER_TABLE1 = {
    "rf/lognorm(0.00,1.00)": (1.54, 1.25, 1.50),
    "rf/lognorm(1.00,0.60)": (2.08, 3.50, 2.00),
    "rf/lognorm(0.50,0.60)": (2.71, 8.50, 1.00),
    "rf/mode(1.29)": (2.75, 3.25, 3.00),
    "rf/lognorm(0.50,1.00)": (2.83, 1.50, 2.50),
    "eps/linear": (2.88, 4.25, 2.75),
    "rf/mode(1.75)": (3.33, 2.75, 2.75),
    "rf/cosmap": (4.13, 3.75, 4.00),
    "edm(0.00,0.60)": (5.63, 13.25, 3.25),
    "rf": (5.67, 6.50, 5.75),
    "v/linear": (6.83, 5.75, 7.75),
    "edm(0.60,1.20)": (9.00, 13.00, 9.00),
    "v/cos": (9.17, 12.25, 8.75),
    "edm/cos": (11.04, 14.25, 11.25),
    "edm/rf": (13.04, 15.25, 13.25),
    "edm(-1.20,1.20)": (15.58, 20.25, 15.00),
}


def job(config: DictConfig, text: Verbatim) -> None:
    """Read the scores, rank the variants, write the results."""
    check(config)
    if ("runs" in text) == ("table" in text):
        raise UserError("give either runs=<folder of run folders> or table=<JSON file>")
    records: list[dict[str, Any]] = []
    notes: list[str] = []
    if "table" in text:
        runs, settings = read_table(Path(text["table"]))
    else:
        records, notes = read_runs(Path(text["runs"]))
        runs, settings = [as_run(record) for record in records], SETTINGS
    if config.report and records and importlib.util.find_spec("matplotlib") is None:
        raise UserError(NO_PLOTS)
    table = rank_table(runs, settings)
    result = {
        "protocol": PROTOCOL,
        "scores_protocol": runs[0].protocol,
        "samples": runs[0].samples,
        "seeds": table.seeds,
        "datasets": sorted({run.dataset for run in runs}),
        "resamples": config.resamples,
        "seed": config.seed,
        "notes": notes,
        **ranking(table, config),
        **trends(records),
        "runs": [{key: record[key] for key in KEPT} for record in records],
    }
    out = Path(text.get("out") or (Path(text["runs"]) / "ranking" if records else "results/rank"))
    out.mkdir(parents=True, exist_ok=True)
    markdown = as_markdown(result)
    text_of = {".json": json.dumps(result, indent=1).encode(), ".md": markdown.encode()}
    written = write_new(out, "rank", text_of)
    show(*markdown.split("\n"))
    if config.report:
        written.append(write_report(out, result, records, written[0].stem.removeprefix("rank")))
    show(*written)


KEPT = ("run", "variant", "seed", "dataset", "samples", "weights_sha256", "training")


def check(config: DictConfig) -> None:
    """Raise UserError for an invalid config."""
    whole_number("resamples", config.resamples, 100)
    seed_number("seed", config.seed)
    flag("report", config.report)


# Ranking


def ranking(table: RankTable, config: DictConfig) -> dict[str, Any]:
    """The variants, best first, with their averaged ranks and front numbers."""
    columns = {
        name: average_ranks(
            table, partial(counts, sampler), resamples=config.resamples, seed=config.seed
        )
        for name, sampler in COLUMNS.items()
    }
    variants = [
        {
            "variant": variant,
            "ranks": {k: c and c[variant]._asdict() for k, c in columns.items()},
            "paper": dict(zip(COLUMNS, PAPER_TABLE1[variant], strict=True))
            if variant in PAPER_TABLE1
            else None,
            "fronts": table.fronts[:, :, i].T.tolist(),  # (control, seed)
        }
        for i, variant in enumerate(table.variants)
    ]
    variants.sort(key=lambda v: (v["ranks"]["all"]["mean"], v["variant"]))
    controls = [
        {"dataset": c.dataset, "name": str(c.setting), **c.setting._asdict()}  # type: ignore[attr-defined]
        for c in table.controls
    ]
    return {"variants": variants, "controls": controls}


def counts(sampler: tuple[int, float] | None, control: Control) -> bool:
    """Whether a column of this sampler, or of all samplers if None, includes the setting."""
    setting = control.setting
    assert isinstance(setting, Setting)
    return sampler is None or (setting.steps, setting.guidance) == sampler


def trends(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores at 50 steps, guidance 5.0, averaged weights, and their relation to the loss.

    As losses of different predictions and paths are different quantities, correlations are over
    all runs, and also within each group of similar names ("rf", "edm", ...).
    """
    figures = [
        {
            **{key: record[key] for key in ("variant", "seed", "dataset")},
            "flops": record["training"]["flops"],
            "loss": finite(record["validation"]["ema"]["loss"]),
            **{key: finite(row.get(key)) for key in ("clip", "fd", "kid", "accuracy")},
        }
        for record in records
        for row in record["scores"]
        if (row["weights"], row["steps"], row["guidance"], row["solver"]) == SHOWN
    ]
    result = []
    for dataset in sorted({f["dataset"] for f in figures}):
        rows = [f for f in figures if f["dataset"] == dataset and f["loss"] is not None]
        scored = [f for f in rows if f["accuracy"] is not None]
        kinds = {"all": scored}
        for f in scored:
            kinds.setdefault(re.split(r"[/(]", f["variant"])[0], []).append(f)
        found = {
            kind: correlation([f["loss"] for f in some], [f["accuracy"] for f in some])
            for kind, some in kinds.items()
        }
        law = power_law([f["flops"] for f in rows], [f["loss"] for f in rows])
        result.append(
            {
                "dataset": dataset,
                "loss_and_accuracy": {k: c._asdict() for k, c in found.items() if c},
                "loss_by_flops": law and law._asdict(),
            }
        )
    return {"figures": figures, "trends": result}


SHOWN = ("ema", 50, 5.0, SOLVER)


# Reporting


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table of ranks, best variant first, with notes on its origin."""
    seeds, controls = result["seeds"], result["controls"]
    heads = [*COLUMNS, *(f"paper: {name}" for name in COLUMNS)]
    lines = [
        f"{result['protocol']}: front number of (CLIP score up, Frechet distance down), averaged "
        f"over {len(controls)} control settings; lower is better",
        "",
        f"| | variant | {' | '.join(heads)} |",
        "|---" * (len(heads) + 2) + "|",
    ]
    for place, row in enumerate(result["variants"], 1):
        paper = row["paper"] or {}
        cells = [rank_cell(row["ranks"][name]) for name in COLUMNS]
        cells += [f"{paper[name]:.2f}" if paper else DASH for name in COLUMNS]
        lines.append(f"| {place} | {cell(row['variant'])} | {' | '.join(cells)} |")
    lines.append("")
    if result["runs"]:
        lines.append(
            f"Scores: {result['scores_protocol']}, {result['samples']} samples each, on "
            f"{', '.join(result['datasets'])}; seeds {', '.join(map(str, seeds))}."
        )
    if len(seeds) > 1:
        lines.append(
            f"±: half of the 95 % bootstrap interval over {len(seeds)} seeds "
            f"({result['resamples']} resamples, seed {result['seed']})."
        )
    lines.append(
        f"Paper: arXiv 2403.03206, Table 1, two members of each family; {DASH}: not shown there."
    )
    return "\n".join([*lines, *map(cell, result["notes"]), ""])


def main() -> None:
    """Run the evaluation according to the command line."""
    launch(job, config_name="rank", verbatim=("runs", "table", "out"))
