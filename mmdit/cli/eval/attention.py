"""Attention logits and attention entropy of each block (Figure 5).

Protocol `attention-1`: images of the validation split, rendered at each image size, are encoded,
noised to each level of t with noise keyed by (seed, index), and given to the network with their
captions, without dropping encoders. Reported for each block: the largest logit, and the entropy
averaged over heads, queries and samples; and their means over the last five blocks, as in the
paper. With random=, weights, latents and text states are random.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import mmdit
from mmdit.atomic import file_hash
from mmdit.checks import one_of, seed_number, whole_number
from mmdit.cli.eval.subject import made, numbers, results_folder, shapes_for, table, write_results
from mmdit.cli.launch import Verbatim, launch
from mmdit.cli.subject import PARTS, Subject, open_subject
from mmdit.devices import available
from mmdit.errors import UserError
from mmdit.keys import generator_for
from mmdit.metrics.attention import BlockAttention, attention_at, last_blocks, watched
from mmdit.models.backbone import Backbone
from mmdit.parity.random_weights import SIZES, models_of_size, write_random
from mmdit.pipeline import to_latents
from mmdit.plots import plot_image, png
from mmdit.precision import chosen_dtype

PROTOCOL = "attention-1"
VERBATIM = ("checkpoint", "out", *PARTS)
FACTOR = 8  # pixels per latent position of the published autoencoders, for random=

Look = Callable[[int, Sequence[float]], list[BlockAttention]]  # (image size, levels of t)


class Watched(NamedTuple):
    """A model to measure: facts for the report, its image size in training, and how to run it."""

    facts: dict[str, Any]
    image_size: int
    look: Look
    out: Path


def job(config: DictConfig, text: Verbatim) -> None:
    """Check the config, build the model, measure attention, write the results."""
    levels = numbers(config, "levels", "times above 0, up to 1", low=0.0, high=1.0)
    for key, least in (("samples", 1), ("batch_size", 1), ("text_length", 1)):
        whole_number(key, config[key], least)
    seed_number("seed", config.seed)
    if config.image_sizes is not None:
        numbers(config, "image_sizes", "sides in pixels", low=0, high=float("inf"))
    if config.random and "checkpoint" in text:
        raise UserError("give either checkpoint=<weights> or random=<size>")
    thing = random_network(config, text) if config.random else trained(config, text)
    report: dict[str, Any] = {
        "protocol": PROTOCOL,
        **thing.facts,
        "seed": config.seed,
        "samples": config.samples,
        "sizes": {},
    }
    sizes = [thing.image_size] if config.image_sizes is None else list(config.image_sizes)
    for size in tqdm(sizes, desc="measuring", unit="size", disable=None):
        seen = {f"t={t:g}": thing.look(size, [t]) for t in levels}
        if len(levels) > 1:
            seen["all t"] = thing.look(size, levels)
        report["sizes"][str(size)] = {
            name: [block._asdict() for block in (*blocks, last_blocks(blocks))]
            for name, blocks in seen.items()
        }
    plots = {f"-{figure}.png": png(image) for figure, image in curves_of(report).items()}
    write_results(thing.out, "attention", report, as_markdown(report), plots)


def trained(config: DictConfig, text: Verbatim) -> Watched:
    """A run's model or public weights, on images of shapes."""
    subject = open_subject(config, text)
    out = results_folder(text, subject.path, "attention")
    look = partial(look_at_shapes, subject, config)
    return Watched(subject.facts, subject.pipe.image_size, look, out)


@torch.no_grad()
def look_at_shapes(
    subject: Subject, config: DictConfig, size: int, levels: Sequence[float]
) -> list[BlockAttention]:
    """Attention on captioned images rendered at this size."""
    pipe = subject.pipe
    pipe.latent_size(size, size)
    data = shapes_for(subject.run, config, "validation", image_size=size)
    latents, captions = [], []
    for start in range(0, config.samples, config.batch_size):
        indices = range(start, min(start + config.batch_size, config.samples))
        images, texts, _ = data.batch(indices)
        with subject.autocast():
            latents.append(to_latents(pipe.autoencoder, images))
        captions += texts
    options = {"levels": levels, "seed": config.seed, "batch_size": config.batch_size}
    with subject.autocast():
        return attention_at(pipe, torch.cat(latents), captions, **options)


