"""Pipelines from public weights: compared with the reference and diffusers, and saved again."""

import copy
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mmdit
from mmdit.checkpoints.archive import open_file
from mmdit.checkpoints.presets import PRESETS
from mmdit.checkpoints.public import load
from mmdit.errors import UserError
from mmdit.flow.guidance import ClassifierFreeGuidance, SkipLayerGuidance
from mmdit.flow.solvers import dpmpp_2m, euler
from mmdit.models.autoencoder import Autoencoder
from mmdit.models.controlnet import ControlledMMDiT, ControlNet
from mmdit.models.mmdit import MMDiT
from mmdit.pipeline import NetworkVelocity, Pipeline
from mmdit.published import chosen_preset, frozen_text, published_objective
from mmdit.registry import build, describe
from mmdit.text.conditioning import TextConditioner, TextEncoder, TokenIds
from mmdit.text.t5_tokenizer import T5Tokenizer
from mmdit.text.tokenizers import CLIPWordTokenizer, T5WordTokenizer
from tests.checkpoints_for_tests import write_checkpoint


def hints(model: dict[str, Any]) -> dict[str, Any]:
    """Hints for a golden case that its shapes do not determine."""
    names = {
        "num_heads": "num_heads",
        "num_attention_heads": "num_heads",
        "hidden_act": "activation",
    }
    return {ours: model[theirs] for theirs, ours in names.items() if theirs in model}


# The reference


@torch.no_grad()
def test_sampling_from_tokens_to_pixels_matches_the_reference(golden, tmp_path):
    case = golden("pipeline")
    models, calls = case.config["model"], case.config["call"]
    # The case has no image encoder: ours completes the file.
    spare = Autoencoder(width=32, multipliers=[1, 1], blocks=1)
    vae = open_file(mmdit.save_single_file(spare, tmp_path / "vae.safetensors"))
    image_encoder = {f"first_stage_model.{key}": vae[key] for key in vae.infos}
    save_file({**image_encoder, **case.weights}, tmp_path / "whole.safetensors")

    archive = open_file(tmp_path / "whole.safetensors")
    network = load(archive, "mmdit", hints=hints(models["mmdit"]))
    autoencoder = load(archive, "autoencoder")
    text = conditioner(
        {k: load(archive, k, hints=hints(models[k])) for k in ("clip_l", "clip_g", "t5")}
    )
    positive, negative = (
        text(TokenIds(*(case.inputs[f"tokens_{name}_{side}"] for name in ("l", "g", "t5"))))
        for side in ("cond", "uncond")
    )
    for side, condition in (("cond", positive), ("uncond", negative)):
        case.check(f"pooled_{side}", condition.c_vec)
        case.check(f"context_{side}", condition.c_ctxt)

    objective = published_objective(calls["shift"])
    for run in calls["runs"]:
        name, steps, slg = run["name"], run["steps"], run.get("slg", {})
        grid = objective.shift.grid(steps)
        case.check(f"{name}.sigmas", grid.float())
        guide = ClassifierFreeGuidance(scale=run["cfg"])
        if slg:
            window = {"start": slg["start"], "end": slg["end"], "layers": slg["layers"]}
            guide = SkipLayerGuidance(inner=guide, skip_scale=slg["scale"], **window)
        velocity = NetworkVelocity(network, objective)
        solver = {"euler": euler, "dpmpp_2m": dpmpp_2m}[run["sampler"]]
        guided = guide(velocity, positive, negative, grid, steps)
        trajectory = [case.inputs["noise"]]

        def followed(z, t, guided=guided, trajectory=trajectory):
            trajectory.append(z)
            return guided(z, t)

        z = solver(followed, case.inputs["noise"], grid, None)
        case.check(f"{name}.x", torch.stack([*trajectory[1:], z]))
        case.check(f"{name}.image", autoencoder.decode(z))


def conditioner(models: dict[str, Any]) -> TextConditioner:
    """A conditioner that receives token ids, so that its tokenizers hardly matter."""
    parts = {}
    for kind, model in models.items():
        tokenizer = (
            T5WordTokenizer(words=["a"], length=77)
            if kind == "t5"
            else CLIPWordTokenizer(words=["a"], length=77, pad_with_end=kind == "clip_l")
        )
        parts[kind] = TextEncoder(tokenizer=tokenizer, model=model)
    return TextConditioner(**parts, empty_prompt="encoded")


# A tiny model of every part


