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
# # A tour of the architecture
#
# Figure 2 of the paper ([arXiv 2403.03206](https://arxiv.org/abs/2403.03206)), one line at a
# time, on the toy model, which has the classes of SD3 with smaller sizes. Then the published sizes,
# and a comparison of the backbones of Figure 4.
#
# The weights are freshly initialized: nothing here has been trained.

# %%
import matplotlib.pyplot as plt
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from mmdit.cli import CONFIGS
from mmdit.cli.build import build_pipeline, count
from mmdit.metrics.attention import watched
from mmdit.metrics.flops import counted_flops
from mmdit.models.blocks import joint_attention
from mmdit.models.matching import matched
from mmdit.nn.embeddings import sinusoid
from mmdit.nn.modulation import modulate
from mmdit.parity.random_weights import models_of_size
from mmdit.pipeline import from_pixels
from mmdit.registry import describe

torch.set_grad_enabled(False)

with initialize_config_dir(str(CONFIGS), version_base=None):
    config = compose("train")  # what `python train.py` builds
pipe = build_pipeline(config).eval()
for name in ("mmdit", "text", "autoencoder"):
    print(f"{name:12} {type(getattr(pipe, name)).__name__:16} {count(getattr(pipe, name)):>9,}")
describe(pipe.mmdit)

# %% [markdown]
# ## The inputs of the network
#
# **Text** (App. B.2). Each CLIP gives hidden states and a pooled vector, T5 hidden states.
#
# - `c_vec`: the pooled vectors side by side. Published: 768 + 1280 = 2048.
# - `c_ctxt`: the hidden states of the two CLIPs side by side, zero-padded to T5's width, then those
#   of T5 after them along the sequence. Published: (77 + 77) x 4096.

# %%
prompts = ["a red circle above a blue square", "a green triangle"]
condition = pipe.text.encode(prompts)
for name, encoder in zip(("CLIP-L", "CLIP-G", "T5"), pipe.text.encoders, strict=True):
    print(f"{name:7} {encoder.length} tokens of {encoder.width}, pooled {encoder.pooled_width}")
print("c_vec ", tuple(condition.c_vec.shape))
print("c_ctxt", tuple(condition.c_ctxt.shape))

# %% [markdown]
# **Image.** The autoencoder encodes the image to a normalized latent; the path mixes it with
# noise, $z_t = a_t x_0 + b_t \epsilon$ (Eq. 1). At t = 0 there is only data, at t = 1 only noise.

# %%
data = instantiate(config.data).view("validation")
pixels, captions, _ = data.batch(range(2))
x_0 = pipe.autoencoder.encode(from_pixels(pixels))
epsilon = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
t = torch.tensor([0.3, 0.8])
z_t = pipe.objective.path.interpolate(x_0, epsilon, t)
print("pixels", tuple(pixels.shape), "-> latent", tuple(x_0.shape))

# %% [markdown]
# ## The vector y
#
# $y = \mathrm{MLP}(\mathrm{sinusoid}(t)) + \mathrm{MLP}(c_\mathrm{vec})$ steers every block. The
# sinusoid is the only place where time is multiplied by 1000.

# %%
net = pipe.mmdit
y = net.vector(t, condition.c_vec)
print("sinusoid", tuple(sinusoid(t).shape), "-> y", tuple(y.shape))

plt.figure(figsize=(7, 2.2))
plt.imshow(sinusoid(torch.linspace(0, 1, 400)).T, aspect="auto", cmap="RdBu", extent=(0, 1, 256, 0))
plt.xlabel("t")
plt.ylabel("cosines, then sines")
plt.show()

# %% [markdown]
# ## Tokens
#
# Text goes through one linear layer. The latent is cut into 2 x 2 patches, which go through
# another, and get fixed 2D sin-cos positions from the middle of a stored table, so that images of
# other sizes and shapes keep the same centre (Sec. 5.3.2).

# %%
c = net.text_tokens(condition.c_ctxt)
x = net.image_tokens(z_t)
rows, columns = net.grid(*z_t.shape[-2:])
print("text ", tuple(condition.c_ctxt.shape), "->", tuple(c.shape))
print("image", tuple(z_t.shape), f"-> {rows} x {columns} patches ->", tuple(x.shape))
print("position table", tuple(net.positions.shape))

