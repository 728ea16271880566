import numpy as np
import pytest
import torch
from torch import nn

from mmdit.errors import NotFinite, UserError
from mmdit.flow.condition import Condition
from mmdit.flow.grids import KarrasGrid
from mmdit.flow.guidance import (
    ClassifierFreeGuidance,
    GuidanceInterval,
    GuidanceRescale,
    SkipLayerGuidance,
    ZeroUnconditional,
)
from mmdit.flow.objective import Objective
from mmdit.flow.paths import RectifiedFlow
from mmdit.flow.predictions import Velocity
from mmdit.flow.schedule import PublishedShift
from mmdit.flow.solvers import dpmpp_2m, euler, heun, midpoint
from mmdit.flow.timesteps import LogitNormal
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.controlnet import ControlledMMDiT, ControlNet, control_pixels
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline import Pipeline, from_pixels, to_pixels
from mmdit.registry import register
from mmdit.request import Request


@register
class Letters(nn.Module):
    """The minimal interface of a text conditioner: two widths and `encode`."""

    context_width, pooled_width = 6, 5

    def encode(self, prompts):
        counts = [[prompt.count(letter) for letter in "abcde"] for prompt in prompts]
        c_vec = torch.tensor(counts, dtype=torch.float32)
        return Condition(c_vec, c_vec[:, :4, None].expand(-1, -1, 6))


@pytest.fixture
def pipe(randomize):
    """A pipeline that samples 8 x 8 images, or up to 16 x 16, in four steps."""
    pipe = Pipeline(
        mmdit=MMDiT(
            depth=3,
            width=16,
            num_heads=2,
            latent_channels=4,
            context_width=6,
            pooled_width=5,
            position_size=4,
            position_grid=2,
            position_base=2,
        ),
        text=Letters(),
        autoencoder=Autoencoder(latent_channels=4, width=32, multipliers=(1, 1), blocks=0),
        objective=Objective(
            path=RectifiedFlow(),
            timesteps=LogitNormal(),
            prediction=Velocity(),
            shift=PublishedShift(alpha=3.0),
        ),
        image_size=8,
        steps=4,
        guidance=2.0,
    )
    return randomize(pipe, 0)


@pytest.fixture
def batches(pipe):
    """(batch size, time) of every evaluation of the network."""
    seen = []
    pipe.mmdit.register_forward_pre_hook(
        lambda module, inputs: seen.append((len(inputs[0]), inputs[1][0].item()))
    )
    return seen


def random_image(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8)


def test_images_are_uint8_prompts_outermost(pipe):
    images = pipe(["a", "b"], num_images=2, height=8, width=12)
    assert images.shape == (4, 8, 12, 3) and images.dtype == torch.uint8
    alone = pipe("b", height=8, width=12, seed=1)
    assert (images[3].int() - alone[0].int()).abs().max() <= 1
    assert not torch.equal(images[1], images[3])


@pytest.mark.parametrize(("guidance", "size"), [(None, 2), (7.0, 2), (1.0, 1)])
def test_the_network_sees_every_time_of_the_grid_and_twice_the_batch_if_guided(
    pipe, batches, guidance, size
):
    pipe("a", guidance=guidance)
    grid = pipe.objective.shift.grid(4).float()
    assert batches == [(size, t) for t in grid[:-1].tolist()]


def test_strength_zero_encodes_and_decodes(pipe, batches):
    image = random_image(8, 12)
    with torch.no_grad():  # as in the pipeline: kernels may round differently under autograd
        latent = pipe.autoencoder.encode(from_pixels(image[None]))
        expected = to_pixels(pipe.autoencoder.decode(latent))
    assert torch.equal(pipe("a", image=image, strength=0.0), expected)
    assert batches == []


def test_strength_one_keeps_nothing(pipe):
    images = [pipe("a", image=random_image(8, 8, seed=seed), strength=1.0) for seed in (0, 1)]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], pipe("a"))


