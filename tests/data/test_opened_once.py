"""Files are opened once: N images cost N decodes and N reads, for all splits and processes."""

import json
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from mmdit.data.caption_sources import Captions, ClassNames, Sidecars, Table
from mmdit.data.captioned import CaptionedImages, ImageOptions, opener
from mmdit.data.dataset import Batch, CacheableData, Data
from mmdit.data.files import Files
from mmdit.data.folder import FolderListing, image_folder
from mmdit.data.images import Pillow, decode
from mmdit.data.pack import pack
from mmdit.data.shapes import Shapes
from mmdit.data.shards import tar_shards
from mmdit.data.tar import Member
from mmdit.errors import UserError
from mmdit.processes import Processes

from .conftest import encoded, noise

N = 12


@pytest.fixture
def photos(tmp_path, photo) -> Path:
    for i in range(N):
        photo(tmp_path / "photos" / f"{i:02d}.png", f"image {i}\nthe same", width=8 + i, seed=i)
    return tmp_path / "photos"


@pytest.fixture
def counts(monkeypatch) -> Counter[str]:
    """How many images were decoded, and how many files of each suffix were read."""
    found: Counter[str] = Counter()
    decoded, read, read_member = Pillow.open, Path.read_bytes, Member.read

    def counted(file, **options):
        found["decoded"] += 1
        return decoded(file, **options)

    def counted_read(path):
        found[path.suffix] += 1
        return read(path)

    def counted_member(member, file):
        found[Path(member.name).suffix] += 1
        return read_member(member, file)

    monkeypatch.setattr(Pillow, "open", counted)
    monkeypatch.setattr(Path, "read_bytes", counted_read)
    monkeypatch.setattr(Member, "read", counted_member)
    return found


def all_that_precedes_a_step(data: CaptionedImages) -> None:
    for each in (data, data.view("validation"), data.view("train")):
        each.fingerprint()
        each.order(batch_size=2, seed=0)(0, 50)
        each.prompts()


def test_a_folder_is_decoded_and_read_once_for_both_splits(photos, counts):
    all_that_precedes_a_step(image_folder(root=str(photos), captions=Sidecars(), image_size=32))
    assert counts == {"decoded": N, ".png": N, ".txt": N}


def test_shards_are_decoded_and_read_once_for_both_splits(photos, tmp_path, counts):
    listing = FolderListing(root=photos, captions=Sidecars(), kinds=("text",))
    pack(listing, tmp_path / "shards", per_shard=5)
    for index in (tmp_path / "shards").glob("*.index.jsonl"):  # as shards from elsewhere come
        index.unlink()
    counts.clear()
    data = tar_shards(root=str(tmp_path / "shards"), image_size=32)
    all_that_precedes_a_step(data)
    assert counts == {"decoded": N, ".png": N, ".txt": N, ".json": N}
    counts.clear()
    all_that_precedes_a_step(tar_shards(root=str(tmp_path / "shards"), image_size=32))
    assert not counts  # their indices are there now


def captions_of(kind: str, root: Path) -> Sidecars | Table | ClassNames:
    if kind == "table":
        rows = [json.dumps({"file_name": f"{i:02d}.png", "text": "x"}) for i in range(N)]
        (root / "metadata.jsonl").write_text("\n".join(rows))
        return Table()
    return ClassNames() if kind == "class names" else Sidecars()


class Received(Processes):
    """Another process than the main one, that receives what that one made."""

    def __init__(self, made: bytes) -> None:
        super().__init__(rank=1, world_size=2)
        self.made = made

    def broadcast(self, value):
        assert value is None
        return pickle.loads(self.made)


