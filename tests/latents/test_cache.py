"""A cache on disk: what was written is read, or its damage is named."""

import json
import os
from pathlib import Path

import pytest
import torch

import mmdit.latents.cache
from mmdit.errors import UserError
from mmdit.latents.cache import Cache, Samples, Shard, identity_differences, texts_of

KINDS = ("synthetic", "text")
IDENTITY = {"autoencoder": {"weights": "1" * 64}, "data set": {"images": 5}, "t5": None}
SIZES = [(4, 2, 3), (4, 3, 2), (4, 2, 2), (4, 2, 3), (4, 1, 4)]
CAPTIONS = [
    {"text": ("one", "zwei", "drei")},
    {"synthetic": ("ein", "è"), "text": ("b",)},
    {"synthetic": ("only",)},
    {"text": ("赤い丸",), "other": ("not kept",)},
    {"text": ("last",), "synthetic": ()},
]


def opened(folder: Path, identity=IDENTITY, shard_size=2) -> Cache:
    return Cache(folder, identity=identity, samples=5, kinds=KINDS, shard_size=shard_size)


def samples_of(indices: range) -> Samples:
    generator = torch.Generator().manual_seed(indices[0])
    captions = [CAPTIONS[i] for i in indices]
    count = len(texts_of(captions, KINDS))
    return Samples(
        [torch.randn(SIZES[i], generator=generator).bfloat16() for i in indices],
        captions,
        {
            "t5.hidden": torch.randn(count, 3, 2, generator=generator).bfloat16(),
            "clip_l.pooled": torch.randn(count, 4, generator=generator).bfloat16(),
        },
    )


def fill(cache: Cache) -> None:
    cache.begin()
    for number in cache.missing():
        cache.write(number, samples_of(cache.indices(number)))


@pytest.fixture
def cache(tmp_path) -> Cache:
    cache = opened(tmp_path / "cache")
    fill(cache)
    cache.complete()
    return opened(tmp_path / "cache")


