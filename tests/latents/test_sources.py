"""Where latents and texts come from: losses are the same from pixels, from memory, from a cache."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmdit.data.caption_sources import Sidecars
from mmdit.data.captioned import CaptionedImages
from mmdit.data.captions import vocabulary
from mmdit.data.dataset import Batch
from mmdit.data.folder import image_folder
from mmdit.data.shapes import Shapes
from mmdit.engine.loader import Loader
from mmdit.engine.tasks import Captioned, FlowTask
from mmdit.engine.validation import Validation
from mmdit.errors import NotFinite, UserError
from mmdit.flow.objective import Objective
from mmdit.flow.paths import RectifiedFlow
from mmdit.flow.predictions import Velocity
from mmdit.flow.schedule import Shift
from mmdit.flow.timesteps import LogitNormal
from mmdit.latents.encoding import HALF
from mmdit.latents.precompute import Unfinished
from mmdit.latents.sources import FromCache, FromMemory, FromPixels, LatentSource
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.clip import CLIPTextModel
from mmdit.models.mmdit import MMDiT
from mmdit.models.t5 import T5Encoder
from mmdit.pipeline import Pipeline
from mmdit.processes import Processes
from mmdit.text.conditioning import (
    AbsentEncoder,
    Encodings,
    TextConditioner,
    TextEncoder,
    TokenIds,
)
from mmdit.text.tokenizers import CLIPWordTokenizer, T5WordTokenizer

BATCH, STEPS = 4, 8
SIDES = [(32, 32), (24, 48), (48, 24), (40, 33)]  # files; batches have three sizes


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of small PNG files of several shapes, with captions of two kinds."""
    shapes, folder = Shapes(split="train"), tmp_path_factory.mktemp("photos")
    for i in range(26):
        height, width = SIDES[i % 4]
        image = Image.fromarray(shapes[i].image).resize((width, height))
        image.save(folder / f"{i:02d}.png")
        told = [shapes.caption(100 + i), shapes.caption(200 + i)]
        (folder / f"{i:02d}.txt").write_text("\n".join(told))
        if i % 5:
            (folder / f"{i:02d}.synthetic.txt").write_text(shapes.caption(300 + i))
    return folder


def opened(photos: Path, **arguments: Any) -> CaptionedImages:
    settings: dict[str, Any] = {
        "root": str(photos),
        "captions": Sidecars(),
        "mix": {"text": 0.5, "synthetic": 0.5},
        "image_size": 32,
        "unit": 8,
        "max_ratio": 2.0,
        "crop": "centre",
        "validation_fraction": 0.0,
    }
    return image_folder(**{**settings, **arguments})


def clip(width: int, *, pad_with_end: bool) -> TextEncoder:
    return TextEncoder(
        tokenizer=CLIPWordTokenizer(words=vocabulary(), length=13, pad_with_end=pad_with_end),
        model=CLIPTextModel(vocabulary_size=96, width=width, depth=2, num_heads=2, length=13),
    )


def t5(length: int = 11) -> TextEncoder:
    return TextEncoder(
        tokenizer=T5WordTokenizer(words=vocabulary(), length=length),
        model=T5Encoder(
            vocabulary_size=96, width=24, depth=1, num_heads=2, head_width=8, hidden=32
        ),
    )


def pipeline(*, frozen: bool, seed: int = 0, without_t5: bool = False) -> Pipeline:
    """A tiny model whose weights follow from the seed; its text encoders may be frozen."""
    torch.manual_seed(seed)
    absent = AbsentEncoder(width=24, length=11)
    text = TextConditioner(
        clip_l=clip(8, pad_with_end=True),
        clip_g=clip(12, pad_with_end=False),
        t5=absent if without_t5 else t5(),
    )
    pipe = Pipeline(
        mmdit=MMDiT(
            depth=2, width=32, num_heads=2, context_width=24, pooled_width=20, position_size=12
        ),
        text=text.requires_grad_(not frozen),
        autoencoder=Autoencoder(width=32, multipliers=[1, 1, 1], blocks=0).requires_grad_(False),
        objective=Objective(
            path=RectifiedFlow(),
            timesteps=LogitNormal(),
            prediction=Velocity(),
            shift=Shift(alpha=1.0),
        ),
        image_size=32,
    )
    with torch.no_grad():  # nothing at its first value, which is zero where the network ends
        for weight in pipe.mmdit.parameters():
            weight.add_(0.05 * torch.randn(weight.shape))
    return pipe


Make = Callable[..., LatentSource]


def source_of(kind: Make, pipe: Pipeline, data: Any, **arguments: Any) -> LatentSource:
    source = kind(
        data=data, autoencoder=pipe.autoencoder, text=pipe.text, autocast=nullcontext, **arguments
    )
    source.prepare(Processes())
    return source