def random_network(config: DictConfig, text: Verbatim) -> Watched:
    """A transformer of a published size with random weights, on random inputs."""
    one_of("random", config.random, SIZES)
    device = available(config.device)
    with tempfile.TemporaryDirectory(prefix="mmdit-attention-") as folder:
        models = models_of_size(config.random, ["mmdit"])
        files = write_random(models, Path(folder), seed=config.seed, name=config.random)
        network = mmdit.load_mmdit(files["mmdit"], dtype=chosen_dtype(device, config.precision))
        network.to(device)
        facts = {
            "weights": f"random weights, {config.random}",
            "weights_sha256": file_hash(files["mmdit"]),
        }
    out = made(Path(text.get("out") or Path("results") / f"attention-{config.random}"))
    side = min(1024, FACTOR * network.longest_side)
    return Watched(facts, side, partial(look_at_noise, network, config), out)


@torch.no_grad()
def look_at_noise(
    network: Backbone, config: DictConfig, size: int, levels: Sequence[float]
) -> list[BlockAttention]:
    """Attention on normally distributed latents, pooled vectors and text states."""
    device = network.device
    if size % (FACTOR * network.patch_size):
        raise UserError(f"image_sizes: {size} must be a multiple of {FACTOR * network.patch_size}")

    def noise(what: str, shape: Sequence[int], keys: Sequence[int]) -> Tensor:
        draws = [torch.randn(*shape, generator=generator_for(config.seed, what, i)) for i in keys]
        return torch.stack(draws).to(device)

    latent = (network.latent_channels, size // FACTOR, size // FACTOR)
    with watched(network) as record:
        for start in range(0, config.samples, config.batch_size):
            keys = range(start, min(start + config.batch_size, config.samples))
            z_t, c_vec = noise("z", latent, keys), noise("c", (network.pooled_width,), keys)
            c_ctxt = noise("context", (config.text_length, network.context_width), keys)
            for level in levels:
                t = torch.full((len(keys),), level, device=device)
                network(z_t, t, c_vec, c_ctxt)
    return record.blocks()


FIGURES = {
    "max_logit": "largest attention logit",
    "entropy": "attention entropy, nats",
    "normalized_entropy": "attention entropy over its maximum",
}


def curves_of(report: dict[str, Any]) -> dict[str, Image.Image]:
    """One plot per statistic, with a curve over the blocks for each size and level."""
    drawn = {}
    for figure, label in FIGURES.items():
        curves = {}
        for size, seen in report["sizes"].items():
            shown = seen if len(report["sizes"]) == 1 else {"": list(seen.values())[-1]}
            for name, rows in shown.items():
                values = [row[figure] for row in rows[:-1]]
                curves[f"{size} px {name}"] = list(enumerate(values))
        drawn[figure] = plot_image(curves, x_label="block", y_label=label)
    return drawn


def as_markdown(report: dict[str, Any]) -> str:
    """Tables of each block's statistics over all levels, and of the last blocks' at each level."""
    head = (
        f"{report['protocol']}: {report['weights']}, sha256 {report['weights_sha256'][:16]}, "
        f"{report['samples']} samples, seed {report['seed']}\n"
    )
    parts = [head]
    for size, seen in report["sizes"].items():
        name, blocks = list(seen.items())[-1]
        header = (f"{size} px, {name}", "largest logit", "entropy", "over log n")
        parts.append(table(header, [tuple(row.values()) for row in blocks]))
        header = (f"{size} px, {blocks[-1]['block']} blocks", *header[1:])
        rows = [(level, *list(rows[-1].values())[1:]) for level, rows in seen.items()]
        parts.append(table(header, rows))
    return "\n".join(parts)


def main() -> None:
    """Run the evaluation according to the command line."""
    launch(job, config_name="attention", verbatim=VERBATIM)