def test_strength_determines_how_many_steps_remain(pipe, batches):
    reported = []
    pipe(
        "a",
        image=random_image(8, 8),
        strength=0.3,
        steps=10,
        progress=lambda *step: reported.append(step),
    )
    assert len(batches) == len(reported) == 3
    assert batches[0][1] == pytest.approx(pipe.objective.shift.grid(10)[7].item())


def test_progress_receives_the_latents_that_decode_to_the_images(pipe):
    reported = []
    sampled = pipe("a", num_images=2, steps=3, progress=lambda *step: reported.append(step))
    assert [i for i, _, _ in reported] == [0, 1, 2]
    assert [t for _, t, _ in reported] == pipe.objective.times(3)[1:].tolist()
    latents = [z for _, _, z in reported]
    assert all(z.shape == pipe.noise([0, 1], 8, 8).shape for z in latents)
    with torch.no_grad():  # as in the pipeline: kernels may round differently under autograd
        assert torch.equal(to_pixels(pipe.autoencoder.decode(latents[-1])), sampled)
    assert not torch.equal(latents[0], latents[-1])


def test_the_image_is_mixed_with_the_noise_of_its_seed(pipe):
    """A solver that does nothing returns the start of the path."""
    image = random_image(8, 8)
    begun = []

    def solver(velocity, z, grid, progress):
        begun.append((z, grid[0].item()))
        return z

    pipe("a", image=image, strength=0.5, seed=3, solver=solver)
    z, t = begun[0]
    x_0 = pipe.autoencoder.encode(from_pixels(image[None]))
    noise = pipe.noise([3], 8, 8)
    torch.testing.assert_close(z, (1 - t) * x_0 + t * noise)
    assert 0 < t < 1