def task_of(pipe: Pipeline, source: LatentSource, data: Any) -> FlowTask:
    images, captions, extra = data.square(range(2))
    return FlowTask(
        module=pipe,
        source=source,
        validation=Validation(images, captions, captions, extra),
        seed=0,
        autocast=nullcontext,
    )


def examples(task: FlowTask, workers: int = 0) -> Iterator[Captioned]:
    order = task.order(batch_size=BATCH, seed=0)
    loader = Loader(task.example, order, batch_size=BATCH, processes=Processes(), workers=workers)
    for (part,) in loader(0, STEPS):
        yield part.example


def losses(task: FlowTask, workers: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([task.loss(example) for example in examples(task, workers)])


class MaskedMMDiT(MMDiT):
    """Sees latents where a mask of its data lets it."""

    reads = frozenset({"mask"})

    def forward(self, z_t, t, c_vec, c_ctxt, mask):
        return super().forward(z_t * mask, t, c_vec, c_ctxt)


class Masked:
    """A data set with a mask for each image, and with something that no network reads."""

    def __init__(self, data: CaptionedImages, value: float) -> None:
        self.data, self.value = data, value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.data, name)

    def _with_mask(self, batch: Batch) -> Batch:
        n, height, width, _ = batch.images.shape
        mask = torch.full((n, 1, height // 4, width // 4), self.value)
        return batch._replace(extra={"mask": mask, "other": torch.zeros(n)})

    def batch(self, indices: Any, step: int = 0) -> Batch:
        return self._with_mask(self.data.batch(indices, step))

    def square(self, indices: Any) -> Batch:
        return self._with_mask(self.data.square(indices))


def test_what_a_network_reads_of_a_batch_reaches_it(photos):
    data, pipe = opened(photos), pipeline(frozen=False)
    plain = losses(task_of(pipe, source_of(FromPixels, pipe, data), data))
    pipe.mmdit.__class__ = MaskedMMDiT
    with pytest.raises(UserError, match="MaskedMMDiT reads mask besides text, but the data has"):
        losses(task_of(pipe, source_of(FromPixels, pipe, data), data))
    found = {}
    for value in (1.0, 0.0):
        masked = Masked(data, value)
        task = task_of(pipe, source_of(FromPixels, pipe, masked), masked)
        found[value] = losses(task)
        images, _ = task.picture(pipe)
        assert len(images) == 2 and task.evaluate(pipe)["loss"] > 0
    assert torch.equal(found[1.0], plain)
    assert not torch.equal(found[0.0], plain)


@pytest.mark.parametrize("without_t5", [False, True], ids=["three", "no T5"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_losses_from_pixels_memory_and_cache_are_the_same(photos, tmp_path, frozen, without_t5):
    pipe, data = pipeline(frozen=frozen, without_t5=without_t5), opened(photos)
    kinds = {FromPixels: {}, FromMemory: {}, FromCache: {"root": tmp_path, "shard_size": 7}}
    pixels, memory, cache = (
        losses(task_of(pipe, source_of(kind, pipe, data, **arguments), data))
        for kind, arguments in kinds.items()
    )
    assert pixels.std() > 0.01
    torch.testing.assert_close(memory, pixels, rtol=1e-5, atol=0)
    torch.testing.assert_close(cache, pixels, rtol=1e-5, atol=0)


def test_latents_are_rounded_alike_and_captions_drawn_alike(photos, tmp_path):
    pipe, data = pipeline(frozen=False), opened(photos)
    pixels = source_of(FromPixels, pipe, data)
    cached = source_of(FromCache, pipe, data, root=tmp_path, shard_size=7)
    shapes, told = set(), []
    for step in range(2 * STEPS):
        indices = data.order(batch_size=BATCH, seed=1)(step * BATCH, BATCH)
        one, other = pixels.read(step, indices), cached.read(step, indices)
        assert other.x.dtype == HALF
        # The same function of the pixels. In a batch of another size a float32 sum may end in
        # another last bit, and one value in hundreds then rounds to the neighbour.
        ours, theirs = pixels.latents(one.x), cached.latents(other.x)
        assert (ours == theirs).float().mean() > 0.99
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-5)
        assert pixels.latent_shape(one.x) == cached.latent_shape(other.x)
        for ours, theirs in zip(one.text, other.text, strict=True):
            assert torch.equal(ours, theirs)
        shapes.add(tuple(other.x.shape[2:]))
        _, captions, _ = data.batch(indices, step)
        told += [
            data.cacheable(i)[1]["text"].count(c) for i, c in zip(indices, captions, strict=True)
        ]
    assert len(shapes) == 3
    assert 0 < sum(told) < len(told)  # both kinds of captions are drawn


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_two_workers_read_what_none_reads(photos, tmp_path, frozen):
    pipe, data = pipeline(frozen=frozen), opened(photos)
    task = task_of(pipe, source_of(FromCache, pipe, data, root=tmp_path, shard_size=7), data)
    kind = Encodings if frozen else TokenIds
    assert all(isinstance(example.text, kind) for example in examples(task))
    assert torch.equal(losses(task, workers=0), losses(task, workers=2))


def test_encoders_are_dropped_at_training_time_from_what_was_kept(photos, tmp_path):
    pipe, data = pipeline(frozen=True), opened(photos)
    task = task_of(pipe, source_of(FromCache, pipe, data, root=tmp_path), data)
    example = next(examples(task))
    assert all(encoding.hidden.any() for encoding in example.text)
    kept = torch.tensor([[True, False, False]] * BATCH)
    c_vec, c_ctxt, _ = pipe.text.join(example.text, kept)
    assert c_vec[:, :8].any() and not c_vec[:, 8:].any()
    assert c_ctxt[:, :13, :8].any() and not c_ctxt[:, :13, 8:].any() and not c_ctxt[:, 13:].any()


def test_the_toy_is_cached_too(tmp_path):
    pipe, data = pipeline(frozen=False), Shapes(split="train", samples=20)
    memory, cache = (
        losses(task_of(pipe, source_of(kind, pipe, data, **arguments), data))
        for kind, arguments in ((FromMemory, {}), (FromCache, {"root": tmp_path}))
    )
    torch.testing.assert_close(cache, memory, rtol=1e-5, atol=0)


# What a cache was made from


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("folder", value) for value in (-1, [1], True)),
        *(("root", value) for value in (None, 0)),
        *((name, value) for name in ("shard_size", "threads") for value in ("x", None, 0, 1.5)),
        *(("verify", value) for value in ("x", None, 0)),
    ],
)
def test_arguments_that_make_no_sense_are_refused_by_name(field: str, value: object) -> None:
    pipe, data = pipeline(frozen=True), Shapes(split="train")
    with pytest.raises(UserError, match=rf"^latents\.{field}=.* must be "):
        source_of(FromCache, pipe, data, **{field: value})


