"""Export a run's weights to one file: `python -m mmdit.export runs/shapes-001 shapes.safetensors`.

The file includes its own description and can be used wherever a run folder can (`sample.py
checkpoint=`, `mmdit.load_pipeline`). The public layouts are for other programs; a model that has
none is rejected. Public weights are exported, too, to be quantized:
`python -m mmdit.export sd3.5_medium.safetensors medium.gguf --format gguf --quantized Q8_0`.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from mmdit.adapters import DIALECTS, Adapter, write_adapter
from mmdit.adapters.adapter import adapter_in
from mmdit.checkpoints.building import expect_finite_weights
from mmdit.checkpoints.gguf_writing import WRITTEN
from mmdit.checks import one_of
from mmdit.errors import UserError, path_trouble
from mmdit.loading import load_pipeline, open_source
from mmdit.models.mmdit import MMDiT
from mmdit.models.t5 import T5Encoder
from mmdit.printable import show
from mmdit.published import FP8, save_diffusers, save_gguf, save_single_file, with_tokenizers
from mmdit.runs.checkpoint import WEIGHTS, read_weights
from mmdit.runs.native import save_tensors
from mmdit.streams import guarded

FORMATS = ("native", "single_file", "diffusers", "gguf")
QUANTIZED = {"gguf": WRITTEN, "single_file": FP8}
NETWORKS: dict[str, type[nn.Module]] = {"mmdit": MMDiT, "t5": T5Encoder}


def export(source: Path, out: Path, *, weights: str = "ema", form: str = "native") -> Path:
    """Export the weights of a run or a checkpoint; written completely or not at all.

    Args:
        source: run folder or checkpoint folder.
        out: a .safetensors file; a folder for 'diffusers'.
        weights: 'ema' or 'raw'.
        form: 'native' keeps everything; 'single_file' and 'diffusers' are the public layouts, with
            a warning about what other programs would misread.

    Returns:
        `out`.

    Raises:
        UserError: the source does not exist, is damaged or contains NaN; the model does not have
            this layout; `out` cannot be written.
    """
    if source.is_file():
        raise UserError(f"{source} is a file already: give a run folder or a checkpoint folder")
    if form != "diffusers" and out.suffix != ".safetensors":
        raise UserError(f"{out} must end in .safetensors")
    opened = read_weights(source, weights)
    if opened.description.get("class") == Adapter.__name__:
        raise UserError(
            f"{source} is an adapter: choose the program that is to read it with --dialect "
            f"{', '.join(DIALECTS)}"
        )
    try:
        if form == "native":
            expect_finite_weights(opened.tensors, opened.path)
            description = with_tokenizers(opened.description, source, asked=False)
            save_tensors(out, opened.tensors, {"description": description})
        elif form == "single_file":
            save_single_file(opened.module(), out)
        else:
            save_diffusers(opened.module(), out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from error
    return out


def export_quantized(
    source: str | Path,
    out: Path,
    *,
    form: str,
    quantized: str,
    part: str = "mmdit",
    weights: str = "ema",
) -> Path:
    """Export one network with its weights in fewer bits; written completely or not at all.

    Args:
        source: a run, or any source of public weights, as in `mmdit.load_pipeline`.
        out: a .gguf file for 'gguf', a .safetensors file for 'single_file'.
        form: 'gguf' or 'single_file'.
        quantized: 'Q8_0', 'Q5_1', 'Q4_0' or 'BF16' in a GGUF file; 'scaled_fp8' or 'fp8' in a
            single file.
        part: 'mmdit' or 't5'.
        weights: 'ema' or 'raw', of a run.

    Returns:
        `out`.

    Raises:
        UserError: the source has no such network or the format no such type; or as in `save_gguf`.
    """
    one_of("part", part, NETWORKS)
    if quantized not in QUANTIZED.get(form, ()):
        listed = "; ".join(f"--format {name}: {', '.join(of)}" for name, of in QUANTIZED.items())
        raise UserError(f"--format {form} has no --quantized {quantized}. There are {listed}")
    opened = open_source(source, [part], weights=weights)
    network = opened.part(part, NETWORKS[part])
    if form == "gguf":
        return save_gguf(network, out, quantized=quantized)
    return save_single_file(network, out, quantized=quantized)


def export_adapter(source: Path, out: Path, *, dialect: str, weights: str = "ema") -> Path:
    """Export the adapter of a run as another program reads it; see `write_adapter`.

    Args:
        source: run folder or checkpoint folder of an adapter, or an adapter file in any spelling.
        out: a .safetensors file; a folder for 'peft'.
        dialect: one of `DIALECTS`.
        weights: 'ema' or 'raw'.

    Returns:
        `out`.

    Raises:
        UserError: the source is not an adapter, the model that it was trained on is gone, or `out`
            cannot be written.
    """
    pipe = load_pipeline(source, weights=weights)
    if not pipe.adapters:
        raise UserError(f"{source} is not an adapter: leave --dialect out")
    (name,) = pipe.adapters
    adapter = adapter_in(pipe, name, read_weights(source, weights).description["base"])
    return write_adapter(adapter, out, dialect=dialect, root=pipe)


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake gives one line and exit code 2."""
    logging.basicConfig(format="%(message)s")
    parser = argparse.ArgumentParser(prog="python -m mmdit.export", description=__doc__)
    parser.add_argument("source", help="run or checkpoint folder; public weights to quantize them")
    parser.add_argument(
        "out", type=Path, help="a .safetensors or .gguf file; a folder for diffusers"
    )
    parser.add_argument("--weights", choices=WEIGHTS, default="ema", help="averaged or as trained")
    parser.add_argument("--format", choices=FORMATS, default="native", dest="form")
    parser.add_argument(
        "--quantized",
        choices=[*WRITTEN, *FP8],
        help="type of the weights in a gguf (default Q8_0) or a single_file (default: as they are)",
    )
    parser.add_argument("--part", choices=NETWORKS, default="mmdit", help="of what is quantized")
    parser.add_argument("--dialect", choices=DIALECTS, help="of an adapter: who is to read it")
    given = parser.parse_args(words)
    source, out, weights = Path(given.source), given.out, given.weights
    quantized = given.quantized or ("Q8_0" if given.form == "gguf" else None)
    try:
        with guarded():
            if given.dialect is not None:
                show(export_adapter(source, out, dialect=given.dialect, weights=weights))
            elif quantized is not None:
                options = {"form": given.form, "part": given.part, "weights": weights}
                show(export_quantized(given.source, out, quantized=quantized, **options))
            else:
                show(export(source, out, weights=weights, form=given.form))
    except (UserError, OSError) as error:
        trouble = path_trouble(error) if isinstance(error, OSError) else str(error)
        if trouble is None:
            raise
        show(trouble, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
