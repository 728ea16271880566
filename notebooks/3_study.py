# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Reading a study
#
# A study trains many variants and scores each in the same settings; `eval/rank.py` ranks them as
# the paper does (Sec. 5.1). Here is what it does, one step after another: first on scores that
# the paper prints, then on run folders.

# %%
import itertools
import json
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from hydra import compose, initialize_config_dir
from IPython.display import Image, display

from mmdit.cli import CONFIGS
from mmdit.cli.eval import rank
from mmdit.cli.eval.rank import PAPER_TABLE1
from mmdit.keys import generator_for
from mmdit.study.ranking import average_ranks, fronts, rank_table
from mmdit.study.records import SAMPLERS, SETTINGS, as_run, read_runs, read_table

scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)

# %% [markdown]
# ## Non-dominated sorting
#
# A variant is judged by two scores at once: CLIP score (more is better) and FID (less is better).
# Those that no other beats in both are the first front and get rank 1. They are removed, those now
# unbeaten get rank 2, and so on.
#
# These are the scores of the paper's Table 2, at 25 steps, on two datasets.

# %%
PAPER_TABLE2 = {  # CLIP score and FID on ImageNet, then on CC12M
    "rf": (0.247, 49.70, 0.217, 94.90),
    "edm(-1.20,1.20)": (0.236, 63.12, 0.200, 116.60),
    "eps/linear": (0.245, 48.42, 0.222, 90.34),
    "v/cos": (0.244, 50.74, 0.209, 97.87),
    "v/linear": (0.246, 51.68, 0.217, 100.76),
    "rf/lognorm(0.50,0.60)": (0.256, 80.41, 0.233, 120.84),
    "rf/mode(1.75)": (0.253, 44.39, 0.218, 94.06),
    "rf/lognorm(1.00,0.60)": (0.254, 114.26, 0.234, 147.69),
    "rf/lognorm(-0.50,1.00)": (0.248, 45.64, 0.219, 89.70),
    "rf/lognorm(0.00,1.00)": (0.250, 45.78, 0.224, 89.91),
}
table = [
    {"variant": variant, "setting": dataset, "clip": scores[i], "fd": scores[i + 1]}
    for variant, scores in PAPER_TABLE2.items()
    for i, dataset in ((0, "ImageNet"), (2, "CC12M"))
]
(folder / "table2.json").write_text(json.dumps(table))
runs, settings = read_table(folder / "table2.json")

figure, axes = plt.subplots(1, 2, figsize=(12, 3.6))
for axis, setting in zip(axes, settings, strict=True):
    points = [run.points[setting] for run in runs]
    numbers = fronts(points)
    for number in range(1, max(numbers) + 1):
        members = [i for i in range(len(runs)) if numbers[i] == number]
        print(f"{setting}, front {number}:", ", ".join(runs[i].variant for i in members))
        line = sorted((points[i].fd, points[i].clip) for i in members)
        axis.plot(*zip(*line, strict=True), "o-", label=f"front {number}")
    axis.set(xlabel="FID (less is better)", ylabel="CLIP score (more is better)", title=setting)
