import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.data.captions import vocabulary
from mmdit.data.shapes import Shapes
from mmdit.engine.contrastive import (
    CHOICES,
    ContrastiveTask,
    contrastive_loss,
    distinct_batches,
    twins,
)
from mmdit.engine.ema import EMA, ConstantDecay
from mmdit.engine.loggers import NoLogger
from mmdit.engine.loop import train
from mmdit.engine.optimizers import adamw
from mmdit.engine.schedules import WarmupConstant
from mmdit.engine.settings import Settings
from mmdit.engine.state import TrainState
from mmdit.errors import UserError
from mmdit.models.clip import CLIPTextModel
from mmdit.models.clip_image import CLIPImageModel
from mmdit.precision import autocast
from mmdit.runs.folder import RunFolder
from mmdit.text.clip_pair import CLIPPair
from mmdit.text.conditioning import TextEncoder
from mmdit.text.tokenizers import CLIPWordTokenizer

SCALE = torch.tensor(10.0)


def features(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 8, generator=generator), dim=-1)


def alone(count: int) -> Tensor:
    return torch.eye(count, dtype=torch.bool)


def make_task() -> ContrastiveTask:
    torch.manual_seed(0)
    text = TextEncoder(
        tokenizer=CLIPWordTokenizer(words=vocabulary(), length=13, pad_with_end=True),
        model=CLIPTextModel(
            vocabulary_size=96, width=32, depth=2, num_heads=2, length=13, projection_width=16
        ),
    )
    image = CLIPImageModel(
        width=32, depth=2, num_heads=2, image_size=32, patch_size=8, projection_width=16
    )
    return ContrastiveTask(
        module=CLIPPair(text=text, image=image),
        data=Shapes(split="train"),
        validation=Shapes(split="validation"),
        rounds=1,
        autocast=autocast(torch.device("cpu"), "fp32"),
    )


# The loss


def test_perfect_features_have_the_loss_of_their_scale():
    """Orthogonal pairs: -log of e^s / (e^s + b - 1)."""
    perfect = torch.eye(6, 8)
    expected = math.log(1 + 5 * math.exp(-10))
    loss = contrastive_loss(perfect, perfect, SCALE, alone(6))
    torch.testing.assert_close(loss, torch.full((6,), expected))


def test_features_that_tell_nothing_have_the_loss_of_a_guess():
    same = features(1).expand(6, -1)
    loss = contrastive_loss(same, same, SCALE, alone(6))
    torch.testing.assert_close(loss, torch.full((6,), math.log(6)))


def test_loss_of_each_pair_equals_its_definition():
    image, text = features(5, 0), features(5, 1)
    loss = contrastive_loss(image, text, SCALE, alone(5))
    for i in range(5):
        of_texts = -(10 * (image[i] @ text.T)).log_softmax(0)[i]
        of_images = -(10 * (image @ text[i])).log_softmax(0)[i]
        torch.testing.assert_close(loss[i], (of_texts + of_images) / 2)


def test_loss_does_not_tell_pictures_from_texts():
    image, text = features(5, 0), features(5, 1)
    loss = contrastive_loss(image, text, SCALE, alone(5))
    torch.testing.assert_close(contrastive_loss(text, image, SCALE, alone(5)), loss)


def test_twins_do_not_count_as_wrong():
    """Of three pairs with the first two captions the same, each has the third alone against it."""
    image, text = features(3, 0), features(2, 1)[[0, 0, 1]]
    loss = contrastive_loss(image, text, SCALE, twins(["a", "a", "b"]))
    for i in (0, 1):
        both = contrastive_loss(image[[i, 2]], text[[i, 2]], SCALE, alone(2))
        torch.testing.assert_close(loss[i], both[0])
    assert loss[2] > both[1]  # while the third has both of them


def test_twins_are_captions_with_the_same_words():
    expected = [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    assert twins(["a", "b", "a", "c"]).int().tolist() == expected


# The task


def test_a_loss_is_a_function_of_the_samples_alone():
    task = make_task()
    first = task.loss(task.example(0, range(8)))
    assert first.shape == (8,)
    assert torch.equal(task.loss(task.example(5, range(8))), first)
    torch.testing.assert_close(task.loss(task.example(0, range(7, -1, -1))), first.flip(0))


def test_evaluation_of_an_untrained_pair_is_a_guess():
    task = make_task()
    figures = task.evaluate(task.module)
    assert task.higher_is_better < figures.keys()
    assert figures.keys() == {"loss", "accuracy"}
    assert figures["accuracy"] < 0.1
    assert math.log(CHOICES) - 0.5 < figures["loss"] < math.log(CHOICES) + 2


def test_picture_shows_captions_of_the_evaluation():
    task = make_task()
    images, captions = task.picture(task.module)
    assert images.shape == (16, 32, 32, 3) and len(captions) == 16
    assert set(captions) <= set(distinct_batches(Shapes(split="validation"), 1)[0][1])


def test_batches_of_the_evaluation_hold_no_caption_twice_and_no_sample_twice():
    data = Shapes(split="validation")
    batches = distinct_batches(data, 3)
    for images, captions, _ in batches:
        assert images.shape == (CHOICES, 32, 32, 3) and len(set(captions)) == CHOICES
    seen = {image.numpy().tobytes() for images, _, _ in batches for image in images}
    assert len(seen) == 3 * CHOICES


def test_a_dataset_of_few_captions_is_refused():
    few = Shapes(split="validation", task_weights={"single_object": 1.0}, rich_fraction=0.0)
    with pytest.raises(UserError, match="data has 3 distinct captions"):
        distinct_batches(few, 1)


@pytest.mark.slow
def test_it_learns(tmp_path: Path):
    task = make_task()
    run = RunFolder(tmp_path)
    checkpoint = train(
        task,
        TrainState(
            task.module,
            ema=EMA(task.module, profile=ConstantDecay(decay=0.8, every=1)),
            optimizer=adamw(task.module, lr=4e-3),
            schedule=WarmupConstant(warmup_steps=10),
        ),
        run=run,
        settings=Settings(
            steps=60,
            batch_size=64,
            clip=1.0,
            log_every=60,
            evaluate_every=60,
            save_every=60,
            keep=1,
        ),
        seed=0,
        logger=NoLogger(),
    )
    run.close()
    assert checkpoint.metrics["ema/accuracy"] > 6 / CHOICES  # six times as often as a guess
