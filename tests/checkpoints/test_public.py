"""Every key of the published files is used, and every tensor comes back bit for bit."""

import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mmdit
from mmdit.checkpoints import public
from mmdit.checkpoints.archive import Archive, open_file
from mmdit.checkpoints.folders import write_model
from mmdit.checkpoints.formats import FORMATS
from mmdit.checkpoints.headers import Info
from mmdit.checkpoints.locate import Place
from mmdit.checkpoints.public import exported, find, kind_of, load, slots_of
from mmdit.checkpoints.tables import SWAPPED
from mmdit.checkpoints.values import bits, is_finite, same
from mmdit.errors import UserError
from mmdit.models.controlnet import ParallelControlNet
from mmdit.models.mmdit import MMDiT
from tests import references

TINY = ["mmdit", "mmdit_qk_norm", "mmditx", "autoencoder", "clip_l", "clip_g", "t5", "controlnet"]
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn}

BASE = ("mmdit", "autoencoder")
CLIPS = (*BASE, "clip_l", "clip_g")
MANIFESTS = {
    "sd3_medium": BASE,
    "sd3_medium_incl_clips": CLIPS,
    "sd3_medium_incl_clips_t5xxlfp16": (*CLIPS, "t5"),
    "sd3_medium_incl_clips_t5xxlfp8": (*CLIPS, "t5"),
    "sd3.5_medium": BASE,
    "sd3.5_large": BASE,
    "sd3.5_large_turbo": BASE,
    "clip_l": ("clip_l",),
    "clip_g": ("clip_g",),
    "t5xxl_fp16": ("t5",),
    "t5xxl_fp8_e4m3fn": ("t5",),
    "sd3.5_large_controlnet_blur": ("controlnet",),
    "sd3.5_large_controlnet_canny": ("controlnet",),
    "sd3.5_large_controlnet_depth": ("controlnet",),
    "diffusers_transformer_sd3_medium": ("mmdit",),
    "diffusers_transformer_sd3.5_medium": ("mmdit",),
    "diffusers_transformer_sd3.5_large": ("mmdit",),
    "diffusers_vae_sd3_medium": ("autoencoder",),
    "diffusers_vae_sd3.5_large": ("autoencoder",),
    "diffusers_text_encoder": ("clip_l",),
    "diffusers_text_encoder_2": ("clip_g",),
    "diffusers_text_encoder_3": ("t5",),
    "diffusers_controlnet_sd3.5_large": ("controlnet",),
}
PARAMETERS = {  # facts.md; MMDiTs by depth and dual attention
    ("mmdit", 24, False): 2_028_328_000,
    ("mmdit", 24, True): 2_243_171_520,
    ("mmdit", 38, False): 8_056_627_520,
    "autoencoder": 83_819_683,
    "clip_l": 123_060_480,
    "clip_g": 694_659_840,
    "t5": 4_762_310_656,
    "controlnet": 2_153_518_976,
}


class Manifest(Archive):
    """A published file of which only the header is there; its tensors are on meta."""

    def __init__(self, name: str) -> None:
        content = references.table("manifests")[name]
        self.name, self.paths, self.metadata = Path(name), [], {}
        self.infos = {key: Info(tuple(shape), dtype) for key, (shape, dtype) in content.items()}
        self.read: list[str] = []

    def __getitem__(self, key: str) -> torch.Tensor:
        self.read.append(key)
        shape, dtype = self.infos[key]
        if key.endswith("text_projection.weight"):  # CLIP-L's is the identity, CLIP-G's is not
            return torch.eye(shape[0], dtype=DTYPES[dtype]) * (1 if shape[0] == 768 else 2)
        if key == "control_type":
            return torch.tensor([["blur", "canny", "depth"].index(self.name.name[23:])])
        return torch.empty(shape, dtype=DTYPES[dtype], device="meta")


