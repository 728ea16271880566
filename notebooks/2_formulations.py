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
# # The formulations
#
# The paper compares 61 ways to train the same network (Sec. 5.1). Each is a path, a timestep
# density and a prediction; each has one effective weight of noise levels, by which they can be
# compared (Eq. 12):
#
# $$\mathcal{L}_w = -\tfrac12\, E_{t \sim U(0,1),\,\epsilon}
# \left[ w_t\, \lambda'_t\, \|\epsilon_\theta(z_t, t) - \epsilon\|^2 \right], \qquad
# \lambda_t = \log \frac{a_t^2}{b_t^2}.$$
#
# t = 0 is data and t = 1 is noise, everywhere.

# %%
import matplotlib.pyplot as plt
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mmdit.cli import CONFIGS
from mmdit.cli.eval.rank import PAPER_TABLE1
from mmdit.flow.paths import EDM, Cosine, LDMLinear, MatchedEDM, RectifiedFlow
from mmdit.flow.schedule import PublishedShift, Shift
from mmdit.flow.timesteps import CosMap, LogitNormal, Mode, Uniform
from mmdit.keys import generator_for
from mmdit.study.formulations import study

rows = study()
with initialize_config_dir(str(CONFIGS), version_base=None):
    families = {name: compose(f"objective/{name}").objective for name in {r.family for r in rows}}
objectives = {
    row.name: instantiate(OmegaConf.merge(families[row.family], row.settings)) for row in rows
}
print(len(objectives), "formulations; those of Table 1:")
for name in PAPER_TABLE1:
    parts = objectives[name]
    kinds = (type(part).__name__ for part in (parts.path, parts.timesteps, parts.prediction))
    print(f"{name:24}", " x ".join(kinds))

# %% [markdown]
# ## Paths
#
# $z_t = a_t x_0 + b_t \epsilon$ (Eq. 1). EDM keeps $a_t = 1$ and lets $b_t$ grow without bound.
#
# Between data and Gaussian noise all paths visit the same noise levels, at other times and in
# other units: $z_t / (a_t + b_t)$ lies on the straight path, at $\sigma = b_t / (a_t + b_t)$.
# Samplers run on that clock.

# %%
paths = {
    "rf": RectifiedFlow(),
    "cosine": Cosine(),
    "linear (LDM)": LDMLinear(),
    "edm(-1.20,1.20)": EDM(P_m=-1.2, P_s=1.2),
    "edm/rf": MatchedEDM(),
}
t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
figure, axes = plt.subplots(1, 4, figsize=(14, 3.2))
for name, path in paths.items():
    axes[0].plot(t, path.a(t), label=name)
    axes[1].plot(t, path.b(t))
    axes[2].plot(t, path.straight(t))
    axes[3].plot(t, path.log_snr(t))
