"""A study's report: one self-contained HTML file, with its images embedded."""

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from PIL import Image

from mmdit.atomic import write_atomically
from mmdit.printable import printable
from mmdit.study.ranking import Average, PowerLaw

Record = Mapping[str, Any]

STYLE = """
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  color: #222; background: #fff; max-width: 1240px; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.7em; margin-bottom: 0.2em; }
h2 { font-size: 1.2em; margin: 2.2em 0 0.4em; border-bottom: 1px solid #ddd; }
p, figcaption, li { color: #444; max-width: 62em; }
figure { margin: 1.2em 0 2em; } figcaption { font-size: 0.92em; }
img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9em; font-variant-numeric: tabular-nums; }
th, td { padding: 0.18em 0.7em; text-align: right; white-space: nowrap; }
th { border-bottom: 1.5px solid #888; font-weight: 600; vertical-align: bottom; }
td { border-bottom: 1px solid #eee; }
th.name, td.name { text-align: left; }
.paper { color: #777; }
.fronts td, .fronts th { padding: 0.18em 0.45em; text-align: center; }
.fronts td.name, .fronts th.name { text-align: left; }
code { font-size: 0.9em; }
details { margin: 0.4em 0; } summary { cursor: pointer; }
"""


def write_report(out: Path, result: Record, records: Sequence[Record], suffix: str = "") -> Path:
    """Write `report<suffix>.html`, and its plots as PNG files next to it.

    Args:
        out: an existing folder.
        result: the content of `rank.json`.
        records: the content of each `scores.json`, with its `folder`; empty for a table of scores,
            whose report has no plots.
        suffix: appended to the names of all files.

    Returns:
        The path of the report.
    """
    sections = [
        "<h1>Ranking of training formulations</h1>",
        _summary(result),
        _ranks(result),
        _fronts(result),
    ]
    if records:
        sections += [_figures_table(result), *_plots(out, result, records, suffix)]
        sections += [_runs(result), *_samples(result, records)]
    page = "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>Ranking of training formulations</title>\n<style>{STYLE}</style>",
            "</head>\n<body>",
            *sections,
            "</body>\n</html>\n",
        ]
    )
    path = out / f"report{suffix}.html"
    write_atomically(path, page.encode())
    return path


def _escaped(text: str) -> str:
    """Untrusted text as HTML."""
    return html.escape(printable(text))


# Tables