@pytest.fixture
def tiny(tiny_published) -> Path:
    """A complete MMDiT-X pipeline of tiny random models, as a folder in diffusers' layout."""
    return tiny_published


PAINT = {"steps": 8, "guidance": 4.5, "height": 32, "width": 24, "seed": 3}


def latents(pipe: Pipeline, prompt: str, **settings: Any) -> torch.Tensor:
    """The latents that the pipeline would decode."""
    seen = []
    handle = pipe.autoencoder.decoder.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    pipe(prompt, **{**PAINT, **settings})
    handle.remove()
    return (seen[0] - pipe.autoencoder.shift) * pipe.autoencoder.scale


def assert_same_model(again: Pipeline, pipe: Pipeline, prompt: str) -> None:
    """Equal weights bit for bit, and equal latents up to rounding.

    Rounding may differ: kernels follow the alignment of weights, which is another at another offset
    of the mapped file.
    """
    assert again.state_dict().keys() == pipe.state_dict().keys()
    for key, tensor in pipe.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    torch.testing.assert_close(latents(again, prompt), latents(pipe, prompt), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("negative", [pytest.param(None, marks=pytest.mark.slow), "a blue dog"])
@pytest.mark.parametrize("use_t5", [True, False])
def test_eight_guided_steps_match_diffusers(tiny, negative, use_t5):
    diffusers = pytest.importorskip("diffusers")
    ours = mmdit.load_pipeline(tiny, t5_length=20, use_t5=use_t5)
    absent = {} if use_t5 else {"text_encoder_3": None, "tokenizer_3": None}
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(tiny, **absent)
    theirs.set_progress_bar_config(disable=True)
    prompt = "a photo of a red cat"
    expected = theirs(
        prompt,
        negative_prompt=negative,
        num_inference_steps=PAINT["steps"],
        guidance_scale=PAINT["guidance"],
        height=PAINT["height"],
        width=PAINT["width"],
        latents=ours.noise([PAINT["seed"]], PAINT["height"], PAINT["width"]),
        max_sequence_length=20,
        output_type="latent",
    ).images
    actual = latents(ours, prompt, negative_prompt=negative)
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_single_file_with_its_tokenizers_gives_the_same_images(tiny, tmp_path):
    folder = mmdit.load_pipeline(tiny, t5_length=20)
    path = mmdit.save_single_file(folder, tmp_path / "whole.safetensors")
    whole = mmdit.load_pipeline(path, t5_length=20, tokenizers=tiny)
    assert_same_model(whole, folder, "two cats")


def test_a_saved_folder_is_saved_again_bit_for_bit(tiny, tmp_path):
    again = mmdit.save_diffusers(mmdit.load_pipeline(tiny, t5_length=20), tmp_path / "again")
    files = {p.relative_to(tiny) for p in tiny.rglob("*") if p.is_file()}
    assert files == {p.relative_to(again) for p in again.rglob("*") if p.is_file()}
    for file in files:
        assert (again / file).read_bytes() == (tiny / file).read_bytes(), file


# Options


def test_an_unused_encoder_is_neither_needed_nor_loaded(tiny, tmp_path):
    pipe = mmdit.load_pipeline(tiny, t5_length=20)
    short = mmdit.save_diffusers(pipe.mmdit, tmp_path / "short" / "transformer").parent
    mmdit.save_diffusers(pipe.autoencoder, short / "vae")
    bare = mmdit.load_pipeline(
        short, use_clip_l=False, use_clip_g=False, use_t5=False, t5_length=20
    )
    assert not any(bare.text.parameters())
    condition = bare.text.encode(["a cat"])
    assert condition.c_ctxt.shape == (1, 77 + 20, 48) and not condition.c_ctxt.any()
    assert latents(bare, "a cat").isfinite().all()
    with pytest.raises(UserError, match=r"text\.encoders=.*text\.use_t5=false"):
        mmdit.load_pipeline(short, use_clip_l=False, use_clip_g=False)


def test_each_absent_encoder_contributes_zeros(tiny):
    full = mmdit.load_pipeline(tiny, t5_length=20).text.encode(["a red cat"])
    zeroed = {"clip_l": (slice(0, 77), slice(0, 16)), "clip_g": (slice(0, 77), slice(16, 40))}
    zeroed["t5"] = (slice(77, None), slice(None))
    pooled = {"clip_l": slice(0, 16), "clip_g": slice(16, 40), "t5": slice(0, 0)}
    for name, (tokens, channels) in zeroed.items():
        text = mmdit.load_pipeline(tiny, t5_length=20, **{f"use_{name}": False}).text
        expected_ctxt, expected_vec = full.c_ctxt.clone(), full.c_vec.clone()
        expected_ctxt[:, tokens, channels] = 0
        expected_vec[:, pooled[name]] = 0
        said = text.encode(["a red cat"])
        assert torch.equal(said.c_ctxt, expected_ctxt) and torch.equal(said.c_vec, expected_vec)


def test_the_empty_prompt_is_encoded_not_zero(tiny):
    assert mmdit.load_pipeline(tiny, t5_length=20).text.encode([""]).c_vec.any()


def test_a_dtype_is_that_of_every_weight_but_not_of_the_latent_scale(tiny):
    pipe = mmdit.load_pipeline(tiny, t5_length=20, dtype=torch.bfloat16)
    assert {p.dtype for p in pipe.parameters()} == {torch.bfloat16}
    assert pipe.autoencoder.scale.item() == pytest.approx(1.5305, abs=1e-7)
    half = latents(pipe, "a red cat").float()
    single = latents(mmdit.load_pipeline(tiny, t5_length=20), "a red cat")
    assert (half - single).abs().mean() < 0.1 * single.abs().mean()


def test_t5_in_float16_keeps_its_wide_layer_in_float32(tiny):
    t5 = mmdit.load_t5(tiny, dtype=torch.float16)
    assert {layer.down.weight.dtype for layer in t5.layers} == {torch.float32}
    assert t5.token_embedding.weight.dtype == torch.float16
    with torch.no_grad():
        t5.token_embedding.weight.mul_(2000)  # beyond float16 after one layer
        assert t5(torch.tensor([[5, 6, 1]])).isfinite().all()


def test_frozen_encoders_give_the_same_embeddings_as_in_their_pipeline(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    text = frozen_text(source=tiny.name, t5_length=20, dropout=0.3)
    assert text.frozen and text.dropout == 0.3
    assert not text.encode([""]).c_vec.any()  # as in training, when all are dropped
    monkeypatch.chdir(tmp_path)  # the description works in any folder
    again = build(describe(text))
    again.load_state_dict(text.state_dict())
    expected = mmdit.load_pipeline(tiny, t5_length=20).text.encode(["a red cat"])
    for found in (text.encode(["a red cat"]), again.encode(["a red cat"])):
        for one, other in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(one, other)  # kernels differ when gradients are computed


def test_frozen_encoders_can_be_left_out(tiny):
    text = frozen_text(source=str(tiny), t5_length=20, use_t5=False)
    c_vec, c_ctxt, _ = text.encode(["a red cat"])
    assert c_ctxt.shape == (1, 77 + 20, 4096) and not c_ctxt[:, 77:].any()
    expected = mmdit.load_pipeline(tiny, t5_length=20).text.encode(["a red cat"])
    torch.testing.assert_close(c_vec, expected.c_vec)
    with pytest.raises(UserError, match="tokenizers"):
        frozen_text(source=str(tiny), tokenizers=str(tiny / "vae"))


def test_the_published_sizes_choose_their_preset():
    def of(name: str) -> MMDiT:
        preset = PRESETS[name]
        with torch.device("meta"):
            return MMDiT(
                depth=preset.depth,
                width=64 * preset.depth,
                num_heads=preset.depth,
                qk_norm=preset.qk_norm,
                dual_attention=range(13) if preset.dual else (),
            )

    for name in PRESETS:
        assert chosen_preset(of(name), f"some/{name}.safetensors", None) == name
        assert chosen_preset(of(name), "some/model.safetensors", name) == name
    with pytest.raises(UserError, match=r"this is sd3\.5-medium; use preset=sd3\.5-medium"):
        chosen_preset(of("sd3.5-medium"), "a.safetensors", "sd3-medium")


def test_an_unknown_preset_is_rejected(tiny):
    with pytest.raises(UserError, match=r"preset='sd4' must be one of sd3-medium, sd3\.5-medium"):
        mmdit.load_pipeline(tiny, preset="sd4")


@pytest.mark.slow
def test_the_shift_is_read_from_the_folder(tiny, tmp_path):
    assert mmdit.load_pipeline(tiny, t5_length=20).objective.shift.alpha == 3.0
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"shift": 2.5}))
    assert mmdit.load_pipeline(copy, t5_length=20).objective.shift.alpha == 2.5
    for content, message in (
        ("[]", "must hold a JSON object"),
        ('{"shift": NaN}', "shift=nan must be a finite number above 0"),
        ('{"shift": 0}', "shift=0 must be"),
        ('{"shift": true}', "shift=True must be"),
        ('{"_class_name": "DDIMScheduler"}', "DDIMScheduler is not how SD3 is sampled"),
        ('{"use_dynamic_shifting": true}', "use_dynamic_shifting = True is not how"),
        ('{"use_karras_sigmas": true}', "use_karras_sigmas = True is not how"),
        ('{"num_train_timesteps": 500}', "num_train_timesteps = 500 is not how"),
        ('{"shift_terminal": 0.1}', "shift_terminal = 0.1 is not how"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            mmdit.load_pipeline(copy, t5_length=20)


def test_a_source_with_two_towers_requires_a_choice(tiny):
    with pytest.raises(UserError, match="which='clip_l' or which='clip_g'"):
        mmdit.load_clip(tiny)
    assert mmdit.load_clip(tiny, "clip_g").pooled_width == 24
    assert mmdit.load_clip(tiny / "text_encoder").pooled_width == 16


@pytest.mark.slow
def test_a_tower_is_saved_under_its_kind_with_any_activation(tiny, tmp_path):
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    config = copy / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_act": "gelu"}))
    pipe = mmdit.load_pipeline(copy, t5_length=20)
    path = mmdit.save_single_file(pipe, tmp_path / "whole.safetensors")
    again = mmdit.load_pipeline(path, t5_length=20, tokenizers=tiny)
    assert_same_model(again, pipe, "two cats")
    mmdit.save_diffusers(pipe, tmp_path / "folder")
    again = mmdit.load_pipeline(tmp_path / "folder", t5_length=20)
    assert_same_model(again, pipe, "two cats")


def test_a_folder_saved_without_an_encoder_is_loaded_without_it(tiny, tmp_path):
    """Even if an earlier save left that encoder in the same folder."""
    folder = mmdit.save_diffusers(mmdit.load_pipeline(tiny, t5_length=20), tmp_path / "folder")
    (folder / "notes.txt").write_text("mine")
    short = mmdit.load_pipeline(folder, t5_length=20, use_t5=False)
    mmdit.save_diffusers(short, folder)
    assert not (folder / "text_encoder_3").exists() and (folder / "notes.txt").exists()
    again = mmdit.load_pipeline(folder, t5_length=20)
    assert_same_model(again, short, "a cat")


@pytest.mark.slow
def test_a_save_that_is_killed_leaves_the_old_folder_intact(tiny, tmp_path, monkeypatch):
    pipe = mmdit.load_pipeline(tiny, t5_length=20)
    folder = mmdit.save_diffusers(pipe, tmp_path / "folder")
    monkeypatch.setattr(T5Tokenizer, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mmdit.save_diffusers(pipe, folder)
    again = mmdit.load_pipeline(folder, t5_length=20)
    assert_same_model(again, pipe, "a cat")


def test_the_index_of_another_pipeline_is_rejected(tiny, tmp_path):
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    (copy / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(UserError, match="holds a FluxPipeline"):
        mmdit.load_pipeline(copy, t5_length=20)


def test_the_toy_autoencoder_is_saved_and_loaded_again(tmp_path):
    toy = Autoencoder(width=32, multipliers=[1, 1, 1], blocks=0, scale=0.7, shift=0.1)
    for saved in (
        mmdit.save_single_file(toy, tmp_path / "toy.safetensors"),
        mmdit.save_diffusers(toy, tmp_path / "toy"),
    ):
        again = mmdit.load_autoencoder(saved)
        assert again.state_dict().keys() == toy.state_dict().keys()
        for key, tensor in toy.state_dict().items():
            assert torch.equal(again.state_dict()[key], tensor), key


def test_negative_prompts_can_differ_per_prompt(tiny):
    pipe = mmdit.load_pipeline(tiny, t5_length=20)
    wish = {**PAINT, "steps": 2}
    both = pipe(
        ["a cat", "a dog"], negative_prompt=["red", "blue"], seeds=[3, 3], **without_seed(wish)
    )
    one = pipe("a dog", negative_prompt="blue", **wish)
    assert (both[1].int() - one[0].int()).abs().max() <= 1
    for wrong, message in (
        (["a", "b", "c"], "3 negative prompts for 2"),
        ([("a", "b")], "list of texts"),
    ):
        with pytest.raises(UserError, match=message):
            pipe(["a cat", "a dog"], negative_prompt=wrong, **wish)
    with pytest.raises(UserError, match="empty list"):
        pipe([])
    with pytest.raises(UserError, match="guidance=nan must be a finite number"):
        pipe("a cat", **{**wish, "guidance": float("nan")})


def without_seed(wish: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in wish.items() if key != "seed"}


def test_the_noise_equals_that_of_the_reference(tiny):
    """The reference draws (1, c, h, w) from a CPU generator with the seed."""
    pipe = mmdit.load_pipeline(tiny, t5_length=20)
    expected = torch.randn(1, 16, 16, 12, generator=torch.Generator("cpu").manual_seed(7))
    assert torch.equal(pipe.noise([7], 32, 24), expected)


def test_a_controlled_network_can_replace_the_network(tiny):
    pipe = mmdit.load_pipeline(tiny, t5_length=20)
    net = ControlNet(depth=1, width=64, num_heads=4, pooled_width=40)
    plain = latents(pipe, "a cat")
    base = pipe.mmdit
    pipe.mmdit = ControlledMMDiT(base=base, control_net=net)
    control = {"extra": {"control": torch.zeros(1, 16, 16, 12)}}
    assert torch.equal(latents(pipe, "a cat", **control), plain)  # untrained, it changes nothing
    torch.nn.init.ones_(net.to_residuals[0].weight)
    assert not torch.equal(latents(pipe, "a cat", **control), plain)


# All loaders, for a run and for public weights


@pytest.fixture
def run(tiny, tmp_path):
    """A run of this project with the parts of the tiny public pipeline."""
    pipe = mmdit.load_pipeline(tiny, t5_length=20)
    raw = copy.deepcopy(pipe)
    for parameter in raw.parameters():
        parameter.data.add_(1.0)
    write_checkpoint(tmp_path / "run", 1, {"ema": pipe, "raw": raw})
    return tmp_path / "run"


@pytest.mark.slow
def test_the_parts_of_a_run_are_loaded_like_public_ones(run, tiny):
    whole = mmdit.load_pipeline(run)
    parts = {
        mmdit.load_mmdit: whole.mmdit,
        mmdit.load_autoencoder: whole.autoencoder,
        mmdit.load_t5: whole.text.t5.model,
        partial(mmdit.load_clip, which="clip_l"): whole.text.clip_l.model,
        partial(mmdit.load_clip, which="clip_g"): whole.text.clip_g.model,
    }
    for loader, part in parts.items():
        assert describe(loader(run)) == describe(part) == describe(loader(tiny))
        for weights, added in (("ema", 0.0), ("raw", 1.0)):
            loaded = dict(loader(run, weights=weights).named_parameters())
            for name, parameter in part.named_parameters():
                assert torch.equal(loaded[name], parameter + added), name
    with pytest.raises(UserError, match="holds two CLIP towers: give which='clip_l' or"):
        mmdit.load_clip(run)


def test_an_encoder_missing_from_a_run_is_named(run, tiny, tmp_path):
    short = mmdit.load_pipeline(tiny, use_t5=False, use_clip_g=False, t5_length=20)
    write_checkpoint(tmp_path / "short", 1, {"ema": short})
    with pytest.raises(UserError, match="short was trained without t5"):
        mmdit.load_t5(tmp_path / "short")
    assert describe(mmdit.load_clip(tmp_path / "short")) == describe(short.text.clip_l.model)


def test_arguments_that_do_not_apply_to_a_source_are_rejected(run, tiny):
    for loader, argument in (
        (mmdit.load_pipeline, {"preset": "sd3-medium"}),
        (mmdit.load_pipeline, {"t5_length": 77}),
        (mmdit.load_mmdit, {"num_heads": 4}),
        (mmdit.load_mmdit, {"allow_pickle": True}),
        (mmdit.load_t5, {"allow_pickle": True}),
    ):
        (name,) = argument
        with pytest.raises(UserError, match=f"this project: {name} applies only to public"):
            loader(run, **argument)
    for loader in (mmdit.load_pipeline, mmdit.load_mmdit, mmdit.load_autoencoder, mmdit.load_t5):
        with pytest.raises(UserError, match="is not a run of this project: it has no weights=raw"):
            loader(tiny, weights="raw")
    with pytest.raises(UserError, match="use_t5='no' must be true or false"):
        mmdit.load_pipeline(tiny, use_t5="no")
