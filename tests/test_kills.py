"""A saving killed at any moment leaves what was there, or all that it writes; the next clears up.

The fast tests kill at chosen changes of the file system's names, the slow ones at random moments.
"""

import random
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import mmdit
import mmdit.export
from mmdit.data import pack
from mmdit.data.caption_sources import Sidecars
from mmdit.data.folder import FolderListing
from mmdit.models.autoencoder import Autoencoder
from tests.checkpoints_for_tests import write_checkpoint
from tests.kills_for_tests import changes_of, content, killed_at, killed_at_random

FAST, SLOW = 4, 50  # kills of each kind of saving


class Saving(NamedTuple):
    """Something to write into a folder, and what was there before."""

    save: Callable[[Path], object]
    before: Path | None = None  # a folder; None is none
    begun: bool = False  # whether what is finished stays, and the same saving goes on with it


@pytest.fixture(scope="module")
def savings(tmp_path_factory, tiny_published) -> dict[str, Saving]:
    """By name; each writes into a folder that it is given."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("kills")
    pipe = mmdit.load_pipeline(tiny_published)
    shutil.copytree(tiny_published, root / "old" / "pipe")
    (root / "old" / "pipe" / "lora" / "deep").mkdir(parents=True)
    (root / "old" / "pipe" / "lora" / "deep" / "notes.txt").write_text("mine")
    (root / "old" / "pipe" / "link").symlink_to("lora")
    with torch.no_grad():
        for weight in pipe.parameters():
            weight += 1
    (root / "photos").mkdir()
    for i in range(9):
        noise = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "photos" / f"{i}.png")
        (root / "photos" / f"{i}.txt").write_text("noise")
    photos = FolderListing(root=root / "photos", captions=Sidecars(), kinds=("text",))
    model = Autoencoder(latent_channels=4, width=32, multipliers=[1], blocks=0)
    (root / "run").mkdir()
    write_checkpoint(root / "run", 1, {"ema": model, "raw": model})
    (root / "file").mkdir()
    (root / "file" / "x.safetensors").write_bytes(b"old")
    return {
        "a new pipeline": Saving(lambda to: mmdit.save_diffusers(pipe, to / "pipe")),
        "over an old pipeline": Saving(
            lambda to: mmdit.save_diffusers(pipe, to / "pipe"), root / "old"
        ),
        "a single file": Saving(
            lambda to: mmdit.save_single_file(pipe.mmdit, to / "x.safetensors"), root / "file"
        ),
        "an export": Saving(
            lambda to: mmdit.export.export(root / "run", to / "x.safetensors"), root / "file"
        ),
        "shards": Saving(lambda to: pack.pack(photos, to / "out", per_shard=3), begun=True),
    }


NAMES = ("a new pipeline", "over an old pipeline", "a single file", "an export", "shards")


def place_for(saving: Saving, place: Path) -> Path:
    """A new folder with what was there before."""
    if saving.before is None:
        place.mkdir()
    else:
        shutil.copytree(saving.before, place, symlinks=True)
    return place


def seen(place: Path) -> dict[str, bytes | str]:
    """What somebody sees who looks into a folder."""
    found = content(place)
    return {
        name: value
        for name, value in found.items()
        if not name.startswith(".") and "/." not in name and not name.endswith("index.jsonl")
    }


def assert_old_or_new(saving: Saving, found: dict, old: dict, new: dict) -> None:
    if saving.begun:
        assert all(value == new[name] for name, value in found.items() if name.endswith(".tar"))
    elif found:  # where nothing was, the folder itself may be all there is
        assert found in (old, new)
    else:
        assert not old


def check(
    saving: Saving, place: Path, kills: Sequence[Callable[[Callable[[], object]], object]]
) -> None:
    """After each kill all is old or new; after another saving all is new, and nothing else."""
    saving.save(place_for(saving, place))
    new = seen(place)
    for kill in kills:
        shutil.rmtree(place)
        old = seen(place_for(saving, place))
        assert old != new
        kill(lambda: saving.save(place))
        assert_old_or_new(saving, seen(place), old, new)
        saving.save(place)
        assert seen(place) == new
        assert not [name for name in content(place) if name.endswith(".tmp") or ".tmp/" in name]


@pytest.mark.few(2)
@pytest.mark.parametrize("name", NAMES)
def test_killed_before_a_change_a_saving_leaves_old_or_new(savings, tmp_path, name):
    saving = savings[name]
    total = changes_of(lambda: saving.save(place_for(saving, tmp_path / "counted")))
    moments = [1 + i * (total - 2) // (FAST - 1) for i in range(FAST)]
    check(saving, tmp_path / "place", [partial(killed_at, moment) for moment in moments])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_fifty_moments_a_saving_leaves_old_or_new(savings, tmp_path, name):
    saving, draw = savings[name], random.Random(0)
    total = changes_of(lambda: saving.save(place_for(saving, tmp_path / "counted")))
    began = time.perf_counter()
    saving.save(place_for(saving, tmp_path / "timed"))
    seconds = time.perf_counter() - began
    chosen = [partial(killed_at, i * total // (SLOW // 2)) for i in range(SLOW // 2)]
    by_chance = [partial(killed_at_random, draw, 1.2 * seconds)] * (SLOW // 2)
    check(saving, tmp_path / "place", chosen + by_chance)
