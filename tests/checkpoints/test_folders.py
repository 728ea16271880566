"""diffusers and transformers open what we save, we open what they save, and both compute the same.

The two libraries are oracles here; nothing of theirs is used elsewhere.
"""

import shutil
from pathlib import Path

import pytest
import torch

import mmdit
from mmdit.checkpoints.folders import CLASSES, write_model
from mmdit.checkpoints.locate import Place
from mmdit.checkpoints.public import kind_of
from mmdit.errors import UserError
from mmdit.models.mmdit import MMDiT
from mmdit.registry import describe
from tests.kills_for_tests import at_each_change, content

NAMES = ["mmdit", "mmdit_qk_norm", "mmditx", "autoencoder", "clip_l", "clip_g", "t5", "controlnet"]
NAMES += ["clip_image"]


def class_of(kind):
    library = "transformers" if kind.startswith(("clip", "t5")) else "diffusers"
    return getattr(pytest.importorskip(library), CLASSES[kind])


def opened(kind, folder):
    """Their model, and the keys that they missed or did not expect."""
    theirs, told = class_of(kind).from_pretrained(folder, output_loading_info=True)
    theirs.eval()
    return theirs, {key for name in ("missing_keys", "unexpected_keys") for key in told[name]}


@torch.no_grad()
def outputs(ours, theirs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What both compute of the same inputs."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[97, 5, 6, 98, 98, 98, 98, 98, 98], [97, 7, 98, 0, 0, 0, 0, 0, 0]])

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    match kind_of(ours):
        case "mmdit":
            z, c_ctxt, c_vec, t = noise(2, 16, 8, 6), noise(2, 5, 12), noise(2, 10), noise(2).abs()
            theirs_says = theirs(z, c_ctxt, c_vec, 1000 * t).sample
            return [ours(z, t, c_vec, c_ctxt)], [theirs_says]
        case "autoencoder":
            x, z = noise(1, 3, 16, 8), noise(1, 16, 4, 2)
            latent = (theirs.encode(x).latent_dist.mean - ours.shift) * ours.scale
            image = theirs.decode(z / ours.scale + ours.shift).sample
            return [ours.encode(x), ours.decode(z)], [latent, image]
        case "clip_l" | "clip_g":
            said = theirs(ids, output_hidden_states=True)
            return [*ours(ids)], [said.hidden_states[-2], said.text_embeds]
        case "t5":
            return [ours(ids % 50)], [theirs(ids % 50).last_hidden_state]
        case "clip_image":
            pixels = noise(2, 3, 28, 28)
            return [ours(pixels)], [theirs(pixels).image_embeds]
    raise AssertionError


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_what_we_save_they_open(tiny, tmp_path, name, shards):
    ours = tiny(name)
    write_model(ours, tmp_path, max_bytes=200_000 if shards else 10**9)
    theirs, faults = opened(kind_of(ours), tmp_path)
    assert faults <= {"encoder.embed_tokens.weight"}  # the other name of T5's embedding
    if name != "controlnet":  # compared with the base model in tests/models/test_controlnet.py
        for ours_says, theirs_says in zip(*outputs(ours, theirs), strict=True):
            torch.testing.assert_close(ours_says, theirs_says, rtol=1e-4, atol=1e-5)


@pytest.mark.few(9)
@pytest.mark.parametrize("saved", [{}, {"max_shard_size": "100KB"}, {"variant": "fp16"}])
@pytest.mark.parametrize("name", NAMES)
def test_what_they_save_we_open(tiny, tmp_path, name, saved):
    kind = kind_of(ours := tiny(name))
    if "variant" in saved:
        ours = ours.half()
    write_model(ours, tmp_path / "ours")
    theirs = class_of(kind).from_pretrained(
        tmp_path / "ours", torch_dtype=next(ours.parameters()).dtype
    )
    theirs.save_pretrained(tmp_path / "theirs", **saved)
    if "max_shard_size" in saved and name != "t5":
        assert list((tmp_path / "theirs").glob("*-of-*.safetensors"))
    hints = {"control_type": "canny"} if kind == "controlnet" else {}
    again = Place(tmp_path / "theirs").load(kind, **hints)
    # As loaded, because T5 in float16 keeps some of it in float32.
    for key, value in Place(tmp_path / "ours").load(kind).state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_what_their_config_cannot_say_is_not_saved(tmp_path):
    model = MMDiT(depth=2, width=128, num_heads=2, mlp_ratio=2.0, position_size=4)
    with pytest.raises(UserError, match=r"mlp_ratio 2.0 cannot be expressed"):
        mmdit.save_diffusers(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_saved_model_has_the_files_that_they_expect(tiny, tmp_path):
    mmdit.save_diffusers(tiny("mmditx"), tmp_path / "transformer")
    mmdit.save_diffusers(tiny("t5"), tmp_path / "text_encoder_3")
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "text_encoder_3/config.json",
        "text_encoder_3/model.safetensors",
    }


def test_a_whole_clip_gives_either_half(tmp_path):
    """As openai/clip-vit-large-patch14 is published: both towers in a file, one config.json."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_hidden_layers": 2}
    text = {"hidden_size": 32, "intermediate_size": 128, "vocab_size": 99, "eos_token_id": 98}
    text |= {"max_position_embeddings": 9, "bos_token_id": 97, "hidden_act": "quick_gelu"}
    vision = {"hidden_size": 64, "intermediate_size": 256, "image_size": 28, "patch_size": 14}
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(
        text_config={**text, **heads}, vision_config={**vision, **heads}, projection_dim=24
    )
    whole = transformers.CLIPModel(config).eval()
    whole.save_pretrained(tmp_path)
    pixels, ids = torch.randn(2, 3, 28, 28), torch.randint(97, (2, 9))
    ids[:, -1] = 98
    read = whole.text_model(ids)
    with torch.no_grad():
        image = mmdit.load_clip_image(tmp_path)(pixels)
        pooled = mmdit.load_clip(tmp_path)(ids).pooled
        theirs = whole.visual_projection(whole.vision_model(pixels).pooler_output)
        torch.testing.assert_close(image, theirs, rtol=1e-4, atol=1e-5)
        theirs = whole.text_projection(read.pooler_output)
        torch.testing.assert_close(pooled, theirs, rtol=1e-4, atol=1e-5)


def test_a_layout_may_have_no_place_for_a_model(tiny, tmp_path):
    with pytest.raises(UserError, match="CLIP image tower has no original layout, only diffusers"):
        mmdit.save_single_file(tiny("clip_image"), tmp_path / "image.safetensors")
    assert not list(tmp_path.iterdir())


# The place where a model or a pipeline is saved


def everything(folder: Path) -> dict[str, bytes]:
    files = (f for f in folder.rglob("*") if f.is_file())
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}


def test_a_model_saved_again_replaces_its_own_files_alone(tiny, tmp_path):
    for name in ("notes.txt", "model.backup.safetensors", "vae/precious.txt", "tokenizer"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    write_model(tiny("mmdit"), tmp_path, max_bytes=200_000)
    assert len(list(tmp_path.glob("diffusion_pytorch_model-*"))) > 2
    mmdit.save_diffusers(tiny("mmditx"), tmp_path)
    assert {*everything(tmp_path)} == {
        *("notes.txt", "model.backup.safetensors", "vae/precious.txt", "tokenizer"),
        *("config.json", "diffusion_pytorch_model.safetensors"),
    }
    assert describe(mmdit.load_mmdit(tmp_path)) == describe(tiny("mmditx"))


def test_a_model_is_not_saved_over_a_pipeline(tiny, tiny_published, tmp_path):
    shutil.copytree(tiny_published, folder := tmp_path / "pipe")
    before = everything(folder)
    with pytest.raises(UserError, match=r"holds a whole pipeline: save one model in a subfolder"):
        mmdit.save_diffusers(tiny("mmdit"), folder)
    assert everything(folder) == before


def test_a_pipeline_is_not_saved_among_other_things(tiny_published, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds vae and no model_index\.json"):
        mmdit.save_diffusers(mmdit.load_pipeline(tiny_published), tmp_path)
    assert [*everything(tmp_path)] == ["vae/precious.txt"]


def test_a_saving_that_fails_leaves_all_as_it_was(tiny_published, tmp_path, monkeypatch):
    pipe = mmdit.load_pipeline(tiny_published)
    shutil.copytree(tiny_published, kept := tmp_path / "kept" / "pipe")
    shutil.move(kept / "vae", tmp_path / "shared")
    (kept / "vae").symlink_to(tmp_path / "shared")
    (kept / "mine" / "deep").mkdir(parents=True)
    (kept / "mine" / "deep" / "notes.txt").write_text("mine")
    (kept / "latest").symlink_to("mine")
    failed = 0
    for last in range(1, 60, 6):
        shutil.copytree(tmp_path / "kept", tmp_path / "trial", symlinks=True)

        def fail(number: int, last: int = last) -> None:
            if number == last:  # once: a disk that was full when something was to be written to it
                raise OSError(28, "No space left on device")

        with monkeypatch.context() as broken:
            at_each_change(fail, broken.setattr)
            try:
                mmdit.save_diffusers(pipe, folder := tmp_path / "trial" / "pipe")
            except UserError as error:
                assert "No space left" in str(error)
                assert content(tmp_path / "trial") == content(tmp_path / "kept")
                failed += 1
            else:  # where what is no longer needed cannot be removed
                assert not (folder / "vae").is_symlink() and (folder / "latest").is_symlink()
                assert (folder / "mine" / "deep" / "notes.txt").read_text() == "mine"
        shutil.rmtree(tmp_path / "trial")
    assert failed > 5 and everything(tmp_path / "shared")
