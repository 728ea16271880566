import pytest
import torch

from mmdit.flow.objective import Objective
from mmdit.flow.paths import RectifiedFlow
from mmdit.flow.predictions import Velocity
from mmdit.flow.schedule import Shift
from mmdit.flow.timesteps import LogitNormal
from mmdit.metrics.encoders import SUBSETS, with_encoders
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.clip import CLIPTextModel
from mmdit.models.mmdit import MMDiT
from mmdit.models.t5 import T5Encoder
from mmdit.pipeline import Pipeline
from mmdit.text.conditioning import ENCODERS, TextConditioner, TextEncoder
from mmdit.text.tokenizers import CLIPWordTokenizer, T5WordTokenizer

PROMPTS = ["red circle", "", "blue"]
WORDS = ["red", "blue", "circle"]


def clip() -> TextEncoder:
    tokenizer = CLIPWordTokenizer(words=WORDS, length=5, pad_with_end=True)
    model = CLIPTextModel(vocabulary_size=9, width=8, depth=2, num_heads=1, length=5)
    return TextEncoder(tokenizer=tokenizer, model=model)


@pytest.fixture
def pipeline(randomize) -> Pipeline:
    torch.manual_seed(0)
    t5 = TextEncoder(
        tokenizer=T5WordTokenizer(words=WORDS, length=5),
        model=T5Encoder(vocabulary_size=9, width=16, depth=1, num_heads=1, hidden=16),
    )
    text = TextConditioner(clip_l=clip(), clip_g=clip(), t5=t5)
    pipeline = Pipeline(
        mmdit=MMDiT(
            depth=2,
            width=16,
            num_heads=1,
            latent_channels=4,
            context_width=16,
            pooled_width=16,
            position_size=8,
        ),
        text=text,
        autoencoder=Autoencoder(latent_channels=4, width=32, multipliers=[1, 1], blocks=0),
        objective=Objective(
            path=RectifiedFlow(),
            timesteps=LogitNormal(),
            prediction=Velocity(),
            shift=Shift(),
        ),
        image_size=16,
    )
    return randomize(pipeline, 0)


def test_there_are_eight_different_subsets():
    assert SUBSETS[0] == ENCODERS and SUBSETS[-1] == ()
    assert len(set(SUBSETS)) == 8


@pytest.mark.parametrize("kept", SUBSETS, ids="+".join)
@torch.no_grad()
def test_silence_is_what_training_drops(kept, pipeline):
    """An encoder left out contributes what it does when the paper's dropout takes it."""
    flags = torch.tensor([[kind in kept for kind in ENCODERS]]).expand(3, 3)
    whole = pipeline.text
    expected = whole(whole.tokenize(PROMPTS), flags)
    view = with_encoders(pipeline, kept, empty_prompt="encoded")
    condition = view.text.encode(PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(condition[:2], expected[:2], strict=True))


@torch.no_grad()
def test_the_pipeline_itself_stays_as_it_was(pipeline):
    before, text = pipeline.text.encode(PROMPTS), pipeline.text
    view = with_encoders(pipeline, ("t5",), empty_prompt="encoded")
    assert pipeline.text is text
    assert pipeline.text.empty_prompt == "zeros" != view.text.empty_prompt
    after = pipeline.text.encode(PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(before[:2], after[:2], strict=True))
    assert view.mmdit is pipeline.mmdit
    assert not view.text.training


def test_all_kept_samples_the_same_and_none_kept_the_same_for_every_prompt(pipeline):
    options = {"seeds": [0, 0, 0], "steps": 2, "guidance": 3.0}
    plain = pipeline(PROMPTS, **options)
    assert torch.equal(with_encoders(pipeline, ENCODERS)(PROMPTS, **options), plain)
    silent = with_encoders(pipeline, ())(PROMPTS, **options)
    assert torch.equal(silent[0], silent[2])
    assert torch.equal(silent[1], plain[1])  # the empty prompt is all zeros anyway
    assert not torch.equal(plain[0], plain[2])