centre = net.positions.shape[0] // 2
plt.figure(figsize=(4, 3))
plt.imshow(net.positions @ net.positions[centre, centre])
plt.title("inner product with the middle position", fontsize=9)
plt.colorbar()
plt.show()

# %% [markdown]
# ## A joint block
#
# Two streams with separate weights, which meet in one attention (Fig. 2b). A new block is the
# identity, because its gates start at zero (adaLN-zero):

# %%
block = net.blocks[0]
text, image = block.text, block.image
c_after, x_after = block(c, x, y)
print("text as before:", torch.equal(c_after, c), " image as before:", torch.equal(x_after, x))

# %% [markdown]
# So the gates are opened by hand here to make the block do something. Six vectors per stream
# follow from y: shift, scale and gate, for attention and for the MLP.

# %%
torch.manual_seed(0)
for layer in net.layers:
    for stream in (layer.text, layer.image):
        torch.nn.init.normal_(stream.modulation.linear.weight, std=0.3)

c_shift1, c_scale1, c_gate1, c_shift2, c_scale2, c_gate2 = text.modulation(y)
x_shift1, x_scale1, x_gate1, x_shift2, x_scale2, x_gate2 = image.modulation(y)
print("each", tuple(x_gate1.shape))

# %% [markdown]
# LayerNorm without affine, modulation, Q, K and V of each stream with its own weights; SD3.5 also
# normalizes Q and K here (`qk_norm`). Then one attention over both sequences at once:

# %%
c_heads = text.attention_in(modulate(text.norm1(c), c_shift1, c_scale1))
x_heads = image.attention_in(modulate(image.norm1(x), x_shift1, x_scale1))
print("Q of text", tuple(c_heads.q.shape), " Q of image", tuple(x_heads.q.shape))

c_attended, x_attended = joint_attention(c_heads, x_heads)
c1 = c + c_gate1 * text.attention_out(c_attended)
x1 = x + x_gate1 * image.attention_out(x_attended)

# %% [markdown]
# Then the MLP of each stream. That is the whole block; calling it computes the same:

# %%
c2 = c1 + c_gate2 * text.mlp(modulate(text.norm2(c1), c_shift2, c_scale2))
x2 = x1 + x_gate2 * image.mlp(modulate(image.norm2(x1), x_shift2, x_scale2))

c_after, x_after = block(c, x, y)
print("equal:", torch.equal(c2, c_after), torch.equal(x2, x_after))
print("parameters of the block", f"{count(block):,}")
for stream in (text, image):
    for name, part in stream.named_children():
        print(f"  {name:14} {count(part):>9,}")

# %% [markdown]
# ## To the output
#
# The last block's text is read by the image and goes no further. The image tokens are modulated
# once more, each becomes the values of its patch, and the patches a latent: a prediction of the
# shape of $z_t$, here of the velocity $\epsilon - x_0$.
#
# An untrained network predicts exactly zero, because its last layer starts at zero; the loss then
# begins at $E\,\|\epsilon - x_0\|^2$.

# %%
for block in net.blocks:
    c, x = block(c, x, y)
x = net.last_block(c, x, y)
prediction = net.prediction(x, y, *z_t.shape[-2:])
print("image tokens", tuple(x.shape), "-> prediction", tuple(prediction.shape))
print("equal to net(...):", torch.equal(prediction, net(z_t, t, condition.c_vec, condition.c_ctxt)))
print("largest value:", prediction.abs().max().item())

# %% [markdown]
# `watched` sees every attention of a network while it runs: the largest logit, and the entropy of
# the attention (Fig. 5; `eval/attention.py` measures it on runs and on public weights).

# %%
with watched(net) as record:
    net(z_t, t, condition.c_vec, condition.c_ctxt)
for seen in record.blocks():
    print(seen)

# %% [markdown]
# ## The published sizes
#
# Depth d decides everything: width 64 d, d heads of 64 (Sec. 4). The models are built on the meta
# device, where weights have shapes but no memory. Operations are those of one forward
# pass for 1024 x 1024 pixels and 154 tokens of text, two for each multiply-add, without guidance.