@pytest.fixture
def manifest(monkeypatch):
    """`manifest(name)`: a header, whose tensors on meta have no values to look at."""
    monkeypatch.setattr(public, "not_finite", lambda _: [])
    monkeypatch.setattr(public, "same", lambda a, b: bool(a.shape == b.shape))
    return Manifest


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_key_of_a_published_file_is_read_and_written(manifest, name):
    archive = manifest(name)
    written: dict[str, tuple[tuple[int, ...], str]] = {}
    layout = "diffusers" if name.startswith("diffusers") else "original"
    for kind in MANIFESTS[name]:
        match = find(archive, kind, layout=layout)
        model = load(archive, kind, layout=layout)
        counted = (kind, len(model.blocks) + 1, "3.5_medium" in name) if kind == "mmdit" else kind
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[counted]
        assert kind_of(model) == kind
        tensors = exported(model, layout, prefixed=bool(match.prefix))
        written |= {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors}
    assert set(archive.read) == archive.infos.keys() == written.keys()
    for key, (shape, dtype) in archive.infos.items():
        kept = torch.bfloat16 if dtype == "F8_E4M3" else DTYPES[dtype]
        assert written[key] == (shape, kept), key


PAIRS = {
    "mmdit_sd3_medium": ("mmdit", "sd3_medium", "diffusers_transformer_sd3_medium"),
    "mmdit_sd3.5_medium": ("mmdit", "sd3.5_medium", "diffusers_transformer_sd3.5_medium"),
    "mmdit_sd3.5_large": ("mmdit", "sd3.5_large", "diffusers_transformer_sd3.5_large"),
    "vae": ("autoencoder", "sd3_medium", "diffusers_vae_sd3_medium"),
    "clip_l": ("clip_l", "clip_l", "diffusers_text_encoder"),
    "clip_g": ("clip_g", "clip_g", "diffusers_text_encoder_2"),
    "t5xxl": ("t5", "t5xxl_fp16", "diffusers_text_encoder_3"),
    "controlnet_8b": (
        "controlnet",
        "sd3.5_large_controlnet_blur",
        "diffusers_controlnet_sd3.5_large",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_tables_correspond_as_those_of_diffusers(manifest, name):
    """Key by key: the same tensors of ours, in the form that the transform says."""
    kind, original, diffusers = PAIRS[name]
    manifest(diffusers)
    model = load(manifest(original), kind)
    ours = {
        f.layout: SimpleNamespace(slots=slots_of(model, f), prefix=f.prefixes[0], format=f)
        for f in FORMATS
        if f.kind == kind
    }
    theirs, other = ours["original"], ours["diffusers"]
    for key, translated, transform in references.table("correspondences")[name]:
        key = key and key.removeprefix(theirs.prefix)
        if transform == "eye":
            assert key is None and translated == other.format.identity
        elif transform == "alias":
            assert theirs.format.copies[key] == translated
        elif transform.startswith("dropped"):
            assert key in theirs.format.arguments and translated is None
        else:
            (part,) = other.slots[translated].parts
            number = int(transform[5]) if transform.startswith("rows") else 0
            assert theirs.slots[key].parts[number][0] == part[0]
            assert (part[2] is SWAPPED) == (transform == "swap halves")
            reshaped = theirs.slots[key].shape != other.slots[translated].shape
            assert reshaped == (transform[:4] in ("rows", "conv"))


# Round trips


@pytest.mark.few(8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TINY)
def test_original_to_diffusers_and_back_is_bit_equal(tiny, tmp_path, name, dtype):
    model = tiny(name).to(dtype)
    kind = kind_of(model)
    first = mmdit.save_single_file(model, tmp_path / "first.safetensors")
    mmdit.save_diffusers(Place(first).load(kind), tmp_path / "folder")
    again = Place(tmp_path / "folder").load(kind)
    second = mmdit.save_single_file(again, tmp_path / "second.safetensors")
    assert first.read_bytes() == second.read_bytes()
    archive = open_file(first)
    floats = {info.dtype for key, info in archive.infos.items() if key != "control_type"}
    assert {DTYPES[name] for name in floats} == {dtype}
    for key, value in model.state_dict().items():
        assert torch.equal(value.float(), again.state_dict()[key].float()), key


@pytest.mark.parametrize("name", ["mmditx", "clip_g", "t5"])
def test_shards_are_as_good_as_one_file(tiny, tmp_path, name):
    model = tiny(name).half()
    write_model(model, tmp_path / "one")
    third = sum(value.nbytes for value in model.state_dict().values()) // 3
    write_model(model, tmp_path / "many", max_bytes=third)
    assert len(list((tmp_path / "many").glob("*-of-*.safetensors"))) > 2
    one, many = (Place(tmp_path / which).load(kind_of(model)) for which in ("one", "many"))
    for key, value in one.state_dict().items():
        assert torch.equal(value, many.state_dict()[key]), key
    write_model(one, tmp_path / "many")
    assert not list((tmp_path / "many").glob("*-of-*")) + list((tmp_path / "many").glob("*.index*"))


def test_t5_in_float16_keeps_what_overflows_in_float32(tiny, tmp_path):
    path = mmdit.save_single_file(tiny("t5").half(), tmp_path / "t5.safetensors")
    t5 = mmdit.load_t5(path)
    wide = {key for key, value in t5.state_dict().items() if value.dtype == torch.float32}
    assert wide == {f"layers.{i}.down.weight" for i in range(2)}
    again = mmdit.save_single_file(t5, tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes()
    with torch.no_grad():
        t5.layers[0].down.weight.mul_(1 + 2**-20)  # which float16 would lose
    kept = mmdit.load_t5(mmdit.save_single_file(t5, path))
    assert torch.equal(kept.layers[0].down.weight, t5.layers[0].down.weight)


def test_8_bit_floats_are_read_as_bfloat16(tiny, tmp_path):
    tensors = dict(exported(tiny("t5"), "original"))
    coded = {key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()}
    save_file(coded, tmp_path / "fp8.safetensors")
    for dtype in (None, torch.float32):
        model = mmdit.load_t5(tmp_path / "fp8.safetensors", dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {dtype or torch.bfloat16}
        for key, value in exported(model, "original"):
            assert torch.equal(value, coded[key].to(value.dtype)), key


def test_the_embedding_may_be_stored_under_either_name_or_both(tiny, tmp_path):
    tensors = dict(exported(tiny("t5"), "original"))
    for gone in ("shared.weight", "encoder.embed_tokens.weight"):
        path = tmp_path / f"without_{gone}.safetensors"
        save_file({key: value for key, value in tensors.items() if key != gone}, path)
        assert torch.equal(mmdit.load_t5(path).token_embedding.weight, tensors["shared.weight"])


def test_the_projection_of_clip_l_is_left_out_only_where_it_is_the_identity(tiny, tmp_path):
    write_model(tiny("clip_l"), tmp_path / "clip")
    file = tmp_path / "clip" / "model.safetensors"
    assert torch.equal(open_file(file)["text_projection.weight"], torch.eye(32))
    assert isinstance(mmdit.load_clip(tmp_path / "clip").projection, torch.nn.Identity)
    tensors = {key: open_file(file)[key] for key in open_file(file).infos}
    save_file({**tensors, "text_projection.weight": 2 * torch.eye(32)}, file)
    assert torch.equal(mmdit.load_clip(tmp_path / "clip").projection.weight, 2 * torch.eye(32))


def test_a_control_net_says_what_it_was_made_for(tiny, tmp_path, caplog):
    tensors = dict(exported(tiny("controlnet"), "original"))
    assert tensors["control_type"].tolist() == [1]
    unused = {"context_embedder.weight": torch.ones(8, 4), "context_embedder.bias": torch.ones(8)}
    save_file({**tensors, **unused}, tmp_path / "canny.safetensors")
    with caplog.at_level("INFO", logger="mmdit.checkpoints"):
        assert mmdit.load_controlnet(tmp_path / "canny.safetensors").control_type == "canny"
    assert "context_embedder.bias, context_embedder.weight" in caplog.text
    del tensors["control_type"]
    save_file(tensors, tmp_path / "unsaid.safetensors")
    assert mmdit.load_controlnet(tmp_path / "unsaid.safetensors").control_type == "blur"
    assert "does not state the control_type" in caplog.text
    told = mmdit.load_controlnet(tmp_path / "unsaid.safetensors", control_type="depth")
    assert told.control_type == "depth"
    save_file({**tensors, "control_type": torch.tensor([7])}, tmp_path / "seven.safetensors")
    with pytest.raises(UserError, match=r"seven.*number \[7\]"):
        mmdit.load_controlnet(tmp_path / "seven.safetensors")


def test_what_has_no_public_format_is_not_saved(tmp_path):
    parallel = ParallelControlNet(depth=1, width=32, num_heads=2)
    for model in (parallel, torch.nn.Linear(1, 1)):
        with pytest.raises(UserError, match="has no public format"):
            mmdit.save_single_file(model, tmp_path / "x.safetensors")


# Memory and values


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc to find mappings in")
def test_weights_are_views_of_the_mapped_file(tiny, tmp_path):
    path = mmdit.save_single_file(tiny("mmditx"), tmp_path / "x.safetensors")
    model = mmdit.load_mmdit(path)
    mapped = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    for key, value in model.state_dict().items():
        assert any(start <= value.data_ptr() < end for start, end in mapped), key


MEASURED = """
import sys, mmdit
def anonymous():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["RssAnon"].split()[0]) / 1024
load = mmdit.load_mmdit  # which imports what it needs
before = anonymous()
model = load(sys.argv[1])
print(anonymous() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read memory from")
def test_loading_needs_no_memory_of_its_own(tmp_path):
    model = mmdit.models.mmdit.MMDiT(depth=8, width=512, num_heads=8, position_size=8)
    path = mmdit.save_single_file(model.half(), tmp_path / "big.safetensors")
    assert path.stat().st_size > 100e6
    words = [sys.executable, "-c", MEASURED, str(path)]
    grown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert float(grown) < 40  # MiB


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_is_found_wherever_it_is(dtype, value):
    tensor = torch.full((1000,), 60000.0).to(dtype)  # whose sum overflows float16
    assert is_finite(tensor)
    assert is_finite(-tensor)
    for sign in (1, -1):
        for place in (0, 517, 999):
            bad = sign * tensor
            bad[place] = value
            assert not is_finite(bad)


def test_eight_bit_floats_have_no_other_bad_values_than_these():
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        every = torch.arange(256, dtype=torch.uint8).view(dtype)
        expected = every.float().isfinite()
        assert [is_finite(every[i : i + 1]) for i in range(256)] == expected.tolist()


def test_a_large_file_is_not_read_for_its_values_alone(tiny, tmp_path, monkeypatch):
    model = tiny("mmdit")
    with torch.no_grad():
        model.output.linear.bias[3] = float("nan")
    path = mmdit.save_single_file(model, tmp_path / "x.safetensors")
    for wish in ({}, {"verify": True}, {"dtype": torch.bfloat16}):
        with pytest.raises(UserError, match=r"NaN or infinite: final_layer\.linear\.bias"):
            mmdit.load_mmdit(path, **wish)
    monkeypatch.setattr(public, "ALWAYS_CHECKED", 0)
    assert mmdit.load_mmdit(path, verify=False).output.linear.bias[3].isnan()
    for wish in ({"verify": True}, {"dtype": torch.bfloat16}):
        with pytest.raises(UserError, match=r"NaN or infinite: final_layer\.linear\.bias"):
            mmdit.load_mmdit(path, **wish)


def test_a_value_too_large_for_the_dtype_asked_for_is_named_as_such(tiny, tmp_path):
    model = tiny("mmdit")
    with torch.no_grad():
        model.output.linear.bias[3] = 1e6
    path = mmdit.save_single_file(model, tmp_path / "x.safetensors")
    assert mmdit.load_mmdit(path).output.linear.bias[3] == 1e6
    with pytest.raises(
        UserError, match=r"too large for float16: final_layer.linear.bias. Use bfloat16"
    ):
        mmdit.load_mmdit(path, dtype=torch.float16)


def test_equality_is_of_bits():
    nan = torch.tensor([float("nan"), 0.0])
    assert same(nan, nan.clone()) and not same(nan, torch.tensor([float("nan"), -0.0]))
    assert not same(nan, nan.double())
    eight = torch.tensor([1.0]).to(torch.float8_e4m3fn)
    assert same(eight, eight.clone()) and bits(eight).dtype == torch.int8


IDS = torch.tensor([[3, 5, 1]])
FORWARD = {
    "mmdit": lambda model: model(
        torch.zeros(1, 16, 8, 8), torch.ones(1), torch.zeros(1, 10), torch.zeros(1, 3, 12)
    ),
    "autoencoder": lambda model: model.decode(model.encode(torch.zeros(1, 3, 16, 16))),
    "clip_l": lambda model: model(IDS).pooled,
    "clip_image": lambda model: model(torch.zeros(1, 3, 28, 28).to(model.projection.weight)),
    "t5": lambda model: model(IDS),
    "controlnet": lambda model: model(
        MMDiT(depth=2, width=128, num_heads=2, pooled_width=10).to(model.blocks[0].mlp.fc1.weight),
        torch.zeros(1, 16, 8, 8),
        torch.ones(1),
        torch.zeros(1, 10),
        torch.zeros(1, 16, 8, 8),
    )[0],
}
EIGHT = torch.float8_e4m3fn
MASTERS = {  # of a matrix and of other tensors, which take turns
    "bf16 and fp32": (torch.bfloat16, [torch.float32]),
    "fp32 and bf16": (torch.float32, [torch.bfloat16]),
    "fp16 and fp32": (torch.float16, [torch.float32]),
    "fp8, bf16 and fp32": (EIGHT, [torch.bfloat16, torch.float32]),
}


def mixed(archive: Archive, matrices: torch.dtype, others: list[torch.dtype]) -> dict[str, Any]:
    """The tensors of an archive, of several dtypes."""
    tensors = {key: archive[key] for key in archive.infos}
    turns = itertools.cycle(others)
    return {
        key: t.to(matrices if t.ndim > 1 else next(turns)) if t.is_floating_point() else t
        for key, t in tensors.items()
    }


CASES = [(kind, "bf16 and fp32") for kind in FORWARD] + [("clip_l", name) for name in MASTERS]
CASES += [("t5", name) for name in MASTERS] + [("mmdit", "fp8, bf16 and fp32")]


@pytest.mark.parametrize(("kind", "masters"), sorted(set(CASES)))
@torch.no_grad()
def test_masters_of_several_dtypes_compute_in_that_of_their_matrices(
    tiny, tmp_path, caplog, kind, masters
):
    dtypes = MASTERS[masters]
    dtype = torch.bfloat16 if dtypes[0] == EIGHT else dtypes[0]
    write_model(whole := tiny(kind), folder := tmp_path / "folder")
    (file,) = folder.glob("*.safetensors")
    save_file(mixed(open_file(file), *dtypes), file)
    sources = [folder]
    if kind != "clip_image":
        single = open_file(mmdit.save_single_file(whole, tmp_path / "single.safetensors"))
        sources.append(path := tmp_path / "x.safetensors")
        save_file(mixed(single, *dtypes), path, single.metadata)
    for source in sources:
        caplog.clear()
        model = Place(source).load(kind)
        wide = {layer.down.weight for layer in model.layers} if kind == "t5" else set()
        assert {p.dtype for p in set(model.parameters()) - wide} == {dtype}
        assert "loaded as" in caplog.text and str(dtype).removeprefix("torch.") in caplog.text
        assert FORWARD[kind](model).isfinite().all()
    caplog.clear()
    asked = Place(source).load(kind, dtype=torch.float32)
    assert {p.dtype for p in asked.parameters()} == {torch.float32}
    assert "loaded as" not in caplog.text


def test_weights_of_one_dtype_are_not_remarked_on(tiny, tmp_path, caplog):
    """Nor is T5 in float16, whose wide layer many files keep in float32."""
    write_model(tiny("t5").half(), tmp_path)
    archive = open_file(tmp_path / "model.safetensors")
    tensors = {k: archive[k].float() if ".wo." in k else archive[k] for k in archive.infos}
    save_file(tensors, tmp_path / "model.safetensors")
    t5 = mmdit.load_t5(tmp_path)
    assert t5.layers[0].down.weight.dtype == torch.float32
    assert t5.token_embedding.weight.dtype == torch.float16
    assert "loaded as" not in caplog.text


def test_a_norm_too_large_for_the_dtype_of_the_matrices_is_named(tiny, tmp_path):
    write_model(tiny("clip_l"), tmp_path)
    archive = open_file(tmp_path / "model.safetensors")
    tensors = {k: archive[k].half() if archive[k].ndim > 1 else archive[k] for k in archive.infos}
    tensors["text_model.final_layer_norm.bias"] += 1e6
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"too large for float16: text_model\.final_layer_norm"):
        mmdit.load_clip(tmp_path)
    assert mmdit.load_clip(tmp_path, dtype=torch.float32)
