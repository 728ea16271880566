"""Whatever is changed in a file that we wrote is reported, or changes nothing. `pytest -m slow`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import mmdit
from mmdit.errors import UserError
from mmdit.export import export
from mmdit.models.autoencoder import Autoencoder
from mmdit.processes import Processes
from mmdit.registry import describe
from mmdit.runs.checkpoint import read_weights
from mmdit.runs.native import save_module
from mmdit.runs.retention import Retention
from mmdit.runs.saving import Saver

pytestmark = pytest.mark.slow


def run(model: nn.Module, folder: Path) -> Path:
    states = {kind: dict(model.state_dict()) for kind in ("raw", "ema")}
    described = dict.fromkeys(states, describe(model))
    with Saver(folder / "run", Processes(), keep=Retention(last=1), config={}) as saver:
        saver.save(step=1, finished=True, tensors=states, descriptions=described, metrics={})
    return folder / "run"


def save_export(model: nn.Module, folder: Path) -> Path:
    return export(run(model, folder), folder / "x.safetensors")


def save_own(model: nn.Module, folder: Path) -> Path:
    save_module(folder / "x.safetensors", model)
    return folder / "x.safetensors"


KINDS: dict[str, tuple[Callable[[nn.Module, Path], Path], str]] = {
    "export": (save_export, "x.safetensors"),
    "module": (save_own, "x.safetensors"),
    "single file": (
        lambda model, folder: mmdit.save_single_file(model, folder / "x.safetensors"),
        "x.safetensors",
    ),
    "diffusers": (
        lambda model, folder: mmdit.save_diffusers(model, folder / "vae"),
        "vae/diffusion_pytorch_model.safetensors",
    ),
    "run": (run, "run/checkpoints/*/ema/*.safetensors"),
    "manifest": (run, "run/checkpoints/*/manifest.json"),
}


def mutations(whole: bytes) -> list[bytes]:
    """Fifteen: flipped bits in header and content, cuts, additions, zeros, NaN, exchanged parts."""
    size = len(whole)
    header = min(size, 8 + int.from_bytes(whole[:8], "little"))
    places = [0, 9, header // 3, header // 2, header - 1, size // 2, size * 2 // 3, size - 1]
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in places]
    middle = (size // 2) // 4 * 4
    return [
        *flipped,
        whole[:-1],
        whole[:middle],
        whole + b"\0",
        b"",
        whole[:middle] + bytes(256) + whole[middle + 256 :],
        whole[:middle] + b"\xff\xff\xff\x7f" * 8 + whole[middle + 32 :],
        whole[: -(size // 4)] + whole[-(size // 8) :] + whole[-(size // 4) : -(size // 8)],
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_no_change_is_silent(
    kind: str, tmp_path: Path, randomize: Callable[[nn.Module, int], nn.Module]
) -> None:
    save, pattern = KINDS[kind]
    model = randomize(Autoencoder(latent_channels=16, width=32, multipliers=[1, 2], blocks=1), 1)
    source = save(model, tmp_path)
    (file,) = tmp_path.glob(pattern)
    whole = file.read_bytes()
    expected = mmdit.load_autoencoder(source).state_dict()
    silent = []
    for i, changed in enumerate(mutations(whole)):
        file.write_bytes(changed)
        try:
            found = mmdit.load_autoencoder(source).state_dict()
        except UserError:
            continue
        if found.keys() != expected.keys() or not all(
            torch.equal(found[key], value) for key, value in expected.items()
        ):
            silent.append(i)
    assert silent == []
    file.write_bytes(whole)
    assert read_weights(source) if kind in ("run", "manifest") else source.exists()