axes[0].legend(fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# A variant's rank is the mean of its front numbers over the settings. With two settings it is
# coarse; the paper averages over 24: six samplers, with and without EMA, on two datasets.

# %%
averages = average_ranks(rank_table(runs, settings))
for mean, variant in sorted((average.mean, variant) for variant, average in averages.items()):
    print(f"{variant:24} {mean:.2f}")

# %% [markdown]
# ## Run folders
#
# `python train.py -m experiment=table1` leaves a `scores.json` in each run folder. This reads
# those in `../runs/table1`.
#
# **If there are none, it makes some up**: the files written below have the right format, and
# every number in them is **invented**. Then the ranking that follows is invented, too, and its
# agreement or disagreement with the paper means nothing.

# %%
study = Path("../runs/table1")
if not any(study.glob("*/scores.json")):
    print("No study in ../runs/table1: every score below is INVENTED.")
    study = folder / "invented"
    for variant, seed in itertools.product(list(PAPER_TABLE1)[::3], (0, 1, 2)):
        good = 0.5 + 0.1 * torch.rand((), generator=generator_for("invented", variant)).item()
        chance = torch.randn(37, generator=generator_for("invented", variant, seed)).tolist()
        loss = 0.3 - 0.1 * good + 0.004 * chance.pop()
        rows = [
            {
                "weights": weights,
                "steps": steps,
                "guidance": guidance,
                "solver": "euler",
                "clip": 0.2 + 0.004 * guidance + 0.05 * good / bad + 0.003 * chance.pop(),
                "fd": (20 - 12 * good) * bad * (1 + 0.03 * chance.pop()),
                "kid": 0.02 * bad,
                "accuracy": min(1.0, good / bad + 0.03 * abs(chance.pop())),
            }
            for weights, worse in (("ema", 0.0), ("raw", 0.3))
            for steps, guidance in SAMPLERS
            for bad in [1 + 3 / steps + worse]
        ]
        levels = {"loss": loss, "levels": {str(i / 8): loss for i in range(1, 9)}}
        record = {
            "protocol": "scores-1",
            "variant": variant,
            "seed": seed,
            "dataset": "invented",
            "samples": 256,
            "weights_sha256": {"ema": "0" * 64, "raw": "0" * 64},
            "training": {"steps": 600, "batch_size": 64, "parameters": 1, "flops": 1.0},
            "validation": {"ema": levels, "raw": levels},
            "scores": rows,
        }
        file = study / f"{variant.replace('/', '_')},{seed}" / "scores.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(record))

records, notes = read_runs(study)
print(f"{len(records)} runs of {len({record['variant'] for record in records})} variants", *notes)

# %% [markdown]
# The record of one run: its name, the protocol it was scored by, what it cost, and a row for each
# setting.

# %%
record = records[0]
print({key: value for key, value in record.items() if isinstance(value, str | int)})
print("training:", record["training"])
print("validation loss, averaged weights:", round(record["validation"]["ema"]["loss"], 4))
for row in record["scores"]:
    print(
        f"  {row['weights']}, {row['steps']:>2} steps, guidance {row['guidance']:<4g}"
        f" CLIP {row['clip']:.4f}  FD {row['fd']:6.2f}  accuracy {row['accuracy']:.3f}"
    )

# %% [markdown]
# ## The ranking
#
# In each of the twelve settings (times the datasets) the variants are sorted into fronts, each
# seed on its own: scores of different seeds are never mixed before they are sorted. Runs of
# different protocols or sample counts, missing settings and scores that are not finite are
# refused.

# %%
table = rank_table([as_run(record) for record in records], SETTINGS)
print("seeds", table.seeds, " fronts (seed, control setting, variant):", table.fronts.shape)
figure, axis = plt.subplots(figsize=(9, 0.35 * len(table.variants) + 2.4))
shown = axis.imshow(table.fronts.mean(axis=0).T, cmap="Blues_r", aspect="auto")
axis.set_yticks(range(len(table.variants)), table.variants, fontsize=8)
names = [str(control.setting) for control in table.controls]
axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
axis.set_title("front number, mean over the seeds", fontsize=9)
figure.colorbar(shown)
plt.show()

# %% [markdown]
# Averaged over all settings, and over those at 5 and at 50 steps, with the paper's Table 1
# for comparison; intervals are bootstrapped over the seeds. `python eval/rank.py runs=runs/table1`
# does the same; besides the table it writes JSON and one HTML file with the plots.

# %%
with initialize_config_dir(str(CONFIGS), version_base=None):
    config = compose("rank")
out = folder / "ranking"
rank.job(config, {"runs": str(study), "out": str(out)})

# %% [markdown]
# ## Plots
#
# Scores against sampling steps at guidance 5.0 (Fig. 3), and one against the other in every
# sampler setting; averaged weights. Numbers are ranks.

# %%
result = json.loads((out / "rank.json").read_text())
for dataset in result["datasets"]:
    display(Image(data=(out / f"scores_by_steps-{dataset}-ema.png").read_bytes(), width=900))
    display(Image(data=(out / f"trade_off-{dataset}.png").read_bytes(), width=900))

# %% [markdown]
# Does the validation loss predict which model is good (Sec. 5.3)? Losses of different predictions
# and paths are different quantities, so the correlation is given within each kind, too.

# %%
for trend in result["trends"]:
    file = out / f"loss_and_accuracy-{trend['dataset']}.png"
    display(Image(data=file.read_bytes(), width=700))
    for kind, found in trend["loss_and_accuracy"].items():
        print(
            f"{trend['dataset']}, {kind}: Pearson {found['pearson']:.2f},"
            f" Spearman {found['spearman']:.2f}, {found['points']} runs"
        )
scratch.cleanup()
