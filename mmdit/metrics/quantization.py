"""What it costs to round the weights of a transformer: `python -m mmdit.metrics.quantization`.

Each type is written to a file and read from it. Errors are relative root mean squares, of all
weights that are rounded, and of the output for random inputs; both sides compute in float32.
Without a source, the network is random: every weight is normal, scaled so that activations keep
their size. Trained weights have outliers, and errors of their outputs differ: measure yours.
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmdit.checkpoints.gguf_writing import WRITTEN
from mmdit.checkpoints.public import exported, matrices_of
from mmdit.checks import whole_number
from mmdit.errors import UserError
from mmdit.keys import generator_for
from mmdit.loading import load_mmdit
from mmdit.models.mmdit import MMDiT
from mmdit.printable import show
from mmdit.published import FP8, save_gguf, save_single_file
from mmdit.streams import guarded


class Cost(NamedTuple):
    """What a type costs: bits of a rounded weight, and the errors of weights and output."""

    kind: str
    bits: float
    weights: float
    output: float


def costs(network: MMDiT, seed: int = 0) -> Iterator[Cost]:
    """The cost of each type that can be written, from the largest to the smallest.

    Args:
        network: in float32.
        seed: of the inputs.
    """
    own = dict(exported(network, "original"))
    matrices = matrices_of(network, "original", "mmdit")
    expected = output(network, seed)
    with tempfile.TemporaryDirectory(prefix="mmdit-quantization-") as folder:
        for kind in ("BF16", *FP8, *(kind for kind in WRITTEN if kind != "BF16")):
            if kind in FP8:
                path = save_single_file(network, Path(folder) / "x.safetensors", quantized=kind)
            else:
                path = save_gguf(network, Path(folder) / "x.gguf", quantized=kind)
            read = load_mmdit(path, dtype=torch.float32)
            assert isinstance(read, MMDiT)
            rounded = {
                key: tensor
                for key, tensor in exported(read, "original")
                if key in matrices and not torch.equal(tensor, own[key])
            }
            count = sum(own[key].numel() for key in rounded)
            kept = sum(tensor.nbytes for key, tensor in own.items() if key not in rounded)
            error = sum(float((t - own[key]).square().sum()) for key, t in rounded.items())
            whole = sum(float(own[key].square().sum()) for key in rounded)
            yield Cost(
                kind,
                8 * (path.stat().st_size - kept) / count,
                (error / whole) ** 0.5,
                float((output(read, seed) - expected).norm() / expected.norm()),
            )


@torch.no_grad()
def output(network: MMDiT, seed: int) -> Tensor:
    """The output for random inputs: two latents of 16 x 16, 32 tokens of text."""
    generator = generator_for(seed, "quantization")
    side = min(16, 2 * network.longest_side)
    z, c_vec, c_ctxt = (
        torch.randn(shape, generator=generator)
        for shape in (
            (2, network.latent_channels, side, side),
            (2, network.pooled_width),
            (2, 32, network.context_width),
        )
    )
    return network(z, torch.tensor([0.3, 0.8]), c_vec, c_ctxt)


@torch.no_grad()
def random_network(depth: int, width: int, seed: int = 0) -> MMDiT:
    """An MMDiT with QK-norm whose weights are all drawn anew, no modulation at zero."""
    network = MMDiT(
        depth=depth,
        width=width,
        num_heads=width // 64,
        qk_norm=True,
        context_width=256,
        pooled_width=256,
        position_size=16,
    ).eval()
    generator = generator_for(seed, "weights")
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            parameter.add_(0.1 * noise)
        else:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return network


def as_markdown(rows: Sequence[Cost]) -> str:
    """A table of the costs."""
    lines = ["| type | bits per weight | error of weights | error of output |", "|---|---|---|---|"]
    lines += [
        f"| {row.kind} | {row.bits:.1f} | {row.weights:.2%} | {row.output:.2%} |" for row in rows
    ]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake gives one line and exit code 2."""
    logging.basicConfig(format="%(message)s", level=logging.ERROR)
    parser = argparse.ArgumentParser(
        prog="python -m mmdit.metrics.quantization", description=__doc__
    )
    parser.add_argument("source", nargs="?", help="run, file, folder or hub id; none is random")
    parser.add_argument("--depth", type=int, default=4, help="blocks of the random network")
    parser.add_argument("--width", type=int, default=256, help="its width, a multiple of 64")
    given = parser.parse_args(words)
    try:
        with guarded():
            if given.source is None:
                whole_number("depth", given.depth, least=2)
                if whole_number("width", given.width) % 64:
                    raise UserError(f"width={given.width} must be a multiple of 64")
                network = random_network(given.depth, given.width)
            else:
                loaded = load_mmdit(given.source, dtype=torch.float32)
                if not isinstance(loaded, MMDiT):
                    raise UserError(f"{given.source} holds a {type(loaded).__name__}, not an MMDiT")
                network = loaded
            show(*as_markdown(list(costs(network))).split("\n"))
    except UserError as error:
        show(str(error), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
