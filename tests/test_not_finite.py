"""What becomes NaN or infinite never becomes an image: an error names the stage and the step."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import mmdit
from mmdit.cli.eval.autoencoder import Opened, measure
from mmdit.errors import NotFinite
from mmdit.flow.guidance import ClassifierFreeGuidance, Guidance
from mmdit.flow.solvers import euler, heun
from mmdit.pipeline import Pipeline, to_latents, to_pixels

IMAGE = torch.full((16, 16, 3), 128, dtype=torch.uint8)


@pytest.fixture
def pipe(tiny_published) -> Pipeline:
    return mmdit.load_pipeline(tiny_published)


@torch.no_grad()
def multiplied(module: nn.Module, factor: float) -> None:
    """Activations x `factor`, from the first matrix of a module on."""
    weight = next(w for w in module.parameters() if w.ndim > 1)
    weight.mul_(factor)


def sample(pipe: Pipeline, **options) -> Tensor:
    return pipe("a red cat", **{"height": 16, "width": 16, "steps": 4, **options})


class Spoiled(Guidance):
    """NaN from t = 0.6 on."""

    def guided(self, sides, grid, steps):
        return lambda z, t: sides.conditional(z, t) * (1.0 if t > 0.6 else float("nan"))


def silent_solver(velocity, z, grid, progress=None):
    """Neither calls `progress` nor stays finite."""
    return z / 0


@pytest.mark.parametrize("solver", [euler, heun])
@pytest.mark.parametrize("scale", [1e30, 1e38, -1e30])
def test_guidance_that_overflows(pipe, scale, solver):
    said = r"step 1 of 4 \(to t = 0\.858\): .*guidance or the solver.*Use less guidance"
    with pytest.raises(NotFinite, match=said):
        sample(pipe, guidance=scale, solver=solver)


@pytest.mark.parametrize("solver", [euler, heun])
def test_a_guidance_of_ones_own_that_is_nan(pipe, solver):
    with pytest.raises(NotFinite, match=r"step \d of 10 .* because of guidance or the solver"):
        sample(pipe, guidance=Spoiled(), steps=10, solver=solver)


def test_a_solver_of_ones_own_that_divides_by_zero(pipe):
    with pytest.raises(NotFinite, match=r"sampling, at its end: .*another solver"):
        sample(pipe, solver=silent_solver)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_float16_that_overflows_in_the_network(tiny_published, guidance):
    pipe = mmdit.load_pipeline(tiny_published, dtype=torch.float16)
    sample(pipe)
    multiplied(pipe.mmdit.blocks[1].image.mlp.fc2, 6e4)
    said = r"step 1 of 4 .*because the network's output is\. Try bfloat16 or float32.*verify=true"
    with pytest.raises(NotFinite, match=said):
        sample(pipe, guidance=guidance)


@pytest.mark.parametrize(
    ("kind", "layer", "name"),
    [
        ("clip_l", "layers.0.mlp.fc2", "CLIP-L"),
        ("clip_g", "layers.0.mlp.fc2", "CLIP-G"),
        ("clip_g", "projection", "CLIP-G"),
        ("t5", "layers.0.gate", "T5"),
    ],
)
def test_float16_that_overflows_in_a_text_encoder(tiny_published, kind, layer, name):
    pipe = mmdit.load_pipeline(tiny_published, dtype=torch.float16)
    multiplied(getattr(pipe.text, kind).model.get_submodule(layer), 6e4)
    with pytest.raises(NotFinite, match=rf"^the text encoder {name} gave .*bfloat16.*verify=true"):
        sample(pipe)


def test_float16_that_overflows_in_the_decoder(tiny_published):
    pipe = mmdit.load_pipeline(tiny_published, dtype=torch.float16)
    multiplied(pipe.autoencoder.decoder.middle[0].conv1, 6e4)
    with pytest.raises(NotFinite, match=r"^the autoencoder's decoder gave .*bfloat16"):
        sample(pipe)


def test_float16_that_overflows_in_the_encoder(tiny_published):
    pipe = mmdit.load_pipeline(tiny_published, dtype=torch.float16)
    multiplied(pipe.autoencoder.encoder.middle[0].conv1, 6e4)
    with pytest.raises(NotFinite, match=r"^the autoencoder's encoder gave .*bfloat16"):
        sample(pipe, image=IMAGE, height=None, width=None, strength=0.6)
    with pytest.raises(NotFinite, match="encoder"):
        to_latents(pipe.autoencoder, IMAGE[None])


@pytest.mark.parametrize(
    ("part", "stage"),
    [
        ("mmdit", "step 1 of 4 .*the network's output"),
        ("autoencoder.decoder", "^the autoencoder's decoder"),
        ("text.clip_l.model", "^the text encoder CLIP-L"),
        ("text.clip_g.model", "^the text encoder CLIP-G"),
        ("text.t5.model", "^the text encoder T5"),
    ],
)
def test_damaged_weights(pipe, part, stage):
    module = pipe.get_submodule(part)
    matrices = [weight for weight in module.parameters() if weight.ndim > 1]
    with torch.no_grad():
        matrices[len(matrices) // 2].view(-1)[0] = float("nan")
    with pytest.raises(NotFinite, match=stage):
        sample(pipe, guidance=4.0)


def test_one_image_of_a_batch_is_enough_and_is_counted():
    x = torch.zeros(3, 3, 4, 4)
    x[1, 0, 2, 2] = float("inf")
    with pytest.raises(NotFinite, match="for 1 of 3 samples"):
        to_pixels(x)


def test_the_measured_autoencoder_is_refused_and_not_scored(pipe, tmp_path):
    with torch.no_grad():
        pipe.autoencoder.decoder.conv_out.bias[0] = float("nan")
    opened = Opened(pipe.autoencoder, tmp_path, False, nullcontext, {})
    with pytest.raises(NotFinite, match="decoder"):
        measure(opened, lambda indices: IMAGE.expand(len(indices), -1, -1, -1), None, range(2), 2)


def test_what_is_finite_is_reported_to_progress_and_sampled_as_before(pipe):
    seen = []
    sample(pipe, guidance=ClassifierFreeGuidance(scale=7.0), progress=lambda *s: seen.append(s[0]))
    assert seen == [0, 1, 2, 3]
