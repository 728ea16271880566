"""`eval/parity.py`: agreement with the peers on every part, and the place of a planted bug."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import mmdit
from mmdit.checkpoints.archive import open_file

ROOT = Path(__file__).resolve().parents[2]
CONFIG = OmegaConf.load(ROOT / "configs" / "parity.yaml")
del CONFIG["defaults"], CONFIG["hydra"]
SMALL = {"height": 64, "width": 48, "text_length": 11, "batch_size": 2}


@pytest.fixture(scope="module")
def parity() -> ModuleType:
    for peer in ("diffusers", "transformers"):
        pytest.importorskip(peer)
    return import_module("mmdit.cli.eval.parity")


@pytest.fixture(scope="module")
def sources(parity, tmp_path_factory) -> dict[str, Path]:
    """Tiny random models as files in the published layout, by kind."""
    config = OmegaConf.merge(CONFIG, SMALL, {"random": "tiny"})
    return parity.random_sources(config, tmp_path_factory.mktemp("weights"))


def compared(parity: ModuleType, kind: str, ours: Path, theirs: Path, **settings) -> list:
    """Rows of ours against the peer, each with a file of its own."""
    config = OmegaConf.merge(CONFIG, SMALL, settings)
    inputs, peer_config, mine = parity.run_ours(kind, ours, config)
    others = parity.run_theirs(kind, theirs, config, inputs, peer_config)
    return parity.differences(kind, mine, others, config.tolerance)


# Agreement


@pytest.mark.parametrize("kind", ["mmdit", "autoencoder", "clip_l", "clip_g", "t5", "controlnet"])
@pytest.mark.parametrize("dtype, bound", [("fp32", 1e-5), ("fp64", 2e-6)])
def test_every_stage_agrees(parity, sources, kind, dtype, bound):
    rows = compared(parity, kind, sources[kind], sources[kind], dtype=dtype)
    assert len(rows) >= 5
    assert max(row.relative for row in rows) < bound


@pytest.mark.parametrize("kind", ["mmdit", "autoencoder", "clip_g", "t5", "controlnet"])
def test_a_folder_in_diffusers_layout_agrees_too(parity, sources, kind, tmp_path):
    load = {"mmdit": mmdit.load_mmdit, "autoencoder": mmdit.load_autoencoder}
    load |= {"t5": mmdit.load_t5, "controlnet": mmdit.load_controlnet}
    load |= {"clip_g": lambda source: mmdit.load_clip(source, "clip_g")}
    folder = mmdit.save_diffusers(load[kind](sources[kind]), tmp_path / "model")
    config = OmegaConf.merge(CONFIG, SMALL)
    rows = parity.compare(kind, folder, config)
    assert all(row.ok for row in rows)


def test_a_projection_that_nothing_reads_is_compared_as_none(parity, sources, tmp_path):
    """In the place of CLIP-L in a single file, as some programs leave it."""
    key = "text_encoders.clip_l.transformer.text_projection.weight"
    path = tmp_path / "whole.safetensors"
    tensors = load_file(sources["clip_l"]) | {key: torch.zeros(16, 16)}
    save_file(tensors, path, metadata=open_file(sources["clip_l"]).metadata)
    assert all(row.ok for row in compared(parity, "clip_l", path, path))


# Bugs


@pytest.mark.parametrize(
    "kind, key, stage",
    [
        ("mmdit", "model.diffusion_model.joint_blocks.1.x_block.attn2.qkv.weight",
         "blocks.1.image"),
        ("mmdit", "model.diffusion_model.joint_blocks.2.context_block.mlp.fc1.bias",
         "blocks.2.text"),
        ("mmdit", "model.diffusion_model.pos_embed", "image_tokens"),
        ("mmdit", "model.diffusion_model.y_embedder.mlp.0.weight", "vector"),
        ("mmdit", "model.diffusion_model.joint_blocks.3.x_block.mlp.fc2.weight", "last_block"),
        ("mmdit", "model.diffusion_model.final_layer.linear.weight", "output"),
        ("autoencoder", "first_stage_model.decoder.up.1.block.0.conv1.weight", "decoder.levels.2"),
        ("clip_g", "text_encoders.clip_g.transformer.text_projection.weight", "pooled"),
        ("t5", "text_encoders.t5xxl.transformer.encoder.block.2.layer.1.DenseReluDense.wo.weight",
         "layers.2"),
        ("controlnet", "controlnet_blocks.0.weight", "residuals.0"),
    ],
)  # fmt: skip
def test_one_changed_weight_is_found_where_it_is(parity, sources, kind, key, stage, tmp_path):
    tensors = load_file(sources[kind])
    tensors[key] = tensors[key] * 1.05
    wrong = tmp_path / "wrong.safetensors"
    save_file(tensors, wrong, metadata=open_file(sources[kind]).metadata)
    rows = compared(parity, kind, wrong, sources[kind])
    assert next(row.stage for row in rows if not row.ok) == stage
    assert parity.verdict(rows, 1e-4).startswith(f"first departure: {stage} of {kind} (relative ")


def test_swapped_halves_of_the_last_modulation_are_found(parity, sources, tmp_path):
    key = "model.diffusion_model.final_layer.adaLN_modulation.1.weight"
    tensors = load_file(sources["mmdit"])
    tensors[key] = torch.cat(tensors[key].chunk(2)[::-1])
    wrong = tmp_path / "wrong.safetensors"
    save_file(tensors, wrong, metadata=open_file(sources["mmdit"]).metadata)
    rows = compared(parity, "mmdit", wrong, sources["mmdit"])
    assert [row.stage for row in rows if not row.ok] == ["output"]


def test_what_is_not_a_number_departs(parity):
    row, *_ = parity.differences(
        "t5", {"a": torch.tensor([torch.nan])}, {"a": torch.ones(1)}, tolerance=1e9
    )
    assert not row.ok


# Random weights


def test_a_seed_gives_the_same_file_and_another_seed_another(parity, sources, tmp_path):
    config = OmegaConf.merge(CONFIG, {"random": "tiny", "components": ["t5"]})
    same = parity.random_sources(config, tmp_path / "same")["t5"]
    other = parity.random_sources(OmegaConf.merge(config, {"seed": 1}), tmp_path / "other")["t5"]
    ours, theirs, drawn = load_file(same), load_file(other), load_file(sources["t5"])
    for key, tensor in ours.items():
        assert torch.equal(tensor, drawn[key]) and not torch.equal(tensor, theirs[key])
    prefix = "text_encoders.t5xxl.transformer."
    twice = (f"{prefix}shared.weight", f"{prefix}encoder.embed_tokens.weight")
    assert torch.equal(ours[twice[0]], ours[twice[1]])


@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium", "sd3.5-large"])
def test_full_sizes_have_the_published_number_of_weights(parity, name):
    models = parity.models_of_size(name, parity.KINDS)
    counts = {
        kind: sum(parameter.numel() for parameter in model.parameters())
        for kind, model in models.items()
    }
    expected = {"autoencoder": 83_819_683, "clip_l": 123_060_480, "clip_g": 694_659_840}
    expected |= {"t5": 4_762_310_656}
    mmdits = {"sd3-medium": 2_028_328_000, "sd3.5-medium": 2_243_171_520}
    expected |= {"mmdit": mmdits.get(name, 8_056_627_520)}
    expected |= {"controlnet": 2_153_518_976} if name == "sd3.5-large" else {}
    assert counts == expected


# The command


@pytest.fixture
def run(parity, monkeypatch, capsys, tmp_path) -> Callable[..., SimpleNamespace]:
    """`run(*words)`: exit code, stdout and stderr of the command, in a folder of its own."""

    def command(*words: str) -> SimpleNamespace:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["parity.py", *words])
        code = 0
        try:
            parity.launch(parity.job, config_name="parity", verbatim=parity.VERBATIM)
        except SystemExit as stop:
            code = stop.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return command


SIZE = [f"{key}={value}" for key, value in SMALL.items()]


@pytest.mark.slow
def test_random_weights_reach_parity_and_their_loading_is_measured(parity, tmp_path):
    script = [sys.executable, str(ROOT / "eval" / "parity.py"), "random=tiny", "load_rounds=1"]
    done = subprocess.run(
        [*script, "components=[mmdit,autoencoder]", "out=here", "keep=kept", *SIZE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("parity: all 26 stages within 0.0001")
    report = json.loads((tmp_path / "here" / "parity.json").read_text())
    assert len(report["stages"]) == 26 and all(stage["ok"] for stage in report["stages"])
    assert [load["what"].split(",")[0] for load in report["loading"]] == ["ours"] * 2 + [
        "diffusers"
    ]
    assert all(load["seconds"] > 0 for load in report["loading"])
    assert (tmp_path / "here" / "parity.md").read_text() in done.stdout
    assert mmdit.load_mmdit(tmp_path / "kept" / "tiny.safetensors").compute_dtype == torch.bfloat16


def test_a_departure_ends_with_code_1(run, sources):
    done = run(f"checkpoint={sources['mmdit']}", "components=mmdit", "tolerance=1e-12", *SIZE)
    assert done.code == 1, done.err
    assert "DEPARTS" in done.out and "\nfirst departure: " in done.out
    assert "loading the transformer" not in done.out


def test_a_checkpoint_is_compared_in_all_that_it_holds(run, sources, tmp_path):
    assert run(f"checkpoint={sources['mmdit']}", "out=all", *SIZE).code == 0
    report = json.loads((tmp_path / "all" / "parity.json").read_text())
    compared = list(dict.fromkeys(stage["component"] for stage in report["stages"]))
    assert compared == ["mmdit", "autoencoder", "clip_l", "clip_g", "t5"]
    done = run(f"checkpoint={sources['controlnet']}", *SIZE)
    assert done.code == 0 and done.out.count("| controlnet ") == 6


def test_a_model_without_a_peer_is_passed_over(run, tmp_path):
    """A CLIP of transformers holds an image tower beside that of text."""
    transformers = pytest.importorskip("transformers")
    common = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 1, "projection_dim": 24}
    text = {**common, "vocab_size": 100, "bos_token_id": 98, "eos_token_id": 99}
    config = transformers.CLIPConfig(
        text_config=text,
        vision_config={**common, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    assert len(mmdit.load_clip_image(tmp_path / "clip").layers) == 2
    done = run("checkpoint=clip", *SIZE)
    assert done.code == 0 and "| clip_l " in done.out, done.err
    done = run("checkpoint=clip", "components=clip_image")
    assert done.code == 2 and "components: clip_image must be all, or of mmdit" in done.err


def test_a_model_asked_for_must_be_there(run, sources):
    done = run(f"checkpoint={sources['mmdit']}", "components=[mmdit,controlnet]")
    assert done.code == 2 and done.err.endswith("tiny.safetensors has no SD3.5 ControlNet\n")


def test_a_damaged_part_of_a_folder_is_not_passed_over(run, sources, tmp_path):
    folder = tmp_path / "whole"
    mmdit.save_diffusers(mmdit.load_mmdit(sources["mmdit"]), folder / "transformer")
    mmdit.save_diffusers(mmdit.load_autoencoder(sources["autoencoder"]), folder / "vae")
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = run(f"checkpoint={folder}", *SIZE)
    assert done.code == 2 and "is cut off" in done.err
    weights.unlink()
    assert "holds no SD3 autoencoder" in run(f"checkpoint={folder}", *SIZE).err
    weights.parent.rename(tmp_path / "elsewhere")
    done = run(f"checkpoint={folder}", *SIZE)
    assert done.code == 0 and "parity: all 11 stages" in done.out


@pytest.mark.few(4)
@pytest.mark.parametrize(
    "words, message",
    [
        ([], "give either checkpoint=<file, folder or hub id> or random=<size>"),
        (["random=sd4"], "random='sd4' must be one of sd3-medium, sd3.5-medium"),
        (["random=tiny", "checkpoint=a"], "give either checkpoint="),
        (["random=tiny", "components=[mmdit,vae]"], "components: vae must be all, or of mmdit"),
        (["random=sd3-medium", "components=controlnet"], "sd3-medium has no SD3.5 ControlNet"),
        (["random=sd3.5-medium", "components=[t5,controlnet]"], "has no SD3.5 ControlNet"),
        (["random=tiny", "height=100"], "height=100 must be a multiple of 16"),
        (["random=tiny", "dtype=fp16"], "dtype='fp16' must be one of fp32, fp64, bf16"),
        (["random=tiny", "tolerance=0"], "tolerance=0 must be a finite number above 0"),
        (["random=tiny", "against=comfyui"], "against=comfyui must be diffusers"),
        (["checkpoint=nowhere.safetensors"], "nowhere.safetensors: there is no such file"),
        (["checkpoint=a", "keep=b"], "keep= keeps random weights"),
        (["random=tiny", "out=/dev/null/a"], "out=/dev/null/a: the folder cannot be created"),
        (["random=tiny", "keep=/dev/null"], "keep=/dev/null: the folder cannot be created"),
    ],
)
def test_requests_that_make_no_sense(run, words, message):
    done = run(*words)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err


def test_a_full_disk_is_noticed_before_writing(parity, monkeypatch, tmp_path):
    monkeypatch.setattr(parity.shutil, "disk_usage", lambda _: type("", (), {"free": 5e9}))
    config = OmegaConf.merge(CONFIG, {"random": "sd3-medium"})
    with pytest.raises(mmdit.UserError, match=r"has 5\.0 GB free, but 8\.\d GB are needed"):
        parity.random_sources(config, tmp_path)
    assert not list(tmp_path.iterdir())