def folder_of(source: LatentSource) -> Path:
    assert isinstance(source, FromCache)
    return source.cache.folder


def changed_scale(pipe: Pipeline) -> None:
    pipe.autoencoder.scale *= 1.01


def changed_weight(pipe: Pipeline) -> None:
    next(pipe.autoencoder.encoder.parameters()).data[0] += 0.01


def changed_encoder(pipe: Pipeline) -> None:
    pipe.text.clip_l.model.position_embedding.data += 0.01


def longer_text(pipe: Pipeline) -> None:
    pipe.text.t5 = t5(length=12).requires_grad_(False)


def trained_text(pipe: Pipeline) -> None:
    pipe.text.requires_grad_(True)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (changed_scale, "another autoencoder"),
        (changed_weight, "another autoencoder"),
        (changed_encoder, r"another clip_l \(weights"),
        (longer_text, "another t5"),
        (trained_text, "another clip_g"),
    ],
)
def test_a_cache_made_with_other_weights_is_refused(photos, tmp_path, change, told):
    pipe, data = pipeline(frozen=True), opened(photos)
    folder = tmp_path / "mine"
    source_of(FromCache, pipe, data, folder=str(folder))
    change(pipe)
    with pytest.raises(UserError, match=rf"mine was made with {told}.*choose another folder"):
        source_of(FromCache, pipe, data, folder=str(folder))
    # Without a folder of its own, each has another.
    assert folder_of(source_of(FromCache, pipe, data, root=tmp_path)).parent == tmp_path


def test_a_cache_of_other_images_or_precision_is_refused(photos, tmp_path):
    pipe, folder = pipeline(frozen=False), str(tmp_path / "mine")
    source_of(FromCache, pipe, opened(photos), folder=folder)
    for others in ({"image_size": 64}, {"max_ratio": 1.0}, {"mix": {"text": 1.0}}):
        with pytest.raises(UserError, match="another data set"):
            source_of(FromCache, pipe, opened(photos, **others), folder=folder)
    half = FromCache(
        data=opened(photos),
        autoencoder=pipe.autoencoder,
        text=pipe.text,
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        folder=folder,
    )
    with pytest.raises(UserError, match=r"another precision \(computed"):
        half.prepare(Processes())


@pytest.mark.parametrize("kind", [FromCache, FromMemory])
def test_random_crops_are_refused_where_latents_are_kept(photos, tmp_path, kind):
    pipe, data = pipeline(frozen=False), opened(photos, crop="random")
    arguments = {"root": tmp_path} if kind is FromCache else {}
    with pytest.raises(UserError, match=r"crop=random .* latents=from_pixels"):
        source_of(kind, pipe, data, **arguments)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [FromCache, FromMemory])