# %%
at = {"height": 128, "width": 128, "text_length": 154}
for name in ("sd3-medium", "sd3.5-medium", "sd3.5-large"):
    big = models_of_size(name, ["mmdit"])["mmdit"]
    print(f"{name:13} {count(big):>13,} parameters, {big.flops(**at) / 1e12:5.1f} TFLOPs")
    print(f"{'':13} {big.positions.numel():>13,} values in the position table, which is fixed")
    for part, module in big.named_children():
        print(f"{'':15} {part:20} {count(module) / count(big):6.2%}")

# %% [markdown]
# The paper's depths. Attention grows with the square of the number of tokens, everything else
# linearly.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
pixels = [256, 512, 768, 1024, 1536]
for name in ("d15", "d18", "d21", "d24", "d30", "d38"):
    with initialize_config_dir(str(CONFIGS), version_base=None), torch.device("meta"):
        depth = instantiate(compose(f"model/{name}").model)
    flops = [depth.flops(height=s // 8, width=s // 8, text_length=154) / 1e12 for s in pixels]
    axes[0].plot(count(depth) / 1e9, flops[pixels.index(1024)], "o", label=name)
    axes[1].plot(pixels, flops, "o-", label=f"{name}: {count(depth) / 1e9:.2f}B")
axes[0].set(xlabel="billion parameters", ylabel="TFLOPs at 1024 x 1024")
axes[1].set(yscale="log", xlabel="side of the image in pixels", ylabel="TFLOPs")
axes[1].set_xticks(pixels)
axes[0].legend(fontsize=8)
axes[1].legend(fontsize=8)
figure.tight_layout()
plt.show()

# %% [markdown]
# ## The backbones of Figure 4
#
# All share the vector y, the tokens, the positions and the output; they differ in how text and
# image meet.
#
# | class | how |
# |---|---|
# | `DiT` | text and image tokens in one sequence, one set of weights |
# | `CrossDiT` | image tokens only; they read the text by cross-attention |
# | `UViT` | the DiT between convolutions at the latent's resolution, with skip connections |
# | `MMDiT` | two sets of weights, one attention |
# | `MMDiT` with `dual_attention` | MMDiT-X of SD3.5 Medium: a second attention among image tokens |
# | `MMDiTThree` | three sets of weights: image, CLIP's tokens, T5's tokens |
#
# At the toy's depth and width they differ in cost. `match=flops` (or `params`) of `train.py`
# changes the width until they do not, so that a comparison is of architectures
# (`mmdit.models.matching`). The operations are also counted, by running each network on shapes
# alone; both ways agree.

# %%
names = ["toy_dit", "toy_cross_dit", "toy_uvit", "toy", "toy_mmdit_x", "toy_mmdit_three"]
sizes = {
    "latent_channels": net.latent_channels,
    "context_width": net.context_width,
    "pooled_width": net.pooled_width,
}
at = {"height": 8, "width": 8, "text_length": pipe.text.context_length}
with initialize_config_dir(str(CONFIGS), version_base=None), torch.device("meta"):
    backbones = {name: instantiate(compose(f"model/{name}").model, **sizes) for name in names}

print(f"{'':16} {'parameters':>11} {'MFLOPs':>7} {'counted':>8}   at equal FLOPs: width, mlp_ratio")
for name, backbone in backbones.items():
    found = matched(backbone, backbones["toy"], by="flops", **at)
    print(
        f"{name:16} {count(backbone):>11,} {backbone.flops(**at) / 1e6:>7.1f}"
        f" {counted_flops(backbone, **at) / 1e6:>8.1f}   {found.width:>21}, {found.mlp_ratio}"
    )

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 2.6), sharey=True)
axes[0].barh(names, [count(backbone) / 1e6 for backbone in backbones.values()])
axes[0].set_xlabel("million parameters")
axes[1].barh(names, [backbone.flops(**at) / 1e6 for backbone in backbones.values()])
axes[1].set_xlabel("MFLOPs of one forward pass")
figure.tight_layout()
plt.show()