@pytest.mark.parametrize("kind", ["sidecars", "table", "class names"])
def test_another_process_receives_the_data_set_and_decodes_nothing(photos, counts, kind):
    root = photos.parent if kind == "class names" else photos
    captions = captions_of(kind, root)
    main = Processes()
    ours = main.once(lambda: image_folder(root=str(root), captions=captions, image_size=32))
    assert counts["decoded"] == N
    other = Received(pickle.dumps(ours))
    theirs = other.once(lambda: pytest.fail("only the main process opens the folder"))
    assert counts["decoded"] == N
    assert theirs.fingerprint() == ours.fingerprint()
    for split in ("train", "validation"):
        one, two = (data.view(split).batch([0], step=3) for data in (ours, theirs))
        assert one.captions == two.captions and np.array_equal(one.images, two.images)


@pytest.mark.slow
def test_two_processes_decode_each_image_once_between_them(photos, tmp_path):
    script = Path(__file__).with_name("opening_process.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(script), str(photos), str(tmp_path)], capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    facts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [each.pop("decoded") for each in facts] == [N, 0]
    assert facts[0] == facts[1] and len(facts[0]["names"]) == N


# A third kind of source


class InMemory(Files):
    """Images and captions that are in memory: all that a new kind of source takes."""

    def __init__(self, images: Mapping[str, tuple[bytes, str]]) -> None:
        self._images = images
        self.names = sorted(images)
        self.sizes = np.array([decode(images[name][0]).shape[:2] for name in self.names])

    def read(self, index: int) -> tuple[bytes, Captions]:
        data, caption = self._images[self.names[index]]
        return data, {"text": (caption,)}


IMAGES = {f"{i:02d}.png": (encoded(noise(24, 16 + i, i)), f"image {i}") for i in range(N)}
in_memory = opener(InMemory)


def test_a_third_source_is_one_class(counts):
    data = CaptionedImages(InMemory(IMAGES), ImageOptions(image_size=32, crop="centre"))
    held_back = data.view("validation")
    assert counts["decoded"] == N
    assert sorted([*data.names, *held_back.names]) == list(IMAGES)
    order = data.order(batch_size=2, seed=0)
    seen = set[str]()
    for step in range(20):
        batch = data.batch(order(2 * step, 2), step)
        assert batch.images.shape[0] == len(batch.captions) == 2 and batch.extra == {}
        seen.update(batch.captions)
    assert seen == {IMAGES[name][1] for name in data.names}
    assert held_back.square([0]).images.shape == (1, 32, 32, 3)


def test_a_third_source_is_known_by_its_content_like_a_folder(tmp_path):
    for name, (content, caption) in IMAGES.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).with_suffix(".txt").write_text(caption)
    options = {"image_size": 32, "crop": "centre", "seed": 4}
    ours = in_memory(images=IMAGES, **options)
    folder = image_folder(root=str(tmp_path), captions=Sidecars(), **options)
    assert ours.fingerprint() == folder.fingerprint() and ours.identity() == folder.identity()
    assert ours.batch([0, 0], step=2).captions == folder.batch([0, 0], step=2).captions


def test_an_option_that_nothing_takes_is_refused_before_files_are_opened(counts):
    with pytest.raises(UserError, match=r"InMemory has no argument 'croop'. Did you mean crop"):
        in_memory(images=IMAGES, image_size=32, croop="centre")
    with pytest.raises(UserError, match="Did you mean centre"):
        in_memory(images=IMAGES, image_size=32, crop="center")
    assert not counts


# What training asks of any data set


@pytest.mark.parametrize("data", [Shapes(samples=50), in_memory(images=IMAGES, image_size=32)])
def test_splits_of_a_data_set_have_one_interface(data: Data):
    validation = data.view("validation")
    again = validation.view("train")
    one, two = data.batch([1], 2), again.batch([1], 2)
    assert isinstance(one, Batch) and one.captions == two.captions
    assert np.array_equal(one.images, two.images)
    assert not np.array_equal(validation.batch([0]).images, data.batch([0]).images)
    assert bool(validation.prompts()) == (data.name == "shapes")


def test_shapes_are_the_same_world_in_every_view():
    data: CacheableData = Shapes(samples=7, jitter=0.02, seed=5)
    expected = Shapes(split="validation", samples=7, jitter=0.02, seed=5)
    assert data.view("validation").identity() == expected.identity()
