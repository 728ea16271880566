"""Reflow: pairs are the ends of the teacher's trajectories, made once, whatever stops it."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import mmdit
from mmdit.data.dataset import Batch
from mmdit.errors import UserError
from mmdit.fewsteps import Reflow
from mmdit.fewsteps import pairs as pairs_module
from mmdit.fewsteps.pairs import Pairs, Recipe
from mmdit.flow.guidance import ClassifierFreeGuidance
from mmdit.flow.objective import Draw
from mmdit.keys import generator_for
from mmdit.precision import autocast
from mmdit.processes import Processes
from mmdit.registry import describe

CAPTIONS = ["a red cat", "two dogs", "a ball"]


class Captions:
    """A data set of captions, other ones in every pass."""

    def __len__(self) -> int:
        return len(CAPTIONS)

    def batch(self, indices: Sequence[int], step: int = 0) -> Batch:
        captions = [f"{CAPTIONS[i]} {step}" for i in indices]
        return Batch(torch.zeros(len(indices), 32, 32, 3, dtype=torch.uint8), captions)


@pytest.fixture(autouse=True)
def _small_files(monkeypatch) -> None:
    monkeypatch.setattr(pairs_module, "PER_FILE", 3)


@pytest.fixture
def pipe(tiny_published: Path) -> mmdit.Pipeline:
    return mmdit.load_pipeline(tiny_published).requires_grad_(False)


def source(pipe: mmdit.Pipeline, root: Path, *, batch_size: int = 64, **changes) -> Pairs:
    recipe = Recipe(
        weights_sha256="0" * 64,
        data={"captions": CAPTIONS},
        objective=describe(pipe.objective),
        image_size=32,
        **{"pairs": 5, "steps": 2, "guidance": 2.0, "seed": 0, **changes},
    )
    return Pairs(
        pipe,
        recipe=recipe,
        data=Captions(),
        root=root,
        batch_size=batch_size,
        autocast=autocast(torch.device("cpu"), "fp32"),
    )


def test_pairs_are_the_ends_of_the_teachers_trajectories(pipe, tmp_path: Path) -> None:
    pairs = source(pipe, tmp_path)
    pairs.prepare(Processes())
    x, text, _ = pairs.read(7, [4, 0])
    assert pairs.latent_shape(x) == (16, 16, 16)
    x_0, epsilon = pairs.latents(x).unbind(1)
    assert epsilon.std() == pytest.approx(1.0, abs=0.05)
    captions = ["two dogs 1", "a red cat 0"]
    assert all(map(torch.equal, text, pipe.text.tokenize(captions)))
    made = pipe.denoise(
        epsilon,
        pipe.objective.times(2),
        pipe.encode(captions),
        pipe.encode(["", ""]),
        guidance=ClassifierFreeGuidance(scale=2.0),
    ).latents
    torch.testing.assert_close(x_0, made.bfloat16().float(), rtol=1e-2, atol=1e-2)


def test_what_is_there_is_used_again(pipe, tmp_path: Path, caplog) -> None:
    pairs = source(pipe, tmp_path)
    pairs.prepare(Processes())
    before = pairs.read(0, list(range(5))).x
    first, second = sorted(pairs.folder.glob("*.safetensors"))
    kept = first.stat().st_mtime_ns
    second.unlink()
    with caplog.at_level("INFO", "mmdit.train"):  # made one at a time
        again = source(pipe, tmp_path, batch_size=1)
        again.prepare(Processes())
        source(pipe, tmp_path).prepare(Processes())
    assert "making 2 of 5 pairs" in caplog.text and "reusing the 5 pairs" in caplog.text
    assert first.stat().st_mtime_ns == kept
    torch.testing.assert_close(again.read(0, list(range(5))).x, before, rtol=1e-2, atol=1e-2)
    assert source(pipe, tmp_path, guidance=3.0).folder != pairs.folder


def test_a_damaged_file_is_named(pipe, tmp_path: Path) -> None:
    pairs = source(pipe, tmp_path, pairs=3, guidance=1.0)
    pairs.prepare(Processes())
    (file,) = pairs.folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match=rf"{file.name} is damaged.*delete it"):
        pairs.read(0, [0])


def test_the_loss_is_the_flows_on_a_pair(pipe) -> None:
    method, shape = Reflow(), (16, 8, 8)
    x = torch.randn(2, 2, *shape, generator=torch.Generator().manual_seed(0))
    draw = method.draw(pipe.objective, shape, [generator_for(0, i) for i in range(2)])
    condition = pipe.encode(CAPTIONS[:2])
    losses = method.loss(pipe.objective, None, pipe.mmdit, x, condition, draw).losses
    own = Draw(draw.t, x[:, 1])
    assert torch.equal(losses, pipe.objective(pipe.mmdit, x[:, 0], condition, own))
    assert method.network(pipe.mmdit) is pipe.mmdit


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pairs", 0),
        ("batch_size", 0),
        ("seed", -1),
        ("steps", 0),
        ("teacher_steps", 0),
        ("guidance", "much"),
    ],
)
def test_bad_values_are_refused(key: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"student\.{key}="):
        Reflow(**{key: value})