axes[0].set(xlabel="t", ylabel="$a_t$")
axes[1].set(xlabel="t", ylabel="$b_t$", ylim=(0, 3))
axes[2].set(xlabel="t", ylabel=r"$\sigma$ of the straight path")
axes[3].set(xlabel="t", ylabel=r"$\lambda_t$", ylim=(-15, 15))
axes[0].legend(fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Timestep densities
#
# t is drawn from $\pi(t)$ and the loss stays plain (Sec. 3.1): logit-normal (Eq. 19), mode (Eq.
# 20), CosMap (Eq. 21). Lines are the closed forms, bars are draws. A positive m favours noise: at
# m = 1 the mean of t is 0.697.

# %%
densities = {
    "uniform": Uniform(),
    "lognorm(0.00,1.00)": LogitNormal(m=0.0, s=1.0),
    "lognorm(1.00,1.00)": LogitNormal(m=1.0, s=1.0),
    "lognorm(0.50,0.60)": LogitNormal(m=0.5, s=0.6),
    "mode(1.29)": Mode(s=1.29),
    "mode(1.75)": Mode(s=1.75),
    "mode(-0.54)": Mode(s=-0.54),
    "cosmap": CosMap(),
}
figure, axes = plt.subplots(2, 4, figsize=(14, 5), sharex=True)
for axis, (name, density) in zip(axes.flat, densities.items(), strict=True):
    draws = density.sample(20_000, generator_for(0, "draws", name))
    axis.hist(draws.numpy(), bins=50, range=(0, 1), density=True, color="#c9d8e8")
    axis.plot(t, density.pdf(t), color="#0b62a4")
    axis.set_title(f"{name}: mean {draws.mean():.3f}", fontsize=9)
    axis.set_ylim(0, 3.2)
for axis in axes[1]:
    axis.set_xlabel("t")
figure.tight_layout()
plt.show()
half = torch.tensor(0.5, dtype=torch.float64)
print(f"mode(1.75) at t = 1/2: {Mode(s=1.75).pdf(half):.0f}; largest s: {Mode.LARGEST:.4f}")

# %% [markdown]
# `mode(1.75)` lies just inside the range where Eq. 20 is monotone, s <= 2/(pi - 2): its density
# has a narrow spike in the middle.
#
# The same change of emphasis could be had by weighting a uniform t: for RF $w_t^\pi =
# \frac{t}{1-t} \pi(t)$. In expectation the two are the same, but drawing spends the
# computation where the weight is.
#
# ## Noise levels drawn
#
# Paths have different clocks, so t means nothing between them; $\lambda$ does. This is the
# density of $\lambda$ in training, of the formulations of Table 1. (`python train.py` writes that
# of its own formulation into the run folder, `objective.png`.)

# %%
figure, axes = plt.subplots(1, 2, figsize=(14, 3.6), sharey=True)
for i, name in enumerate(PAPER_TABLE1):
    objective, axis = objectives[name], axes[0] if name.startswith("rf") else axes[1]
    drawn = objective.density(t) / objective.path.d_log_snr(t).abs()
    style = ("-", "--", ":")[i % 3]
    axis.plot(objective.path.log_snr(t), drawn, label=name, linestyle=style)
for axis in axes:
    axis.set(xlabel=r"$\lambda$ (noise on the left)", xlim=(-12, 12), ylim=(0, 0.6))
    axis.legend(fontsize=8)
axes[0].set_ylabel(r"density of $\lambda$")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Effective weights
#
# `Objective.weight` is $w_t$ of Eq. 12, density and prediction included. Only its shape matters,
# because Adam is invariant to a constant factor: each curve is divided by its value at
# $\lambda = -2$. Grey are all 61, in colour those of Table 1; each covers the middle
# 99.8 % of t.

# %%
unit = 1 / (1 + torch.exp(torch.tensor([-1.0], dtype=torch.float64)))  # sigma where lambda = -2
figure, axes = plt.subplots(1, 2, figsize=(14, 4.6), sharey=True)
for objective in objectives.values():
    relative = objective.weight(t) / objective.weight(objective.path.time_at(unit))
    for axis in axes:
        axis.plot(objective.path.log_snr(t), relative, color="#dddddd", linewidth=0.7, zorder=1)
for i, name in enumerate(PAPER_TABLE1):
    objective, axis = objectives[name], axes[0] if name.startswith("rf") else axes[1]
    relative = objective.weight(t) / objective.weight(objective.path.time_at(unit))
    style = ("-", "--", ":")[i % 3]
    axis.plot(objective.path.log_snr(t), relative, label=name, linestyle=style)
for axis in axes:
    axis.set(xlabel=r"$\lambda$ (noise on the left)", yscale="log")
    axis.set(xlim=(-12, 12), ylim=(1e-3, 1e3))
    axis.legend(fontsize=8)
axes[0].set_ylabel(r"$w(\lambda)\,/\,w(-2)$")
figure.tight_layout()
plt.show()

# %% [markdown]
# `rf` and `v/cos` have the same weight, $e^{-\lambda/2}$, and so have `edm/rf` and
# `edm/cos`, which were made to match them. The weight is that of the expected loss; what differs
# is how often a level is drawn, and what the network outputs.

# %%
sigma = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
plain = (-RectifiedFlow().log_snr(sigma) / 2).exp()
for name in ("rf", "v/cos", "edm/rf", "edm/cos", "eps/cos"):
    ratio = objectives[name].weight(objectives[name].path.time_at(sigma)) / plain
    print(f"{name:8} w / e^(-lambda/2) from {ratio.min():.6f} to {ratio.max():.6f}")

# %% [markdown]
# ## Where samplers stop
#
# Every prediction converts to the velocity $\epsilon - x_0$ of the straight path, so that one
# sampler serves all 61. Families have customary grids, shown here on the straight path's clock at
# ten steps. Paths that keep some signal at t = 1, or explode, start below $\sigma = 1$.

# %%
shown = ["rf", "v/cos", "eps/linear", "edm(-1.20,1.20)", "edm/rf"]
figure, axis = plt.subplots(figsize=(9, 2.4))
for i, name in enumerate(shown):
    times = objectives[name].times(10)
    axis.plot(times, [i] * len(times), "o-", linewidth=0.8)
    print(f"{name:16} {type(objectives[name].grid).__name__:12}", times.numpy().round(4))
axis.set_yticks(range(len(shown)), shown)
axis.set(xlabel=r"$\sigma$ (data on the left)", ylim=(-0.5, len(shown) - 0.5))
figure.tight_layout()
plt.show()

# %% [markdown]
# ## The shift
#
# More pixels need more noise to hide the same image. From n to m pixels (Eq. 23)
#
# $$t_m = \frac{\alpha\, t_n}{1 + (\alpha - 1)\, t_n}, \qquad \alpha = \sqrt{m/n},$$
#
# which moves the log-SNR by $-2 \log \alpha$. One object serves training and sampling. The paper
# uses $\alpha = 3$ at 1024 x 1024.

# %%
figure, axes = plt.subplots(1, 3, figsize=(14, 3.4))
straight = RectifiedFlow()
for alpha in (1.0, 1.5, 3.0, 6.0):
    shift = Shift(alpha=alpha)
    rf = instantiate(OmegaConf.merge(families["rf_lognorm"], {"shift": {"alpha": alpha}}))
    axes[0].plot(t, shift(t), label=rf"$\alpha$ = {alpha:g}")
    axes[1].plot(t, rf.density(t))
    moved = straight.log_snr(shift(t)) - straight.log_snr(t)
    print(f"alpha {alpha:g}: log-SNR moves by {moved.min():.4f} to {moved.max():.4f}")
for name, shift in {
    "alpha = 1": Shift(alpha=1.0),
    "alpha = 3": Shift(alpha=3.0),
    "alpha = 3, as published": PublishedShift(alpha=3.0),
}.items():
    axes[2].plot(range(29), shift.grid(28), "o-", markersize=3, label=name)
    print(f"{name:24} last level before 0: {shift.grid(28)[-2]:.4f}")
axes[0].set(xlabel="t", ylabel="shifted t")
axes[1].set(xlabel="t", ylabel=r"$\pi(t)$ of lognorm(0.00,1.00)")
axes[2].set(xlabel="step of 28", ylabel=r"$\sigma$")
axes[0].legend(fontsize=8)
axes[2].legend(fontsize=8)
figure.tight_layout()
plt.show()
