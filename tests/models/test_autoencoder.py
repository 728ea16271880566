from pathlib import Path

import pytest
import torch
import yaml

from mmdit.errors import UserError
from mmdit.models.autoencoder import Autoencoder, Posterior
from tests.references import cases

CONFIGS = Path(__file__).parents[2] / "configs" / "autoencoder"
TINY = {"latent_channels": 4, "width": 32, "multipliers": (1, 2), "blocks": 1}


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def on_meta(file: Path) -> Autoencoder:
    model = yaml.safe_load(file.read_text())["model"]
    del model["_target_"]
    with torch.device("meta"):
        return Autoencoder(**model)


def test_parameters_of_the_public_autoencoder():
    autoencoder = on_meta(CONFIGS / "sd3.yaml")
    assert sum(parameter.numel() for parameter in autoencoder.parameters()) == 83_819_683
    assert autoencoder.factor == 8


@pytest.mark.parametrize("name", ["sd3", "toy"])
def test_every_architecture_builds(name):
    assert on_meta(CONFIGS / f"{name}.yaml").latent_channels == 16


@torch.no_grad()
def test_latents_are_smaller_by_the_factor_and_decode_to_the_image_size(randomize):
    autoencoder = randomize(Autoencoder(**TINY), 0)
    x = images(2, 3, 8, 12)
    latent = autoencoder.encode(x)
    assert latent.shape == (2, 4, 4, 6)
    assert autoencoder.decode(latent).shape == x.shape


@torch.no_grad()
def test_encode_gives_the_mean_or_with_a_generator_a_sample(randomize):
    autoencoder = randomize(Autoencoder(**TINY), 0)
    x = images(2, 3, 8, 8)
    posterior = autoencoder.posterior(x)
    assert torch.equal(autoencoder.encode(x), (posterior.mean - 0.0609) * 1.5305)
    sample = autoencoder.encode(x, generator())
    noise = torch.randn(posterior.mean.shape, generator=generator())
    expected = posterior.mean + posterior.log_variance.exp().sqrt() * noise
    torch.testing.assert_close(sample, (expected - 0.0609) * 1.5305)
    assert torch.equal(autoencoder.encode(x, generator()), sample)
    assert not torch.equal(autoencoder.encode(x, generator(1)), sample)


@torch.no_grad()
def test_scale_and_shift_are_undone_before_decoding(randomize):
    autoencoder = randomize(Autoencoder(**TINY), 0)
    raw = torch.randn(1, 4, 4, 4, generator=generator())
    decoded = autoencoder.decode((raw - autoencoder.shift) * autoencoder.scale)
    torch.testing.assert_close(decoded, autoencoder.decoder(raw), rtol=0, atol=1e-5)