DASH = "\N{EN DASH}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, css: str = "") -> str:
    """An HTML table of escaped text; the second column is the name."""

    def row(tag: str, cells: Sequence[str]) -> str:
        inside = (
            f"<{tag}{' class=name' if i == 1 else ''}>{_escaped(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(inside)}</tr>"

    body = "\n".join(row("td", cells) for cells in rows)
    return f'<div class="scroll"><table class="{css}">\n{row("th", heads)}\n{body}\n</table></div>'


def _summary(result: Record) -> str:
    facts = [
        f"{len(result['variants'])} variants in {len(result['controls'])} control settings. In "
        "every setting the variants are sorted into non-dominated fronts of (CLIP score up, "
        "Fréchet distance down); a variant's rank is its front number, averaged over the settings "
        "(arXiv 2403.03206, Section 5.1). Lower is better."
    ]
    if result["runs"]:
        facts.append(
            f"Scores: {result['scores_protocol']}, {result['samples']} samples each, on "
            f"{', '.join(result['datasets'])}; seeds {', '.join(map(str, result['seeds']))}, each "
            "ranked on its own."
        )
    if len(result["seeds"]) > 1:
        facts.append(
            f"± is half of the 95 % percentile bootstrap interval over {len(result['seeds'])} "
            f"seeds ({result['resamples']} resamples, seed {result['seed']}); with few seeds it "
            "is merely their range."
        )
    return "\n".join(f"<p>{_escaped(fact)}</p>" for fact in [*facts, *result["notes"]])


def rank_cell(rank: Record | None) -> str:
    """`1.54 ± 0.20`, or without the interval if there is none; a dash if there is no rank."""
    if rank is None:
        return DASH
    average = Average(**rank)
    width = average.half_width
    return f"{average.mean:.2f}" + ("" if width is None else f" ± {width:.2f}")


def _ranks(result: Record) -> str:
    columns = list(result["variants"][0]["ranks"])
    rows = [
        [
            str(place),
            row["variant"],
            *(rank_cell(row["ranks"][name]) for name in columns),
            *(f"{row['paper'][name]:.2f}" if row["paper"] else DASH for name in columns),
        ]
        for place, row in enumerate(result["variants"], 1)
    ]
    heads = ["", "variant", *columns, *(f"paper: {name}" for name in columns)]
    note = f"Paper: Table 1, which shows two members of each family; {DASH}: not shown there."
    return f"<h2>Ranks</h2>\n{table(heads, rows)}\n<p>{note}</p>"


def _fronts(result: Record) -> str:
    """The front numbers as a heat map, darkest for the first front."""
    worst = max(max(map(max, row["fronts"])) for row in result["variants"])
    lines = []
    for place, row in enumerate(result["variants"], 1):
        cells = []
        for numbers in row["fronts"]:
            mean = fmean(numbers)
            share = (mean - 1) / max(worst - 1, 1)
            red, green, blue = (round(a + share * (b - a)) for a, b in zip(DARK, PALE, strict=True))
            ink = "#fff" if share < 0.45 else "#222"
            shown = f"{mean:.1f}" if len(numbers) > 1 else f"{mean:.0f}"
            style = f"background: rgb({red}, {green}, {blue}); color: {ink}"
            cells.append(f'<td style="{style}">{shown}</td>')
        name = f"<td>{place}</td><td class=name>{_escaped(row['variant'])}</td>"
        lines.append(f"<tr>{name}{''.join(cells)}</tr>")
    heads = "".join(f"<th>{_setting_head(control)}</th>" for control in result["controls"])
    over_seeds = " (mean over the seeds)" if len(result["seeds"]) > 1 else ""
    return "\n".join(
        [
            f"<h2>Front numbers in every control setting{over_seeds}</h2>",
            '<div class="scroll"><table class="fronts">',
            f"<tr><th></th><th class=name>variant</th>{heads}</tr>",
            *lines,
            "</table></div>",
        ]
    )


DARK, PALE = (8, 69, 148), (247, 251, 255)


def _setting_head(control: Record) -> str:
    if not control["dataset"]:
        return _escaped(control["name"])
    parts = (control["dataset"], control["weights"], f"{control['steps']} steps")
    return "<br>".join(_escaped(part) for part in (*parts, f"g {control['guidance']:g}"))


def _figures_table(result: Record) -> str:
    """Loss and scores of each variant: mean, and standard deviation over seeds."""
    names = {"loss": "validation loss", "clip": "CLIP score", "fd": "Fréchet distance"}
    names |= {"kid": "KID", "accuracy": "accuracy"}
    digits = {"loss": 4, "clip": 3, "fd": 2, "kid": 4, "accuracy": 3}
    sections = []
    for dataset in result["datasets"]:
        rows = []
        for place, row in enumerate(result["variants"], 1):
            mine = [
                figure
                for figure in result["figures"]
                if (figure["variant"], figure["dataset"]) == (row["variant"], dataset)
            ]
            cells = [mean_cell([f[key] for f in mine], digits[key]) for key in names]
            rows.append([str(place), row["variant"], *cells])
        sections += [
            f"<p>{_escaped(dataset)}</p>",
            table(["", "variant", *names.values()], rows),
        ]
    spread = ", mean ± standard deviation over the seeds" if len(result["seeds"]) > 1 else ""
    return (
        f"<h2>Metrics at 50 steps, guidance 5.0, averaged weights{spread}</h2>\n"
        + "\n".join(sections)
        + "\n<p>The validation loss is the mean of the first seven of eight levels of t. Losses of "
        "different predictions and paths are different quantities.</p>"
    )


def mean_cell(values: Sequence[float | None], digits: int) -> str:
    """The mean, and the standard deviation of several values; a dash if one is missing."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return DASH
    text = f"{fmean(numbers):.{digits}f}"
    return text + (f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else "")


def _runs(result: Record) -> str:
    heads = ["", "run", "variant", "seed", "dataset", "steps", "batch", "parameters", "FLOPs"]
    rows = []
    for i, run in enumerate(result["runs"], 1):
        training = run["training"]
        cells = [str(i), run["run"], run["variant"], str(run["seed"]), run["dataset"]]
        cells += [str(training[key]) for key in ("steps", "batch_size")]
        cells += [f"{training['parameters']:,}", f"{training['flops']:.3g}"]
        hashes = (run["weights_sha256"].get(key, DASH)[:12] for key in ("ema", "raw"))
        rows.append([*cells, *hashes])
    heads += ["SHA-256 of ema", "of raw"]
    shown = table(heads, rows)
    return f"<h2>Runs</h2>\n<details><summary>{len(rows)} runs</summary>\n{shown}</details>"


# Images


def _plots(out: Path, result: Record, records: Sequence[Record], suffix: str) -> list[str]:
    from mmdit.study import plots  # matplotlib is an extra: `eval/rank.py` checks for it

    look = plots.styles([row["variant"] for row in result["variants"]])
    sections = ["<h2>Plots</h2>", "<p>Numbers are places in the ranking.</p>"]

    def add(name: str, content: bytes, caption: str) -> None:
        stem = re.sub(r"[^-.0-9A-Za-z_]", "_", name)
        write_atomically(out / f"{stem}{suffix}.png", content)
        sections.append(_figure(content, caption))

    for trend in result["trends"]:
        dataset = trend["dataset"]
        here = [record for record in records if record["dataset"] == dataset]
        for weights, which in (("ema", "averaged weights"), ("raw", "raw weights")):
            add(
                f"scores_by_steps-{dataset}-{weights}",
                plots.scores_by_steps(here, look, weights),
                f"{dataset}: scores against sampling steps at guidance 5.0, {which} (the paper's "
                "Figure 3). Means over the seeds; the bars reach from the lowest to the highest.",
            )
        add(
            f"trade_off-{dataset}",
            plots.trade_off(here, look, "ema"),
            f"{dataset}: CLIP score against Fréchet distance in the six sampler settings, averaged "
            "weights, means over the seeds. Grey connects the variants that no other dominates.",
        )
        figures = [f for f in result["figures"] if f["dataset"] == dataset]
        figures = [f for f in figures if f["loss"] is not None]
        law = PowerLaw(**trend["loss_by_flops"]) if trend["loss_by_flops"] else None
        fit = (
            "the dashed line is fitted to all points" if law else "fewer than three budgets: no fit"
        )
        if figures:
            add(
                f"loss_by_flops-{dataset}",
                plots.loss_by_flops(figures, look, law),
                f"{dataset}: validation loss against training FLOPs (the paper's Figure 8); {fit}. "
                "Only losses of the same prediction and path are comparable.",
            )
        scored = [f for f in figures if f["accuracy"] is not None]
        if scored:
            add(
                f"loss_and_accuracy-{dataset}",
                plots.loss_and_accuracy(scored, look),
                f"{dataset}: accuracy at 50 steps, guidance 5.0, against validation loss, averaged "
                f"weights; dots are runs. {correlation_text(trend['loss_and_accuracy'])}",
            )
    return sections


NO_PLOTS = (
    "the plots of the report need matplotlib: pip install -e '.[plots]', "
    "or report=false for the tables alone"
)


def correlation_text(correlations: Mapping[str, Record]) -> str:
    """The correlation coefficients as a sentence."""
    texts = [
        f"{kind} ({c['points']} runs): Pearson {c['pearson']:.2f}, Spearman {c['spearman']:.2f}"
        for kind, c in correlations.items()
    ]
    return "; ".join(texts) + "." if texts else "Too few runs for a correlation."


def _figure(content: bytes, caption: str) -> str:
    """A PNG embedded in the page, with its caption."""
    data = base64.b64encode(content).decode()
    text = _escaped(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _samples(result: Record, records: Sequence[Record], width: int = 1000) -> list[str]:
    """The latest sample grid of each run that has one, best variant first, scaled to fit."""
    sections: list[str] = []
    for place, row in enumerate(result["variants"], 1):
        for record in records:
            grids = sorted((record["folder"] / "samples").glob("*.png"))
            if record["variant"] != row["variant"] or not grids:
                continue
            with Image.open(grids[-1]) as image:
                small = image.convert("RGB")
                small.thumbnail((width, width))
            buffer = io.BytesIO()
            small.save(buffer, format="png")
            name = f"{place}  {record['variant']}, seed {record['seed']}, {record['dataset']}"
            figure = _figure(buffer.getvalue(), f"{record['run']}, {grids[-1].name}")
            opened = "" if sections else " open"
            sections.append(
                f"<details{opened}><summary>{_escaped(name)}</summary>{figure}</details>"
            )
    return ["<h2>Samples</h2>", *sections] if sections else []
