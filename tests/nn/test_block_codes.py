"""Weights in codes of 2 to 8 bits: decoded as ggml decodes them, and multiplied with as such."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor, nn

from mmdit.nn.block_codes import BLOCK_TYPES, EIGHT_BITS, Codes
from mmdit.nn.stored import CodedWeight, plain

DECODED = [name for name, block in BLOCK_TYPES.items() if block.decode is not None]


def random_codes(kind: str, rows: int, width: int, seed: int = 0) -> Codes:
    """Random bytes, scales near 1; all bit patterns of the values occur."""
    block = BLOCK_TYPES[kind]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows * width // block.values, block.size), dtype=np.uint8)
    for start in block.scales:
        scale = generator.standard_normal((len(blocks), 1)).astype(np.float16)
        blocks[:, start : start + 2] = scale.view(np.uint8)
    return Codes(kind, torch.from_numpy(blocks.reshape(rows, -1)))


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_a_block_has_the_size_that_ggml_gives_it(kind: str) -> None:
    block = BLOCK_TYPES[kind]
    assert GGML_QUANT_SIZES[GGMLQuantizationType[kind]] == (block.values, block.size)


@pytest.mark.parametrize("kind", DECODED)
def test_values_are_those_of_ggml_to_the_last_bit(kind: str) -> None:
    codes = random_codes(kind, rows=7, width=768)
    expected = dequantize(codes.rows.numpy(), GGMLQuantizationType[kind])
    assert codes.shape == expected.shape == (7, 768)
    assert np.array_equal(codes.decoded(torch.float32).numpy(), expected)
    assert torch.equal(codes.decoded(torch.bfloat16), torch.from_numpy(expected).bfloat16())


def test_a_large_matrix_is_decoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes("Q4_K", rows=11, width=256)
    whole = codes.decoded(torch.float32)
    monkeypatch.setattr("mmdit.nn.block_codes.PIECE", 3 * 256)
    assert torch.equal(codes.decoded(torch.float32), whole)


@pytest.mark.parametrize("kind", DECODED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_found_without_decoding(kind: str, value: float) -> None:
    codes = random_codes(kind, rows=2, width=512)
    assert codes.is_finite() and codes.decoded(torch.float32).isfinite().all()
    block = BLOCK_TYPES[kind]
    for start in block.scales:
        spoilt = copy.deepcopy(codes)
        last = spoilt.rows.view(-1, block.size)[-1]
        last[start : start + 2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
        assert not spoilt.is_finite()


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_8_bit_floats_have_one_scale(kind: str) -> None:
    numbers = torch.linspace(-3, 3, 12).view(3, 4).to(EIGHT_BITS[kind])
    scale = torch.tensor(0.3)
    codes = Codes(kind, numbers.view(torch.uint8), scale)
    assert codes.shape == (3, 4) and codes.is_finite()
    assert torch.equal(codes.decoded(torch.float32), numbers.float() * scale)
    assert torch.equal(codes._replace(scale=None).decoded(torch.float32), numbers.float())
    codes.rows[1, 2] = 0x7F  # NaN in both
    assert not codes.is_finite()


# A layer that keeps them


def layer_of(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor]:
    """A layer whose weight is kept in codes, and the values of this weight."""
    torch.manual_seed(0)
    if kind in EIGHT_BITS:
        stored = torch.randn(64, 256).to(EIGHT_BITS[kind])
        codes = Codes(kind, stored.view(torch.uint8), torch.tensor(0.25))
    else:
        codes = random_codes(kind, rows=64, width=256)
    layer = nn.Linear(256, 64).to(dtype)
    layer.weight = nn.Parameter(CodedWeight(codes, dtype), requires_grad=False)
    return layer, codes.decoded(dtype)


@pytest.mark.parametrize("kind", [*DECODED, *EIGHT_BITS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_the_decoded_weight(kind: str, dtype: torch.dtype) -> None:
    layer, weight = layer_of(kind, dtype)
    x = torch.randn(2, 5, 256, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, weight, layer.bias))
    assert layer.weight.shape == weight.shape and layer.weight.dtype == dtype
    assert torch.equal(plain(layer.weight), weight)


def test_gradients_pass_through_to_the_input_and_the_bias() -> None:
    layer, weight = layer_of("Q5_K")
    kept: list[Tensor] = []
    for shape in ((3, 4, 256), (256,)):
        x = torch.randn(shape, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = layer(x)
        gradients = torch.autograd.grad(y.square().sum(), (x, layer.bias))
        expected = torch.autograd.grad(
            F.linear(x, weight, layer.bias).square().sum(), (x, layer.bias)
        )
        for gradient, own in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, own)
    assert {type(tensor) for tensor in kept} == {CodedWeight}  # no decoded copy waits
    assert not layer.weight.requires_grad


def test_a_layer_is_moved_cast_copied_and_stored_like_any_other() -> None:
    layer, weight = layer_of("Q6_K")
    size = weight.numel() // 256 * 210
    assert layer.weight.stored_bytes == size
    twin = copy.deepcopy(layer)
    assert isinstance(twin.weight, nn.Parameter) and not twin.weight.requires_grad
    assert twin.weight.codes.rows.data_ptr() != layer.weight.codes.rows.data_ptr()
    assert torch.equal(plain(twin.weight), weight)
    twin.to(torch.float64)
    assert twin.weight.stored_bytes == size and twin.weight.dtype == torch.float64
    assert torch.equal(plain(twin.weight), weight.double())
    assert twin(torch.zeros(1, 256, dtype=torch.float64)).dtype == torch.float64
    assert layer.weight.dtype == torch.float32
    other = nn.Linear(256, 64, device="meta")
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(plain(other.weight), weight)
    assert twin.to("meta").weight.codes.rows.is_meta


def test_others_read_its_values_and_cannot_change_them() -> None:
    layer, weight = layer_of("Q4_1")
    assert torch.equal(layer.weight.abs().amax(1), weight.abs().amax(1))
    x = torch.randn(3, 64)
    assert torch.equal(x @ layer.weight, x @ weight)
    with pytest.raises(RuntimeError, match="kept in codes cannot be changed"), torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(plain(layer.weight), weight)


@pytest.mark.slow
def test_a_layer_is_compiled_whole() -> None:
    layer, _ = layer_of("Q5_1")
    x = torch.randn(2, 256)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize(("kind", "error"), [("Q8_0", 0.0065), ("Q5_1", 0.045), ("Q4_0", 0.1)])
def test_the_error_of_normal_weights_is_that_of_the_bits(kind: str, error: float) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    rows = torch.from_numpy(quantize(weight.numpy(), GGMLQuantizationType[kind]))
    change = (Codes(kind, rows).decoded(torch.float32) - weight).norm() / weight.norm()
    assert 0.7 * error < change < error