@torch.no_grad()
def test_normalize_gives_latents_mean_zero_and_deviation_one(randomize):
    autoencoder = randomize(Autoencoder(**TINY), 0)
    x = images(8, 3, 8, 8)
    mean = autoencoder.posterior(x).mean
    before = autoencoder.decoder(mean)
    autoencoder.normalize(mean.mean(), mean.std())
    latent = autoencoder.encode(x)
    assert latent.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert latent.std().item() == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(autoencoder.decode(latent), before, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_layout_of_a_wide_autoencoder_changes_no_number(randomize):
    autoencoder = randomize(Autoencoder(**{**TINY, "width": 128}), 0)
    formats = []
    for conv in (autoencoder.encoder.conv_in, autoencoder.decoder.conv_in):
        conv.register_forward_hook(
            lambda _module, _input, out: formats.append(
                out.is_contiguous(memory_format=torch.channels_last)
            )
        )
    x = images(2, 3, 8, 8)
    latent = autoencoder.encode(x)
    decoded = autoencoder.decode(latent)
    assert formats == [True, True]
    autoencoder.memory_format = torch.contiguous_format
    torch.testing.assert_close(latent, autoencoder.encode(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(decoded, autoencoder.decode(latent), rtol=0, atol=1e-5)
    assert formats == [True, True, False, False]


def test_scale_and_shift_are_saved_with_the_model():
    autoencoder = Autoencoder(**TINY, scale=2.0, shift=0.25)
    state = autoencoder.state_dict()
    assert state["scale"] == 2.0 and state["shift"] == 0.25
    other = Autoencoder(**TINY)
    other.load_state_dict(state)
    assert other.scale == 2.0 and other.shift == 0.25


def test_kl_matches_torch():
    mean, log_variance = torch.randn(2, 3, 4, 2, 2, generator=generator())
    ours = Posterior(mean, log_variance).kl()
    gaussian = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    unit = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    torch.testing.assert_close(ours, torch.distributions.kl_divergence(gaussian, unit))
    assert not Posterior(torch.zeros(3), torch.zeros(3)).kl().any()


def test_log_variance_is_clamped():
    autoencoder = Autoencoder(**TINY)
    with torch.no_grad():
        autoencoder.encoder.conv_out.bias[4:6] = 1000.0
        autoencoder.encoder.conv_out.bias[6:] = -1000.0
        log_variance = autoencoder.posterior(images(1, 3, 4, 4)).log_variance
    assert (log_variance[:, :2] == 20).all() and (log_variance[:, 2:] == -30).all()


@torch.no_grad()
def test_images_do_not_mix(randomize):
    autoencoder = randomize(Autoencoder(**TINY), 0)
    x = images(3, 3, 8, 8)
    together = autoencoder.encode(x)
    for i in range(3):
        alone = autoencoder.encode(x[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(9, 8), (8, 9)])
def test_a_side_that_is_no_multiple_of_the_factor_is_named(size):
    name, side = ("height", 9) if size[0] == 9 else ("width", 9)
    with pytest.raises(UserError, match=f"image {name} {side} must be a multiple of 2"):
        Autoencoder(**TINY).encode(images(1, 3, *size))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"width": 48}, "width 48 must be divisible by 32"),
        ({"width": 0}, "width=0 must be a whole number of at least 1"),
        ({"latent_channels": 0}, "latent_channels=0 must be a whole number of at least 1"),
        ({"multipliers": []}, "levels=0 must be a whole number of at least 1"),
        ({"multipliers": [1, 0]}, "multiplier=0 must be a whole number of at least 1"),
    ],
)
def test_impossible_arguments_are_named(mistake, message):
    with pytest.raises(UserError, match=message):
        Autoencoder(**{**TINY, **mistake})


# Parity


@pytest.mark.parametrize("name", cases("vae_a", "vae_b", "vae_eps"))
@torch.no_grad()
def test_encoder_and_decoder_match_the_reference(golden, load_original, name):
    case = golden(name)
    theirs = case.config["model"]
    autoencoder = Autoencoder(
        latent_channels=theirs["z_channels"],
        width=theirs["ch"],
        multipliers=theirs["ch_mult"],
        blocks=theirs["num_res_blocks"],
    )
    load_original(autoencoder, case.weights)
    for n in range(len(case.config["call"]["sizes"])):
        x = case.inputs[f"image_u8_{n}"].permute(0, 3, 1, 2).float() / 127.5 - 1
        case.check(f"moments_{n}", autoencoder.encoder(x))
        sample = autoencoder.posterior(x).sample(case.inputs[f"noise_{n}"])
        case.check(f"sample_{n}", sample)
        case.check(f"latent_{n}", (sample - autoencoder.shift) * autoencoder.scale)
        case.check(f"decoded_{n}", autoencoder.decode(case.inputs[f"z_{n}"]))


@torch.no_grad()
def test_encoder_and_decoder_match_diffusers(load_diffusers, randomize):
    diffusers = pytest.importorskip("diffusers")
    multipliers, blocks = (1, 2, 1), 2
    peer = diffusers.AutoencoderKL(
        block_out_channels=[32 * multiplier for multiplier in multipliers],
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=blocks,
        latent_channels=16,
        norm_num_groups=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    randomize(peer, 0)
    autoencoder = Autoencoder(width=32, multipliers=multipliers, blocks=blocks)
    load_diffusers(autoencoder, peer.state_dict())

    x = images(2, 3, 16, 8)
    theirs = peer.encode(x).latent_dist
    posterior = autoencoder.posterior(x)
    torch.testing.assert_close(posterior.mean, theirs.mean, rtol=0, atol=2e-5)
    torch.testing.assert_close(posterior.log_variance, theirs.logvar, rtol=0, atol=2e-5)
    z = torch.randn(2, 16, 4, 2, generator=generator())
    decoded = peer.decode(z / 1.5305 + 0.0609).sample
    torch.testing.assert_close(autoencoder.decode(z), decoded, rtol=0, atol=2e-5)