def test_each_prompt_has_its_own_image_or_all_share_one(pipe):
    images = random_image(2, 8, 8)
    sampled = pipe(["a", "b"], image=images, strength=0.0, num_images=2)
    alone = [pipe("a", image=image, strength=0.0)[0] for image in images]
    for i, expected in enumerate([alone[0], alone[0], alone[1], alone[1]]):
        assert (sampled[i].int() - expected.int()).abs().max() <= 1
    shared = pipe(["a", "b"], image=images[0], strength=0.0)
    assert (shared.int() - alone[0].int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": random_image(8, 8)}, "image and strength belong together"),
        ({"strength": 0.5}, "image and strength belong together"),
        (
            {"image": random_image(8, 8), "strength": 1.5},
            r"strength=1.5 must .* and at most 1",
        ),
        ({"image": random_image(8, 8), "strength": float("nan")}, "strength=nan"),
        ({"image": random_image(8, 10), "strength": 0.5}, "width=10 must be a multiple of 4"),
        ({"image": random_image(20, 8), "strength": 0.5}, "height=20 .* from 4 to 16"),
        ({"image": random_image(8, 8), "strength": 0.5, "width": 12}, "width=12 .* image has 8"),
        ({"image": random_image(8, 8).float(), "strength": 0.5}, "float32.* uint8"),
        ({"image": random_image(8, 8).numpy(), "strength": 0.5}, "ndarray.* uint8"),
        (
            {"image": random_image(8, 8)[..., 0], "strength": 0.5},
            r"\(8, 8\) must be \(height, width",
        ),
        ({"image": random_image(3, 8, 8), "strength": 0.5}, r"\(1, height, width, 3\)"),
        ({"height": 0}, "height=0"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 10**9}, "steps=1000000000 must be a whole number from 1 to 10,000"),
        ({"height": 10**9}, "height=1000000000 must be a multiple of 4"),
        ({"width": 10**30}, r"width=10*0 must be a whole number from 1 to 2\^63 - 1"),
        ({"num_images": 10**9}, "num_images=1000000000 .* from 1 to 10,000"),
        ({"num_images": 0}, "num_images=0"),
        ({"seeds": [1, 2]}, "2 seeds for 1 images"),
        ({"seed": 0, "seeds": [1]}, "seed and seeds exclude each other"),
        ({"seeds": 5}, "5 seeds for 1 images: give a list"),
        *(({"seed": s}, "seed=.* must be a whole number") for s in ("3", 1.5, True, -1)),
        *(({"seed": s}, "seed=.* must be a whole number") for s in (2**64, np.float64(1.0))),
        ({"seed": 2**64}, r"must be a whole number from 0 to 2\^64 - 1$"),
        ({"seeds": [-1]}, r"seeds\[0\]=-1 must be a whole number from 0 to 2\^64 - 1$"),
        ({"seed": 2**64 - 3, "num_images": 4}, r"from 0 to 2\^64 - 4: seeds of 4 images"),
        *(({"height": h}, "height=.* must be a whole number") for h in ("8", 8.0, True)),
        *(({"num_images": n}, "num_images=.* must be a whole") for n in ("2", 2.0, False)),
        *(({"steps": n}, "steps=.* must be a whole number") for n in ("4", 4.5, True)),
        *(({"guidance": g}, "guidance=.* must be a finite") for g in ("2", float("inf"), True)),
        (
            {"image": random_image(8, 8), "strength": "0.5"},
            "strength='0.5' must be a finite number",
        ),
        ({"solver": "euler"}, r"solver='euler' must be a function of mmdit\.flow\.solvers"),
        ({"grid": "uniform"}, r"grid='uniform' must be an object of mmdit\.flow\.grids"),
        ({"negative_prompt": []}, "negative_prompt is an empty list"),
        ({"negative_prompt": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_impossible_requests_are_rejected(pipe, arguments, message):
    with pytest.raises(UserError, match=message):
        pipe("a", **arguments)


def test_the_total_number_of_images_is_limited(pipe):
    with pytest.raises(UserError, match=r"2 prompts x num_images=9000 are 18,000 images.*10,000"):
        pipe(["a", "b"], num_images=9000)


def test_the_default_number_of_steps_is_limited_too(pipe):
    pipe.steps = 10**9
    with pytest.raises(UserError, match="steps=1000000000"):
        pipe("a")


def test_the_largest_seeds_are_valid_and_differ(pipe):
    last = 2**64 - 1
    images = pipe("a", seed=last - 1, num_images=2, steps=1)
    alone = pipe("a", seed=last, steps=1)[0]
    assert (images[1].int() - alone.int()).abs().max() <= 1
    assert torch.equal(alone, pipe("a", seeds=[np.uint64(last)], steps=1)[0])
    assert torch.equal(pipe.noise([last], 8, 8), pipe.noise([2**32 - 1], 8, 8))
    assert not torch.equal(images[0], images[1])


def test_guidance_may_be_an_object_that_skips_layers(pipe, batches):
    plain = ClassifierFreeGuidance(scale=2.0)
    guide = SkipLayerGuidance(inner=plain, skip_scale=2.5, layers=(1,), start=0.0, end=0.6)
    skipping = pipe("a", guidance=guide, solver=dpmpp_2m)
    assert [size for size, _ in batches] == [2, 2, 1, 2, 1, 2]  # steps 1 and 2 of 0 to 3
    assert not torch.equal(skipping, pipe("a", solver=dpmpp_2m))
    guide.skip_scale = 0.0
    assert torch.equal(pipe("a", guidance=guide), pipe("a"))


def test_skipping_layers_that_do_not_exist_is_rejected(pipe):
    with pytest.raises(UserError, match="7"):
        pipe("a", guidance=SkipLayerGuidance(inner=ClassifierFreeGuidance()))


@pytest.mark.parametrize(
    ("arguments", "evaluations"),
    [
        ({}, 8),  # four steps, each conditional and unconditional
        ({"guidance": 1.0}, 4),
        ({"num_images": 3}, 8),
        ({"solver": midpoint}, 16),
        ({"solver": heun, "guidance": 1.0}, 7),
        ({"strength": 0.5, "image": torch.zeros(8, 8, 3, dtype=torch.uint8)}, 4),
        # The first step, at sigma = 1, and the last, at 0.009, are conditional only.
        ({"guidance": GuidanceInterval(inner=ClassifierFreeGuidance())}, 6),
    ],
)
def test_network_evaluations_are_counted_per_image(pipe, arguments, evaluations):
    assert pipe.sample(Request("a", **arguments)).function_evaluations == evaluations


def test_a_grid_replaces_that_of_the_formulation(pipe, batches):
    pipe("a", grid=KarrasGrid(sigma_max=9.0), guidance=1.0)
    assert batches[0][1] == pytest.approx(
        KarrasGrid(sigma_max=9.0)(4, PublishedShift(alpha=3.0), RectifiedFlow())[0].item()
    )


def test_state_and_guidance_stay_float32_while_networks_are_bfloat16(pipe):
    dtypes = set()

    def solver(velocity, z, grid, progress):
        dtypes.update((z.dtype, velocity(z, 0.9).dtype))
        return z

    expected = pipe("aab", image=random_image(8, 8), strength=0.7)
    pipe.mmdit.bfloat16()
    pipe.autoencoder.bfloat16()
    pipe("aab", image=random_image(8, 8), strength=0.7, solver=solver)
    assert dtypes == {torch.float32}
    close = pipe("aab", image=random_image(8, 8), strength=0.7)
    assert (close.float() - expected.float()).abs().mean() < 4


def test_networks_follow_the_surrounding_autocast_and_the_flow_stays_float32(pipe):
    computed, flow = set(), set()
    for network in (pipe.mmdit.context_embedding, pipe.autoencoder.decoder.conv_in):
        network.register_forward_hook(lambda *hooked: computed.add(hooked[-1].dtype))

    def solver(velocity, z, grid, progress):
        z = euler(velocity, z, grid, progress)
        flow.add(z.dtype)
        return z

    pipe("a", solver=solver)
    assert computed == flow == {torch.float32}
    computed.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pipe("a", solver=solver)
    assert computed == {torch.bfloat16} and flow == {torch.float32}


@pytest.mark.parametrize("direction", ["process_in", "process_out"])
def test_latents_are_normalized_as_in_the_reference(golden, monkeypatch, direction):
    """With an identity encoder and decoder, only scale and shift remain."""
    case = golden("latent_format")
    x = case.inputs["x"]
    autoencoder = Autoencoder(width=32, multipliers=(1,), blocks=0)
    monkeypatch.setattr(autoencoder.encoder, "forward", lambda x: torch.cat([x, x], dim=1))
    monkeypatch.setattr(autoencoder.decoder, "forward", lambda z: z)
    run = {"process_in": autoencoder.encode, "process_out": autoencoder.decode}[direction]
    case.check(direction, run(x))


def test_numpy_and_torch_numbers_are_accepted(pipe):
    plain = pipe("a", steps=2, seed=3, guidance=2.5, height=8, num_images=2)
    others = {"steps": np.int64(2), "seed": torch.tensor(3), "guidance": np.float32(2.5)}
    sampled = pipe("a", **others, height=np.int32(8), num_images=np.uint8(2))
    assert torch.equal(sampled, plain)


def test_a_prompt_is_encoded_once_for_all_its_images(pipe, monkeypatch):
    read = []
    encode = pipe.text.encode
    monkeypatch.setattr(pipe.text, "encode", lambda texts: read.append(texts) or encode(texts))
    sampled = pipe(["a", "b"], num_images=3, seeds=[4] * 6, steps=1)
    assert read == [["a", "b"], [""]]
    repeated = pipe.encode(["b", "a", "b", "b"])
    assert read[2:] == [["b", "a"]]
    assert torch.equal(repeated.c_vec, encode(["b", "a", "b", "b"]).c_vec)
    for i, prompt in enumerate("aaabbb"):
        alone = pipe(prompt, seed=4, steps=1)[0]
        assert (sampled[i].int() - alone.int()).abs().max() <= 1


@pytest.mark.parametrize(
    "guide",
    [
        1.0,
        GuidanceRescale(inner=GuidanceInterval(inner=ClassifierFreeGuidance(scale=1.0))),
        ZeroUnconditional(inner=ClassifierFreeGuidance(scale=3.0)),
    ],
)
def test_no_negative_prompt_is_encoded_if_guidance_reads_none(pipe, monkeypatch, guide):
    read = []
    encode = pipe.text.encode
    monkeypatch.setattr(pipe.text, "encode", lambda texts: read.append(texts) or encode(texts))
    images = pipe("a", negative_prompt="b", guidance=guide, num_images=2)
    assert read == [["a"]]
    assert torch.equal(images, pipe("a", negative_prompt="c", guidance=guide, num_images=2))


@pytest.mark.parametrize("solver", [euler, dpmpp_2m])
def test_the_stages_called_separately_give_the_same_image_bit_for_bit(pipe, solver):
    request = Request(
        ["ab", "c"], negative_prompt="e", num_images=2, seed=7, steps=3, height=12, solver=solver
    )
    images, seeds, evaluations = pipe.sample(request)
    assert seeds == [7, 8, 7, 8] and evaluations == 6

    times = pipe.objective.times(3)
    z = times[0].item() * pipe.noise([7, 8, 7, 8], 12, 8)
    positive, negative = pipe.encode(["ab", "ab", "c", "c"]), pipe.encode(["e"] * 4)
    assert positive.c_vec.shape == negative.c_vec.shape == (4, 5)
    guide = ClassifierFreeGuidance(scale=2.0)
    z, count = pipe.denoise(z, times, positive, negative, guidance=guide, solver=solver)
    assert z.shape == (4, 4, 6, 4) and count == 6
    assert torch.equal(pipe.decode(z), images)


def test_encoded_prompts_give_the_same_images_as_the_prompts(pipe):
    options = {"num_images": 2, "steps": 2, "seed": 3}
    expected = pipe(["ab", "c"], negative_prompt="e", **options)
    encoded = pipe(pipe.encode(["ab", "c"]), negative_prompt=pipe.encode(["e"]), **options)
    assert torch.equal(encoded, expected)
    with pytest.raises(UserError, match=r"4 and 6 wide \(c_vec, c_ctxt\), but .* reads 5 and 6"):
        pipe(Condition(torch.zeros(1, 4), torch.zeros(1, 4, 6)))
    with pytest.raises(UserError, match="2 negative prompts for 3 prompts"):
        pipe(pipe.encode(["a", "b", "c"]), negative_prompt=pipe.encode(["a", "b"]))


def test_denoising_can_be_split_into_two_calls(pipe):
    """Denoising to the middle and then from there gives the same as denoising to the end."""
    times, positive = pipe.objective.times(4), pipe.encode(["a"])
    options = {"guidance": ClassifierFreeGuidance(scale=1.0), "steps": 4}
    whole, count = pipe.denoise(pipe.noise([0], 8, 8), times, positive, **options)
    middle, first = pipe.denoise(pipe.noise([0], 8, 8), times[:3], positive, **options)
    end, second = pipe.denoise(middle, times[2:], positive, **options)
    assert torch.equal(end, whole) and (first, second, count) == (2, 2, 4)


def test_denoising_requires_the_negative_condition_that_guidance_reads(pipe):
    with pytest.raises(UserError, match="SkipLayerGuidance moves away from a negative prompt"):
        pipe.denoise(
            pipe.noise([0], 8, 8),
            pipe.objective.times(2),
            pipe.encode(["a"]),
            guidance=SkipLayerGuidance(inner=ClassifierFreeGuidance()),
        )


def test_a_request_needs_no_model():
    request = Request(["a", "b"], num_images=2, seed=5)
    assert (request.count, request.seeds) == (4, [5, 6, 5, 6])
    assert request.height is request.steps is request.guidance is None
    with pytest.raises(UserError, match="steps=0"):
        Request("a", steps=0)


def test_each_image_follows_its_own_control(pipe):
    """One control image for all or one per image, even if guidance doubles the batch."""
    net = ControlNet(depth=1, width=16, num_heads=2, latent_channels=4, pooled_width=5)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    controls = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    pipe.mmdit = ControlledMMDiT(base=pipe.mmdit, control_net=net)
    options = {"seeds": [7] * 4, "steps": 2, "num_images": 2}

    def sample(prompts: list[str], latents: torch.Tensor, **options: object) -> torch.Tensor:
        return pipe(prompts, extra={"control": latents}, **options).int()

    for guidance in (1.0, 3.0):
        sampled = sample(["a", "b"], controls, guidance=guidance, **options)
        for i, prompt in enumerate("aabb"):
            alone = sample([prompt], controls[i : i + 1], guidance=guidance, seed=7, steps=2)[0]
            assert (sampled[i] - alone).abs().max() <= 1
        assert (sampled[0] - sampled[1]).abs().max() > 10
    message = r"extra\['control'\] has 2 rows for 4 images: give one for all, or one per image"
    with pytest.raises(UserError, match=message):
        sample(["a", "b"], controls[:2], **options)
    with pytest.raises(NotFinite, match=r"the source of extra\['control'\] gave NaN"):
        sample(["a", "b"], controls * torch.nan, **options)


def test_extra_conditions_must_be_exactly_those_the_network_reads(pipe):
    control = {"control": torch.zeros(1, 4, 4, 4)}
    with pytest.raises(UserError, match="extra has control, but MMDiT reads nothing besides"):
        pipe("a", extra=control, steps=1)
    net = ControlNet(depth=1, width=16, num_heads=2, latent_channels=4, pooled_width=5)
    pipe.mmdit = ControlledMMDiT(base=pipe.mmdit, control_net=net)
    with pytest.raises(UserError, match="extra has nothing, but ControlledMMDiT reads control"):
        pipe("a", steps=1)
    for wrong in (torch.tensor(1.0), "edges.png"):
        with pytest.raises(UserError, match="give one for all, or one per image"):
            pipe("a", extra={"control": wrong}, steps=1)


@pytest.mark.parametrize("control_type", ["blur", "canny"])
def test_a_control_image_is_encoded_in_the_range_of_its_control_net(pipe, control_type):
    net = ControlNet(
        depth=1,
        width=16,
        num_heads=2,
        latent_channels=4,
        pooled_width=5,
        control_type=control_type,
    )
    torch.nn.init.ones_(net.to_residuals[0].weight)
    edges = random_image(2, 8, 12)
    with pytest.raises(UserError, match="control: MMDiT follows no control image"):
        pipe(["a", "b"], control=edges)
    pipe.mmdit = ControlledMMDiT(base=pipe.mmdit, control_net=net)
    images = pipe(["a", "b"], control=edges, num_images=2)
    assert images.shape == (4, 8, 12, 3)
    with torch.no_grad():
        latents = pipe.autoencoder.encode(control_pixels(edges, control_type))
    by_hand = {"control": latents.repeat_interleave(2, dim=0)}
    size = {"height": 8, "width": 12}
    assert torch.equal(images, pipe(["a", "b"], extra=by_hand, num_images=2, **size))
    encoded = pipe.encode(["a", "b"])._replace(extra={"control": latents})
    assert torch.equal(images, pipe(encoded, num_images=2, **size))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"control": random_image(8, 8).float()}, "control is torch.float32, but must be .* uint8"),
        ({"control": random_image(3, 8, 8)}, r"control of shape \(3, 8, 8, 3\) must be"),
        ({"control": random_image(8, 8), "height": 12}, "height=12 .* control has 8"),
        (
            {"control": random_image(8, 8), "image": random_image(8, 12), "strength": 1.0},
            "width=12 .* has 8",
        ),
        ({"extra": [1]}, r"extra=\[1\] must be a mapping from names to tensors"),
    ],
)
def test_control_that_does_not_fit_is_rejected(arguments, message):
    with pytest.raises(UserError, match=message):
        Request("a", **arguments)