def test_latents_that_are_not_finite_are_not_kept(photos, tmp_path, kind):
    pipe, arguments = pipeline(frozen=False), {"root": tmp_path} if kind is FromCache else {}
    torch.nn.init.constant_(pipe.autoencoder.encoder.conv_out.bias, float("nan"))
    with pytest.raises(NotFinite, match=r"^the autoencoder's encoder"):
        source_of(kind, pipe, opened(photos), **arguments)
    assert not [*tmp_path.rglob("*.safetensors")]


def test_words_that_are_not_finite_are_not_kept(photos, tmp_path):
    pipe = pipeline(frozen=True)
    torch.nn.init.constant_(pipe.text.t5.model.final_norm.weight, float("inf"))
    with pytest.raises(NotFinite, match=r"^the text encoder T5"):
        source_of(FromCache, pipe, opened(photos), root=tmp_path)
    assert not [*tmp_path.rglob("*.safetensors")]


@pytest.mark.parametrize("part", ["latent", "caption"])
def test_a_cache_that_holds_values_that_are_not_finite_is_refused(
    photos, tmp_path, monkeypatch, part
):
    source = source_of(FromCache, pipeline(frozen=True), opened(photos), root=tmp_path)
    source.read(0, [0, 4])
    read = getattr(source.cache, part)

    def damaged(index, *more):
        found = read(index, *more)
        if index == 4:
            tensor = found if part == "latent" else found.embeddings["t5.hidden"]
            tensor.view(-1)[3] = float("nan")
        return found

    monkeypatch.setattr(source.cache, part, damaged)
    with pytest.raises(NotFinite, match=r"samples \[4\] are NaN or infinite.*delete that folder"):
        source.read(0, [0, 4])


# Interruptions


class Counting(CaptionedImages):
    """Counts the images that are read, and may do something at one of them."""

    seen = 0
    at: int | None = None

    def cacheable(self, index):
        self.seen += 1
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().cacheable(index)


def counting(photos: Path) -> Counting:
    plain = opened(photos)
    plain.__class__ = Counting
    assert isinstance(plain, Counting)
    return plain


def test_a_signal_stops_and_finished_shards_are_not_made_again(photos, tmp_path):
    pipe, data = pipeline(frozen=True), counting(photos)
    data.at = 20
    with pytest.raises(Unfinished, match="SIGTERM; finished shards stay") as caught:
        source_of(FromCache, pipe, data, folder=str(tmp_path / "cache"), shard_size=7)
    assert caught.value.number == signal.SIGTERM
    made = sorted(tmp_path.glob("cache/*.safetensors"))
    assert len(made) == 2
    before, data.seen, data.at = [path.read_bytes() for path in made], 0, None
    source = source_of(FromCache, pipe, data, folder=str(tmp_path / "cache"), shard_size=3)
    assert data.seen == 26 - 14 + 1  # one to see that images are cacheable
    assert [path.read_bytes() for path in made] == before
    unbroken = source_of(FromCache, pipe, data, folder=str(tmp_path / "other"), shard_size=7)
    for path in sorted(folder_of(source).glob("*.safetensors")):
        assert (folder_of(unbroken) / path.name).read_bytes() == path.read_bytes()
    data.seen = 0
    source_of(FromCache, pipe, data, folder=str(tmp_path / "cache"))
    assert data.seen == 1


def test_a_truncated_shard_is_named(photos, tmp_path):
    pipe, data = pipeline(frozen=False), opened(photos)
    folder = folder_of(source_of(FromCache, pipe, data, root=tmp_path, shard_size=7))
    os.truncate(folder / "shard-00002.safetensors", 100)
    with pytest.raises(UserError, match=r"shard-00002\.safetensors is damaged"):
        source_of(FromCache, pipe, data, root=tmp_path)
    (folder / "shard-00002.safetensors").unlink()
    source_of(FromCache, pipe, data, root=tmp_path, verify=True)


def test_a_flipped_bit_is_found_by_verify_and_when_it_is_read(photos, tmp_path):
    pipe, data = pipeline(frozen=False), opened(photos)
    folder = folder_of(source_of(FromCache, pipe, data, root=tmp_path, shard_size=26))
    path = folder / "shard-00000.safetensors"
    written = path.read_bytes()
    path.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))
    with pytest.raises(UserError, match=r"differs: shard-00000\.safetensors"):
        source_of(FromCache, pipe, data, root=tmp_path, verify=True)
    source = source_of(FromCache, pipe, data, root=tmp_path)
    with pytest.raises(UserError, match=r"shard-00000\.safetensors is damaged"):
        for index in range(26):
            for step in range(20):
                source.read(step, [index])