def test_what_was_written_is_read_at_any_position(cache):
    for index in (4, 0, 2, 1, 3):
        shard = range(5)[index // 2 * 2 :][:2]
        written, place = samples_of(shard), index - shard[0]
        assert torch.equal(cache.latent(index), written.latents[place])
        before = len(texts_of(written.captions[:place], KINDS))
        kept = [(k, t) for k in KINDS for t in CAPTIONS[index].get(k, ())]
        found = [(kind, n) for kind, numbers in cache.captions(index).items() for n in numbers]
        assert [kind for kind, _ in kept] == [kind for kind, _ in found]
        for i, ((_, text), (_, number)) in enumerate(zip(kept, found, strict=True)):
            caption = cache.caption(index, number)
            assert caption.text == text
            assert caption.embeddings.keys() == written.embeddings.keys()
            for name, part in written.embeddings.items():
                assert torch.equal(caption.embeddings[name], part[before + i]), name


def test_an_interrupted_cache_goes_on_at_the_first_shard_that_is_not_there(tmp_path, monkeypatch):
    cache = opened(tmp_path)
    assert cache.missing() == [0, 1, 2]
    cache.begin()
    cache.write(1, samples_of(cache.indices(1)))
    assert cache.missing() == [0, 2]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", killed)
        cache.write(0, samples_of(cache.indices(0)))
    again = opened(tmp_path)
    assert again.missing() == [0, 2]
    made = again.path(1).stat().st_mtime_ns
    fill(again)
    again.complete()
    assert opened(tmp_path).missing() == []
    assert again.path(1).stat().st_mtime_ns == made
    assert {p.suffix for p in tmp_path.glob("shard*")} == {".safetensors"}  # the notes are in one


def test_a_shard_that_is_deleted_is_made_again(cache):
    before = cache.path(1).read_bytes()
    cache.path(1).unlink()
    again = opened(cache.folder)
    assert again.missing() == [1]
    fill(again)
    again.complete()
    assert cache.path(1).read_bytes() == before


def test_a_truncated_shard_is_named(cache):
    os.truncate(cache.path(1), cache.path(1).stat().st_size - 1)
    with pytest.raises(UserError, match=r"shard-00001\.safetensors is damaged .* bytes instead of"):
        opened(cache.folder).missing()


def read_all(cache: Cache) -> None:
    for index in range(5):
        cache.latent(index)
        for numbers in cache.captions(index).values():
            for number in numbers:
                cache.caption(index, number)


def test_any_flipped_byte_is_noticed_when_it_is_read(cache):
    path = cache.path(0)
    whole = path.read_bytes()
    read_all(cache)
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in range(header, len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        damaged = opened(cache.folder)
        assert damaged.missing() == []  # of the same size
        with pytest.raises(UserError, match=r"shard-00000\.safetensors is damaged"):
            read_all(damaged)
        if position % 100 == 0:
            with pytest.raises(UserError, match=r"^1 of 3 shards .* differs: shard-00000\."):
                damaged.verify()
    path.write_bytes(whole)
    opened(cache.folder).verify()


def test_a_damaged_header_is_named(cache):
    data = cache.path(2).read_bytes()
    cache.path(2).write_bytes(b"x" * 40 + data[40:])
    with pytest.raises(UserError, match=r"shard-00002\.safetensors is damaged"):
        opened(cache.folder).latent(4)


def test_a_shard_of_another_cache_is_refused(cache, tmp_path):
    other = opened(tmp_path / "other", {**IDENTITY, "autoencoder": {"weights": "2" * 64}})
    fill(other)
    size = cache.path(0).stat().st_size
    cache.path(0).write_bytes(other.path(0).read_bytes())
    assert cache.path(0).stat().st_size == size
    damaged = opened(cache.folder)
    assert damaged.missing() == []
    with pytest.raises(UserError, match=r"shard-00000\.safetensors .* another cache: delete the"):
        damaged.latent(0)


def test_shards_that_changed_places_are_refused(cache):
    first, second = cache.path(0), cache.path(1)
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    for path in (first, second):  # of the same size, as shards of a real cache are
        path.with_suffix(".json").write_text(
            json.dumps({"bytes": path.stat().st_size, "sha256": ""})
        )
    swapped = opened(cache.folder)
    for index, told in ((0, "shard 0 of 3, but is shard 1 of 3 of this"), (2, "1 of 3, but is sh")):
        with pytest.raises(UserError, match=told):
            swapped.latent(index)


def test_any_flipped_bit_of_a_header_is_noticed(cache):
    path = cache.path(0)
    whole = path.read_bytes()
    for position in range(8 + int.from_bytes(whole[:8], "little")):
        flipped = bytes([whole[position] ^ (1 << position % 8)])
        path.write_bytes(whole[:position] + flipped + whole[position + 1 :])
        with pytest.raises(UserError, match=r"shard-00000\.safetensors .* to have it made again"):
            read_all(opened(cache.folder))


@pytest.mark.parametrize("note", [b"", b'{"bytes": 12', b"[]", b"{}", b"\xff"])
def test_a_shard_whose_note_is_damaged_is_made_again(tmp_path, note):
    fill(opened(tmp_path))
    (tmp_path / "shard-00001.json").write_bytes(note)
    again = opened(tmp_path)
    assert again.missing() == [1]
    fill(again)
    again.complete()
    assert opened(tmp_path).missing() == []


def test_a_cache_of_something_else_is_refused_with_what_differs(cache):
    other = {**IDENTITY, "autoencoder": {"weights": "2" * 64}, "t5": {"tokens": 77}}
    with pytest.raises(UserError) as caught:
        opened(cache.folder, other)
    assert "made with another autoencoder (weights: 111111111111..., not 222222222222" in str(
        caught.value
    )
    assert "another t5 (tokens: null, not 77)" in str(caught.value)
    assert "data set" not in str(caught.value)


def test_folders_and_files_that_are_no_cache_are_refused(tmp_path, cache):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not a cache and not empty"):
        opened(tmp_path / "other")
    facts = json.loads((cache.folder / "cache.json").read_text())
    changes = [
        *({"protocol": "mmdit-cache-0"}, {"shards": None}, {"shards": {"shard-00000": {}}}),
        *({"shard_size": 0}, {"shard_size": None}),
    ]
    damages = ["", "[]", "{}", *(json.dumps({**facts, **change}) for change in changes)]
    damages += [json.dumps({k: facts[k] for k in facts if k != key}) for key in facts]
    for damage in damages:
        (cache.folder / "cache.json").write_text(damage)
        with pytest.raises(UserError, match="move the cache elsewhere"):
            opened(cache.folder)


def test_what_another_process_made_is_seen(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path)
    fill(first)
    assert second.missing() == []
    first.complete()
    second.begin()
    assert second.missing() == []


def test_of_two_that_begin_at_once_the_second_goes_on_with_what_the_first_made(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path, shard_size=3)
    fill(first)
    first.complete()
    second.begin()
    assert second.completed and second.shard_size == 2
    assert torch.equal(second.latent(4), samples_of(range(4, 5)).latents[0])


def test_what_is_only_noted_does_not_complete_a_cache(tmp_path):
    first = opened(tmp_path)
    fill(first)
    second = opened(tmp_path)
    assert second.missing() == [] and not second.completed
    first.complete()
    assert second.missing() == [0, 1, 2] and not second.completed  # until it looks again
    second.begin()
    assert second.completed


def test_a_cache_killed_while_it_was_begun_is_begun_again(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "cache.json.0123.tmp").write_text('{"protocol": ')
    cache = opened(tmp_path)
    fill(cache)
    cache.complete()
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("before", range(5))
def test_a_kill_while_a_cache_is_completed_is_made_good(tmp_path, monkeypatch, before):
    """Of the files that `complete` removes, so many have gone when it is killed."""
    fill(opened(tmp_path))
    (tmp_path / "shard-00002.safetensors.0123.tmp").touch()
    unlink, left = Path.unlink, iter(range(before))

    def killed(path, **options):
        if next(left, None) is None:
            raise KeyboardInterrupt
        unlink(path, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        opened(tmp_path).complete()
    again = opened(tmp_path)
    assert not again.completed
    again.complete()
    assert opened(tmp_path).completed
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".safetensors"] == [
        "cache.json"
    ]


def test_more_shards_than_are_held_open(cache, monkeypatch):
    monkeypatch.setattr(mmdit.latents.cache, "MAX_OPEN_SHARDS", 1)
    read_all(cache)
    read_all(cache)


def test_the_shard_that_was_used_least_recently_is_closed(cache, monkeypatch):
    opened = []

    def watched(path, *arguments):
        opened.append(int(path.stem[-5:]))
        return Shard(path, *arguments)

    monkeypatch.setattr(mmdit.latents.cache, "MAX_OPEN_SHARDS", 2)
    monkeypatch.setattr(mmdit.latents.cache, "Shard", watched)
    for index in (0, 2, 1, 4, 0, 4, 2):  # shards 0 1 0 2 0 2 1
        cache.latent(index)
    assert opened == [0, 1, 2, 1]


def test_a_shard_held_open_takes_no_file_descriptor(cache):
    def descriptors() -> int:
        return len(os.listdir("/dev/fd"))

    before = descriptors()
    read_all(cache)
    assert descriptors() == before


def test_differences_name_what_and_its_particulars():
    same = {"a": {"x": 1, "y": [1, 2]}, "b": None}
    assert identity_differences(same, same) == []
    assert identity_differences(same, {"a": {"x": 1, "y": [1, 3]}, "b": None}) == [
        "another a (y: [1, 2], not [1, 3])"
    ]
    assert identity_differences(same, {**same, "b": "z"}) == ["another b (null, not z)"]
