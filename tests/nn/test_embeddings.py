import pytest
import torch
from torch import nn

from mmdit.nn.embeddings import (
    PatchEmbedding,
    VectorEmbedding,
    centre_crop,
    position_table,
    sinusoid,
    unpatchify,
)


def test_sinusoid_matches_the_reference(golden):
    case = golden("embeddings")
    torch.testing.assert_close(
        sinusoid(case.inputs["timesteps"] / 1000),
        case.outputs["timestep_embedding_256"],
        rtol=0,
        atol=case.config["tolerance"]["timestep_embedding"],
    )


def test_sinusoid_is_cosines_of_1000_t_then_sines():
    t = torch.tensor([0.0, 0.001, 0.5])
    embedded = sinusoid(t, width=6, max_period=100.0)
    frequency = torch.tensor([1.0, 100 ** (-1 / 3), 100 ** (-2 / 3)])
    angle = torch.tensor([0.0, 1.0, 500.0])[:, None] * frequency
    expected = torch.cat([angle.cos(), angle.sin()], dim=1)
    torch.testing.assert_close(embedded, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_1001_timesteps_stay_distinct_in_float32(dtype):
    embedded = sinusoid(torch.linspace(0, 1, 1001, dtype=dtype))
    assert embedded.dtype == torch.float32
    nearest = torch.cdist(embedded, embedded).fill_diagonal_(float("inf")).min()
    assert nearest > 0.5


def test_negative_times_are_told_from_positive_ones_by_their_sines():
    """An F-prediction gives log(b_t) / 4 for the time, negative where there is little noise."""
    t = torch.tensor([0.3, 1.5])
    cosines, sines = sinusoid(t).chunk(2, dim=1)
    assert torch.equal(sinusoid(-t), torch.cat([cosines, -sines], dim=1))


def test_vector_embedding_is_linear_silu_linear():
    embedding = VectorEmbedding(5, 7)
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    expected = embedding.fc2(nn.functional.silu(embedding.fc1(x)))
    torch.testing.assert_close(embedding(x), expected)


@pytest.mark.parametrize(
    ("key", "arguments"),
    [
        ("dim64_grid12_scaleNone_offsetNone", {"width": 64, "size": 12, "grid": 12, "base": 12}),
        ("dim64_grid12_scale1.5_offsetNone", {"width": 64, "size": 12, "grid": 12, "base": 8}),
        ("dim96_grid9_scale3.0_offsetNone", {"width": 96, "size": 9, "grid": 9, "base": 3}),
        ("dim64_grid8_scale2.0_offset0.5", {"width": 64, "size": 8, "grid": 6, "base": 3}),
    ],
)
def test_position_table_matches_the_reference(golden, key, arguments):
    case = golden("embeddings")
    table = position_table(**arguments).flatten(0, 1)
    case.check(f"pos64.{key}", table.double())


def test_the_public_table_spans_the_papers_grid():
    """192 patches a side, trained at 64, pretrained at 16: from -16 to 31.75 (Sec. 5.3.2)."""
    table = position_table(16, size=192, grid=64, base=16)
    column, row = table[..., :8], table[..., 8:]
    assert torch.equal(
        column[0], row[:, 0]
    )  # the first half encodes the column, the second the row
    assert (column == column[:1]).all() and (row == row[:, :1]).all()
    coordinate = torch.linspace(-16, 31.75, 192, dtype=torch.float64)
    assert coordinate.diff()[0].item() == pytest.approx(0.25)
    omega = torch.tensor([1.0, 1e-1, 1e-2, 1e-3], dtype=torch.float64)
    angle = coordinate[:, None] * omega
    expected = torch.cat([angle.sin(), angle.cos()], dim=1).float()
    torch.testing.assert_close(column[0], expected, rtol=0, atol=1e-6)


def test_the_middle_of_the_table_is_the_training_grid():
    table = position_table(16, size=192, grid=64, base=16)
    trained = centre_crop(table, 64, 64).unflatten(0, (64, 64))
    assert torch.equal(trained, position_table(16, size=64, grid=64, base=16))


def test_crop_matches_the_reference(golden):
    case = golden("mmdit_shapes")
    size = case.config["model"]["pos_embed_max_size"]
    table = case.weights["pos_embed"].unflatten(1, (size, size))[0]
    for n, (height, width) in enumerate(case.config["call"]["latent_sizes"]):
        assert torch.equal(centre_crop(table, height // 2, width // 2), case.outputs[f"pos_{n}"][0])


def test_an_odd_remainder_leaves_the_smaller_half_before_the_crop():
    table = torch.arange(5 * 5).reshape(5, 5, 1)
    assert centre_crop(table, 2, 4).flatten().tolist() == [5, 6, 7, 8, 10, 11, 12, 13]
    assert centre_crop(table, 5, 5).flatten().tolist() == list(range(25))


def test_patch_embedding_is_a_strided_convolution():
    embedding = PatchEmbedding(3, 8, 2)
    z = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    kernel = embedding.proj.weight.reshape(8, 3, 2, 2)
    convolved = nn.functional.conv2d(z, kernel, embedding.proj.bias, stride=2)
    torch.testing.assert_close(embedding(z), convolved.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_unpatchify_puts_every_value_back(patch_size):
    """Patches come row by row; in the output of the network a patch is (row, column, channel)."""
    p, rows, columns, channels = patch_size, 3, 2, 5
    z = torch.randn(2, channels, rows * p, columns * p, generator=torch.Generator().manual_seed(0))
    tokens = torch.stack(
        [
            z[:, :, r * p : r * p + p, c * p : c * p + p].permute(0, 2, 3, 1).flatten(1)
            for r in range(rows)
            for c in range(columns)
        ],
        dim=1,
    )
    assert torch.equal(unpatchify(tokens, rows=rows, columns=columns, patch_size=p), z)


def test_patch_embedding_reads_patches_row_by_row():
    embedding = PatchEmbedding(1, 4, 2)
    nn.init.eye_(embedding.proj.weight)
    nn.init.zeros_(embedding.proj.bias)
    z = torch.arange(24.0).reshape(1, 1, 4, 6)
    assert embedding(z)[0, 1].tolist() == [2.0, 3.0, 8.0, 9.0]
    assert embedding(z)[0, 3].tolist() == [12.0, 13.0, 18.0, 19.0]
    # With one channel both layouts of a patch agree, so unpatchify is its inverse.
    assert torch.equal(unpatchify(embedding(z), rows=2, columns=3, patch_size=2), z)
