"""Any layer may be replaced by one that keeps its weight in 8 bits: nobody looks inside."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmdit
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.clip import CLIPTextModel
from mmdit.models.clip_image import CLIPImageModel
from mmdit.models.controlnet import ControlledMMDiT, ControlNet, ParallelControlNet
from mmdit.models.mmdit import MMDiT
from mmdit.models.t5 import T5Encoder
from mmdit.text.clip_pair import CLIPPair
from mmdit.text.clip_tokenizer import clip_tokenizer_in
from mmdit.text.conditioning import TextEncoder
from tests.tiny import SIZES, Tiny, inputs

OPERATIONS = {
    nn.Linear: lambda layer: F.linear,
    nn.Conv2d: lambda layer: functools.partial(
        F.conv2d, stride=layer.stride, padding=layer.padding
    ),
}


class Int8(nn.Module):
    """A linear layer or a convolution: 8-bit weight, one scale a row, in the dtype of the input."""

    def __init__(self, layer):
        super().__init__()
        rows = layer.weight.detach().float().flatten(1)
        scale = rows.abs().amax(1).clamp(min=1e-12) / 127
        self.register_buffer("codes", (rows / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.shape, self.operation = layer.weight.shape, OPERATIONS[type(layer)](layer)

    def forward(self, x):
        weight = (self.codes * self.scale[:, None]).view(self.shape).to(x.dtype)
        return self.operation(x, weight, None if self.bias is None else self.bias.to(x.dtype))


class Int8Embedding(nn.Module):
    """Rows in 8 bits with a scale each; float32 whatever the network computes in."""

    def __init__(self, layer):
        super().__init__()
        rows = layer.weight.detach().float()
        self.register_buffer("scale", rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127)
        self.register_buffer("codes", (rows / self.scale).round().to(torch.int8))

    def forward(self, ids):
        return self.codes[ids] * self.scale[ids].float()


def swapped(module):
    """A copy without a single plain layer."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, layer in parent.named_children():
            if type(layer) in OPERATIONS:
                setattr(parent, name, Int8(layer))
            elif isinstance(layer, nn.Embedding):
                setattr(parent, name, Int8Embedding(layer))
    assert not any(isinstance(m, (*OPERATIONS, nn.Embedding)) for m in module.modules())
    return module


@torch.no_grad()
def expect_close(module, call, tolerance):
    """The swapped copy computes nearly the same, in the dtype of the network."""
    expected, actual = call(module), call(swapped(module))
    assert actual.dtype == expected.dtype
    change = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert 0 < change < tolerance, f"{change}"


each_dtype = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 0.1), (torch.bfloat16, 0.15)],
    ids=["float32", "bfloat16"],
)


@pytest.mark.each("backbone")
@each_dtype
def test_a_backbone_of_8_bit_layers(backbone, dtype, tolerance, randomize):
    model = randomize(backbone.normed(), 0).to(dtype)
    expect_close(model, lambda m: m(*inputs()), tolerance)


IDS = torch.tensor([[3, 17, 8, 31, 31, 31], [5, 5, 21, 30, 31, 31]])
ENCODERS = {
    "clip": (
        lambda: CLIPTextModel(
            vocabulary_size=32, width=32, depth=3, num_heads=2, length=6, projection_width=12
        ),
        lambda m: torch.cat([m(IDS).hidden.flatten(1), m(IDS).pooled], dim=1),
    ),
    "t5": (
        lambda: T5Encoder(
            vocabulary_size=32, width=32, depth=3, num_heads=2, head_width=8, hidden=48
        ),
        lambda m: m(IDS),
    ),
    "clip_image": (
        lambda: CLIPImageModel(
            width=32, depth=2, num_heads=2, image_size=8, patch_size=4, projection_width=12
        ),
        lambda m: m(torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8).sin()),
    ),
    "autoencoder": (
        lambda: Autoencoder(latent_channels=4, width=32, multipliers=(1, 2), blocks=1),
        lambda m: m.decode(m.encode(torch.linspace(-9, 9, 3 * 64).view(1, 3, 8, 8).sin())),
    ),
}


@pytest.mark.parametrize("name", ENCODERS)
@each_dtype
def test_an_encoder_of_8_bit_layers(name, dtype, tolerance, randomize):
    build, call = ENCODERS[name]
    expect_close(randomize(build(), 0).to(dtype), call, tolerance)


def test_t5_in_float16_leaves_the_stream_and_its_last_layer_wide(randomize):
    build, call = ENCODERS["t5"]
    model = randomize(build(), 0).half()
    assert {layer.down.weight.dtype for layer in model.layers} == {torch.float32}
    assert {layer.up.weight.dtype for layer in model.layers} == {torch.float16}
    seen = []
    small = swapped(model)
    for layer in small.layers:
        layer.down.register_forward_hook(lambda module, x, out: seen.append(out.dtype))
        assert layer.down.scale.dtype == torch.float32
    with torch.no_grad():
        call(small.half())
    assert seen == [torch.float32] * 3
    expect_close(model, call, 0.1)


@pytest.mark.parametrize("cls", [ControlNet, ParallelControlNet])
@each_dtype
def test_a_control_net_of_8_bit_layers(cls, dtype, tolerance, randomize):
    pooled = {} if cls is ParallelControlNet else {"pooled_width": 10}
    sizes = {name: SIZES[name] for name in ("depth", "width", "num_heads", "latent_channels")}
    model = ControlledMMDiT(base=Tiny(MMDiT)(), control_net=cls(**sizes, **pooled))
    model = randomize(model, 0).to(dtype)
    control = inputs()[0].flip(-1)
    expect_close(model, lambda m: m(*inputs(), control=control), tolerance)


def test_a_clip_pair_of_8_bit_layers(clip_files, randomize):
    tokenizer = clip_tokenizer_in(clip_files, pad_with_end=True)
    text = CLIPTextModel(vocabulary_size=520, width=32, depth=2, num_heads=2, projection_width=12)
    pair = CLIPPair(
        text=TextEncoder(tokenizer=tokenizer, model=text), image=ENCODERS["clip_image"][0]()
    )
    pair = randomize(pair, 0).bfloat16()
    images = torch.arange(2 * 12 * 9 * 3).view(2, 12, 9, 3).to(torch.uint8)
    expect_close(pair, lambda m: m.image_features(images), 0.15)
    expect_close(pair, lambda m: m.text_features(["a red cat", "two dogs"]), 0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_pipeline_of_8_bit_layers_generates(tiny_published, dtype):
    pipe = mmdit.load_pipeline(tiny_published, dtype=dtype)
    small = swapped(pipe)
    assert (small.dtype, small.device.type) == (dtype, "cpu")
    options = {"seed": 1, "steps": 3}
    expected, actual = pipe("a red cat", **options), small("a red cat", **options)
    assert actual.shape == expected.shape
    assert actual.dtype == torch.uint8
    assert 0 < (actual.float() - expected.float()).abs().mean() < 12


@pytest.mark.each("backbone")
def test_a_swapped_network_is_trained_around(backbone, randomize):
    """What is frozen in 8 bits lets gradients through to what is not."""
    model = swapped(randomize(backbone.normed(), 0))
    z_t, *rest = inputs()
    z_t.requires_grad_()
    model(z_t, *rest).square().sum().backward()
    assert z_t.grad.isfinite().all()
    assert z_t.grad.any()
