"""GGUF files: every type is read as ggml reads it, written as ComfyUI-GGUF expects, or refused."""

import hashlib
import re
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import mmdit
from mmdit.adapters import Adapter
from mmdit.adapters.layers import LoRA
from mmdit.checkpoints import gguf_archive, gguf_header, gguf_writing, public
from mmdit.checkpoints.archive import Archive, open_file
from mmdit.checkpoints.gguf_header import TYPES, read_gguf_header, stored_bytes
from mmdit.checkpoints.gguf_writing import WRITTEN, type_of
from mmdit.checkpoints.headers import Info
from mmdit.checkpoints.locate import Place
from mmdit.checkpoints.public import exported, load
from mmdit.errors import UserError
from mmdit.export import main
from mmdit.models.mmdit import MMDiT
from mmdit.models.t5 import T5Encoder
from mmdit.nn.block_codes import BLOCK_TYPES, Codes
from mmdit.nn.stored import CodedWeight, plain
from tests import references

PLAIN = {"F32": torch.float32, "F16": torch.float16}
MMDIT = {"depth": 2, "width": 256, "num_heads": 4, "context_width": 64, "pooled_width": 96}
MMDIT |= {"position_size": 6, "qk_norm": True}
T5 = {"vocabulary_size": 50, "width": 64, "depth": 2, "num_heads": 2, "head_width": 32}
T5 |= {"hidden": 96}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mmdit": lambda: MMDiT(**MMDIT, dual_attention=[0]),
    "t5": lambda: T5Encoder(**T5),
}


@pytest.fixture
def model(randomize) -> Callable[[str], Any]:
    return lambda kind: randomize(MODELS[kind](), seed=0)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 16, 8, 8), (2,), (2, 96), (2, 5, 64))
    return tuple(torch.rand(shape, generator=generator).to(dtype) for shape in shapes)


def compute(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network(*inputs()) if isinstance(network, MMDiT) else network(torch.tensor([[3, 7]]))


# Reading


def test_the_numbers_of_types_are_those_of_ggml():
    assert {name: number for number, name in TYPES.items()}.items() <= {
        kind.name: kind.value for kind in GGMLQuantizationType
    }.items()
    decodable = {kind.name for kind in gguf.quants._type_traits} - {"NVFP4", "BF16"}
    assert decodable == BLOCK_TYPES.keys()


def test_every_type_has_the_values_that_ggml_decodes(tmp_path):
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "sd3")
    expected = {}
    for name, block in BLOCK_TYPES.items():
        rows = generator.integers(0, 256, (3, 2 * block.size), dtype=np.uint8)
        writer.add_tensor(name, rows, raw_dtype=GGMLQuantizationType[name])
        with np.errstate(all="ignore"):
            expected[name] = dequantize(rows, GGMLQuantizationType[name])
    values = generator.standard_normal((2, 3, 5), dtype=np.float32)
    kinds = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
    for name, dtype in kinds.items():
        writer.add_tensor(name, values.astype(dtype))
        expected[name] = values.astype(dtype)
    writer.add_tensor(
        "BF16",
        quantize(values, gguf.GGMLQuantizationType.BF16).view(np.uint8),
        raw_dtype=GGMLQuantizationType.BF16,
    )
    expected["BF16"] = torch.from_numpy(values).bfloat16().float().numpy()
    write(writer)
    archive = open_file(tmp_path / "x.gguf")
    assert archive.infos.keys() == expected.keys()
    for name, value in expected.items():
        assert archive.infos[name] == Info(value.shape, name)
        read = archive[name]
        read = read.float() if name == "BF16" else read
        assert np.array_equal(read.numpy(), value, equal_nan=True), name


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def foreign(path: Path, tensors: Mapping[str, Tensor], kinds: Mapping[str, str], **texts: Any):
    """A file as another program writes it, with tensors of any types that ggml encodes."""
    texts = {"architecture": "sd3", **texts}
    writer = gguf.GGUFWriter(path, texts.pop("architecture"))
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(100)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * 100)
    for key, tensor in tensors.items():
        kind = GGMLQuantizationType[kinds.get(key, "F32")]
        writer.add_tensor(key, quantize(tensor.detach().float().numpy(), kind), raw_dtype=kind)
    write(writer)
    return path


def test_a_file_of_several_types_is_read_as_a_whole(model, tmp_path):
    """Types mixed as llama-quantize does, keys with a prefix, and tensors of other programs."""
    network = model("mmdit")
    tensors = dict(exported(network, "original", prefixed=True))
    turns = ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "F16", "BF16"]
    large = [key for key, tensor in tensors.items() if tensor.ndim == 2 and tensor.numel() > 1024]
    kinds = {key: turns[i % len(turns)] for i, key in enumerate(large)}
    path = foreign(tmp_path / "x.gguf", tensors, kinds, architecture="pig")
    read = mmdit.load_mmdit(path, dtype=torch.float32)
    assert mmdit.load_mmdit(path).compute_dtype == torch.bfloat16
    for key, tensor in exported(read, "original", prefixed=True):
        kind = GGMLQuantizationType[kinds.get(key, "F32")]
        rounded = dequantize(quantize(tensors[key].detach().numpy(), kind), kind)
        assert np.array_equal(tensor.numpy(), rounded.reshape(tensor.shape)), key
    kept = mmdit.load_mmdit(path, dtype=torch.float32, keep_quantized=True)
    assert torch.equal(compute(kept), compute(read))
    found = {p.codes.kind for p in kept.parameters() if isinstance(p, CodedWeight)}
    assert found == set(turns) - {"F16", "BF16"}


def test_a_tensor_may_be_stored_in_another_shape(model, tmp_path):
    tensors = dict(exported(model("mmdit"), "original"))
    key = "joint_blocks.0.x_block.mlp.fc1.weight"
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "sd3")
    for name, tensor in tensors.items():
        values = tensor.detach().numpy()
        if name == key:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", [1024, 256])
            rows = quantize(values.reshape(512, 512), GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, rows, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values)
    write(writer)
    assert open_file(tmp_path / "x.gguf").infos[key] == Info((1024, 256), "Q8_0")
    read = dict(exported(mmdit.load_mmdit(tmp_path / "x.gguf"), "original"))[key]
    torch.testing.assert_close(read.float(), tensors[key], rtol=0.02, atol=0.01)
    with pytest.raises(UserError, match="no matrix of this model is stored in codes"):
        mmdit.load_mmdit(tmp_path / "x.gguf", keep_quantized=True)


def test_tensors_are_decoded_one_after_another(model, tmp_path, monkeypatch):
    """No second copy of the model in float32 is ever in memory."""
    path = mmdit.save_gguf(model("mmdit"), tmp_path / "x.gguf")
    made: list[StorageWeakRef] = []
    most: list[int] = []
    decoded = Codes.decoded

    def watched(codes: Codes, dtype: torch.dtype) -> Tensor:
        most.append(sum(not reference.expired() for reference in made))
        values = decoded(codes, dtype)
        made.append(StorageWeakRef(values.untyped_storage()))
        return values

    monkeypatch.setattr(Codes, "decoded", watched)
    network = mmdit.load_mmdit(path)
    assert len(made) > 15 and max(most) <= 1
    assert compute(network.float()).isfinite().all()
    made.clear()
    mmdit.load_mmdit(path, keep_quantized=True)
    assert not made


# Writing


@pytest.mark.parametrize("quantized", WRITTEN)
@pytest.mark.parametrize("kind", MODELS)
def test_a_written_file_has_the_values_that_the_type_rounds_to(model, tmp_path, kind, quantized):
    network = model(kind)
    path = mmdit.save_gguf(network, tmp_path / "x.gguf", quantized=quantized)
    layout = "gguf" if kind == "t5" else "original"
    archive, tensors = open_file(path), dict(exported(network, layout))
    assert list(archive.infos) == list(tensors)
    rounded = 0
    for key, tensor in tensors.items():
        shape, stored = archive.infos[key]
        assert shape == tensor.shape
        values = tensor.detach().numpy()
        if stored == quantized:
            number = GGMLQuantizationType[stored]
            values, rounded = dequantize(quantize(values, number), number), rounded + tensor.numel()
        else:
            assert stored == "F32"  # as the model is
        assert np.array_equal(archive[key].float().numpy(), values), key
    assert rounded > 0.9 * sum(t.numel() for k, t in tensors.items() if ".weight" in k)
    again = Place(path).load(kind, dtype=torch.float32)
    for key, tensor in exported(again, layout):
        assert torch.equal(tensor, archive[key].float()), key
    expected = torch.float32 if quantized == "F32" else torch.bfloat16
    assert Place(path).load(kind).compute_dtype == expected


def test_ggmls_own_reader_opens_a_written_file(model, tmp_path):
    path = mmdit.save_gguf(model("mmdit").half(), tmp_path / "x.gguf", quantized="Q5_1")
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "sd3"
    assert reader.get_field("general.quantization_version").contents() == 2
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q5_1
    archive = open_file(path)
    assert [tensor.name for tensor in reader.tensors] == list(archive.infos)
    for tensor in reader.tensors:
        info = archive.infos[tensor.name]
        assert tuple(tensor.shape.tolist()[::-1]) == info.shape
        assert tensor.tensor_type.name == info.dtype
        values = dequantize(tensor.data, tensor.tensor_type).reshape(info.shape)
        assert np.array_equal(archive[tensor.name].float().numpy(), values)
    kinds = {name: info.dtype for name, info in archive.infos.items()}
    assert kinds["joint_blocks.0.x_block.attn.qkv.weight"] == "Q5_1"
    assert kinds["joint_blocks.0.x_block.attn.qkv.bias"] == "F32"
    assert kinds["joint_blocks.0.x_block.attn.ln_q.weight"] == "F32"
    for name in ("pos_embed", "context_embedder.weight", "final_layer.linear.weight"):
        assert kinds[name] == "F16"
    for name in ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "y_embedder.mlp.2.weight"):
        assert kinds[name] == "F16"


def test_rows_that_do_not_fit_into_blocks_are_not_rounded(randomize, tmp_path):
    sizes = {"depth": 2, "width": 48, "num_heads": 4, "context_width": 40, "pooled_width": 40}
    network = randomize(MMDiT(**sizes, position_size=6), seed=0)
    path = mmdit.save_gguf(network, tmp_path / "x.gguf")
    kinds = {key: info.dtype for key, info in open_file(path).infos.items()}
    assert kinds["joint_blocks.0.x_block.mlp.fc1.weight"] == "F32"  # rows of 48
    assert kinds["joint_blocks.0.x_block.mlp.fc2.weight"] == "Q8_0"  # rows of 192
    assert mmdit.load_mmdit(path).num_heads == 4  # which the file's shapes do not give


@pytest.mark.parametrize("bits", [torch.float16, torch.bfloat16])
def test_t5_has_the_names_of_llama_cpp(model, tmp_path, bits):
    path = mmdit.save_gguf(model("t5").to(bits), tmp_path / "t5.gguf")
    archive = open_file(path)
    names = {re.sub(r"\.\d\.", ".i.", name) for name in archive.infos}
    parts = ("attn_q", "attn_k", "attn_v", "attn_o", "attn_norm", "attn_rel_b")
    parts += ("ffn_gate", "ffn_up", "ffn_down", "ffn_norm")
    assert names == {
        "token_embd.weight",
        "enc.output_norm.weight",
        *(f"enc.blk.i.{part}.weight" for part in parts),
    }
    assert archive.infos["enc.blk.0.attn_rel_b.weight"].dtype == "F32"  # 64 values
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "t5encoder"
    assert reader.get_field("t5encoder.block_count").contents() == 2
    for dtype in (None, torch.float16):
        t5 = mmdit.load_t5(path, dtype=dtype)
        wide = {name for name, p in t5.named_parameters() if p.dtype == torch.float32}
        assert wide == ({f"layers.{i}.down.weight" for i in range(2)} if dtype else set())
        assert compute(t5).isfinite().all()


PUBLISHED = {
    "sd3_medium": {"depth": 24, "width": 1536, "num_heads": 24},
    "sd3.5_medium": {"depth": 24, "width": 1536, "num_heads": 24, "qk_norm": True},
    "sd3.5_large": {"depth": 38, "width": 2432, "num_heads": 38, "qk_norm": True},
}
PUBLISHED["sd3.5_medium"] |= {"dual_attention": list(range(13)), "position_size": 384}


def on_meta(name: str) -> MMDiT:
    with torch.device("meta"):
        sizes = {"context_width": 4096, "pooled_width": 2048, "position_size": 192}
        return MMDiT(**{**sizes, **PUBLISHED[name]}).to(torch.bfloat16)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_and_sizes_are_those_of_the_published_models(name, monkeypatch):
    """The keys of the single files without prefix; 8B in Q8_0 takes 8.8 GB, as published."""
    monkeypatch.setattr(gguf_writing, "is_finite", lambda _: True)
    tensors = dict(exported(on_meta(name), "original"))
    prefix = "model.diffusion_model."
    published = references.table("manifests")[name]
    bare = {key.removeprefix(prefix) for key in published if key.startswith(prefix)}
    assert tensors.keys() == bare
    kinds = {key: type_of(key, tensor, "Q8_0") for key, tensor in tensors.items()}
    assert set(kinds.values()) == {"Q8_0", "F16", "F32"}
    sizes = {k: stored_bytes(Info(tuple(t.shape), kinds[k])) for k, t in tensors.items()}
    gigabytes = {"sd3_medium": 2.29, "sd3.5_medium": 2.86, "sd3.5_large": 8.78}
    assert sum(sizes.values()) / 1e9 == pytest.approx(gigabytes[name], abs=0.02)
    # Rows of 2,432 values are not whole blocks of 256; only those of fc2 are.
    fitting = {k for k, t in tensors.items() if kinds[k] == "Q8_0" and t.shape[-1] % 256 == 0}
    assert all("mlp.fc2" in key for key in fitting) == (name == "sd3.5_large")


class Header(Archive):
    """A GGUF file of which only the header is there; its tensors are on meta."""

    def __init__(self, network: nn.Module, quantized: str) -> None:
        tensors = dict(exported(network, "original"))
        self.name, self.paths, self.metadata = Path("x.gguf"), [], {}
        self.infos = {
            key: Info(tuple(tensor.shape), type_of(key, tensor, quantized))
            for key, tensor in tensors.items()
        }

    def __getitem__(self, key: str) -> Tensor:
        return torch.empty(self.infos[key].shape, device="meta")

    def codes(self, key: str) -> Codes | None:
        shape, kind = self.infos[key]
        if kind not in BLOCK_TYPES:
            return None
        width = stored_bytes(Info(shape[-1:], kind))
        return Codes(kind, torch.empty(shape[0], width, dtype=torch.uint8, device="meta"))


@pytest.mark.few(1)
@pytest.mark.parametrize(("quantized", "gigabytes"), [("Q8_0", 2.29), ("Q4_0", 1.28)])
def test_a_network_of_2b_that_is_kept_takes_what_its_file_takes(quantized, gigabytes, monkeypatch):
    monkeypatch.setattr(gguf_writing, "is_finite", lambda _: True)
    monkeypatch.setattr(public, "not_finite", lambda _: [])
    monkeypatch.setattr(Codes, "is_finite", lambda _: True)
    archive = Header(on_meta("sd3_medium"), quantized)
    network = load(archive, "mmdit", keep_quantized=True)
    parts = [*network.parameters(), *network.buffers()]
    sizes = [p.stored_bytes if isinstance(p, CodedWeight) else p.nbytes for p in parts]
    assert sum(sizes) / 1e9 == pytest.approx(gigabytes, abs=0.02)
    assert sum(p.numel() for p in network.parameters()) == 2_028_328_000


# Keeping the codes


@pytest.mark.few(6)
@pytest.mark.parametrize("quantized", ["Q8_0", "Q5_1", "Q4_0"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_a_kept_network_computes_what_the_decoded_one_does(model, tmp_path, kind, quantized, dtype):
    path = mmdit.save_gguf(model(kind), tmp_path / "x.gguf", quantized=quantized)
    open_it = mmdit.load_t5 if kind == "t5" else mmdit.load_mmdit
    decoded = open_it(path, dtype=dtype)
    kept = open_it(path, dtype=dtype, keep_quantized=True)
    assert kept.compute_dtype == decoded.compute_dtype == (dtype or torch.bfloat16)
    assert torch.equal(compute(kept), compute(decoded))
    inside = [p for name, p in kept.named_parameters() if "blocks.0" in name or "layers.0" in name]
    matrices = [p for p in inside if p.ndim == 2]
    assert matrices and all(isinstance(p, CodedWeight) for p in matrices)
    assert not any(p.requires_grad for p in matrices)
    block = BLOCK_TYPES[quantized]
    for p in matrices:
        assert p.stored_bytes == p.numel() // block.values * block.size
    for key, value in decoded.state_dict().items():
        assert torch.equal(plain(kept.state_dict()[key]), value), key
    kept.double(), decoded.double()  # a kept weight is rounded less often
    torch.testing.assert_close(compute(kept), compute(decoded), rtol=0.05, atol=0.05)


def test_a_kept_network_is_saved_as_the_decoded_one(model, tmp_path):
    path = mmdit.save_gguf(model("mmdit"), tmp_path / "x.gguf")
    networks = [mmdit.load_mmdit(path, keep_quantized=keep) for keep in (False, True)]
    files = [
        mmdit.save_single_file(network, tmp_path / f"{i}.safetensors").read_bytes()
        for i, network in enumerate(networks)
    ]
    assert files[0] == files[1]


def test_a_pipeline_samples_the_same_from_kept_codes(tiny_published, tmp_path):
    pipe = mmdit.load_pipeline(tiny_published)
    network = mmdit.save_gguf(pipe.mmdit, tmp_path / "network.gguf")
    encoder = mmdit.save_gguf(pipe.text.t5.model, tmp_path / "t5.gguf")
    assert encoder.is_file()
    parts = {"autoencoder": tiny_published, "encoders": tiny_published}
    parts |= {"tokenizers": tiny_published, "dtype": torch.float32}
    options = {"seed": 3, "steps": 2}
    images = [
        mmdit.load_pipeline(network, **parts, keep_quantized=keep)("a red cat", **options)
        for keep in (False, True)
    ]
    assert torch.equal(*images)
    whole = pipe("a red cat", **options)
    assert 0 < (images[0].float() - whole.float()).abs().mean() < 8
    # A folder with the encoders as separate files, T5 in GGUF.
    folder = tmp_path / "encoders"
    folder.mkdir()
    encoder.rename(folder / "t5.gguf")
    for kind in ("clip_l", "clip_g"):
        tower = getattr(pipe.text, kind).model
        mmdit.save_single_file(tower, folder / f"{kind}.safetensors")
    kept = mmdit.load_pipeline(network, **{**parts, "encoders": folder}, keep_quantized=True)
    inner = kept.text.t5.model.layers[0].down.weight  # of rows of 64
    assert isinstance(inner, CodedWeight)
    assert kept("a red cat", **options).shape == whole.shape


def test_adapters_attach_to_kept_layers(tiny_published, tmp_path):
    network = mmdit.save_gguf(mmdit.load_pipeline(tiny_published).mmdit, tmp_path / "x.gguf")
    parts = {"autoencoder": tiny_published, "encoders": tiny_published}
    pipe = mmdit.load_pipeline(network, **parts, tokenizers=tiny_published, keep_quantized=True)
    before = {key: plain(value).clone() for key, value in pipe.mmdit.state_dict().items()}

    def make(inputs: int, outputs: int) -> LoRA:
        return LoRA(inputs=inputs, outputs=outputs, rank=2)

    adapter = Adapter.over(pipe, make, targets="attention+mlp")
    options = {"seed": 1, "steps": 2}
    own = pipe("a red cat", **options)
    pipe.load_lora(adapter)
    assert torch.equal(pipe("a red cat", **options), own)  # new, so it changes nothing
    for change in adapter.changes.values():
        nn.init.normal_(change.up.weight, std=0.3)
    changed = pipe("a red cat", **options)
    assert not torch.equal(changed, own)
    pipe.fuse_lora()
    fused = pipe("a red cat", **options)
    assert (fused.float() - changed.float()).abs().mean() < 8
    pipe.unload_lora()
    after = pipe.mmdit.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(plain(after[key]), value) for key, value in before.items())
    assert any(isinstance(value, CodedWeight) for value in after.values())


def test_what_is_not_quantized_cannot_be_kept(model, tmp_path):
    path = mmdit.save_single_file(model("mmdit"), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="keep_quantized is for GGUF and fp8 files"):
        mmdit.load_mmdit(path, keep_quantized=True)


# Files that are refused


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content)) + content.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


SD3 = entry("general.architecture", 8, text("sd3"))


def listed(name: str, shape: tuple[int, ...], kind: int = 0, at: int = 0) -> bytes:
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return text(name) + axes + struct.pack("<IQ", kind, at)


def packed(
    *tensors: bytes, entries: tuple[bytes, ...] = (SD3,), data: int = 64, **other: Any
) -> bytes:
    """A file of these entries and tensors, and so many zeros."""
    count, number = other.get("count", len(tensors)), other.get("entries_stated", len(entries))
    head = other.get("magic", b"GGUF") + struct.pack("<IQQ", other.get("version", 3), count, number)
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def reshaped(name: str, length: int) -> bytes:
    return entry(f"comfy.gguf.orig_shape.{name}", 9, struct.pack("<IQi", 5, 1, length))


A, B = listed("a", (4,)), listed("b", (4,), at=32)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "another magic": (packed(A, magic=b"GGML"), "is not a GGUF file"),
    "empty": (b"", "it is empty"),
    "a web page": (b"<!doctype html><html>", "it is a web page"),
    "a safetensors file": (b"\x02\0\0\0\0\0\0\0{}", "a safetensors file under another name"),
    "an old version": (packed(A, version=1), "of version 1; versions 2 and 3"),
    "a new version": (packed(A, version=4), "of version 4"),
    "the other byte order": (packed(A, version=0x03000000), "of the other byte order"),
    "only the magic": (b"GGUF", "cut off inside its header"),
    "a count of tensors": (packed(A, count=2**63), "more than 10,000 tensors"),
    "a count above what is there": (packed(A, count=9_000, data=0), "cut off inside its header"),
    "a count of entries": (packed(A, entries_stated=2**60), "entries"),
    "a long name": (packed(listed("k" * 5000, (4,))), "a name has 5,000 characters"),
    "a name without end": (packed(struct.pack("<Q", 2**62)), "a name has 4,611"),
    "a text without end": (packed(entries=(entry("x", 8, struct.pack("<Q", 2**40)),)), "cut off"),
    "a name that is not UTF-8": (packed(struct.pack("<Q", 2) + b"\xff\xff" + A[9:]), "not UTF-8"),
    "an entry twice": (packed(A, entries=(SD3, SD3)), "'general.architecture' twice"),
    "an entry of an unknown type": (packed(A, entries=(entry("x", 99, b""),)), "unknown type 99"),
    "a list of lists": (
        packed(A, entries=(entry("x", 9, struct.pack("<IQ", 9, 1)),)),
        "a list of the unknown type 9",
    ),
    "a list without end": (
        packed(A, entries=(entry("x", 9, struct.pack("<IQ", 0, 2**62)),)),
        "cut off inside its header",
    ),
    "a list of many texts": (
        packed(A, entries=(entry("x", 9, struct.pack("<IQ", 8, 2**40)),)),
        "lists of 1,099,511,627,776 texts",
    ),
    "an alignment": (
        packed(A, entries=(SD3, entry("general.alignment", 4, struct.pack("<I", 48)))),
        "its alignment is 48",
    ),
    "no alignment": (
        packed(A, entries=(SD3, entry("general.alignment", 4, struct.pack("<I", 0)))),
        "its alignment is 0",
    ),
    "an alignment in words": (
        packed(A, entries=(SD3, entry("general.alignment", 8, text("32")))),
        "its alignment is 32",
    ),
    "another architecture": (
        packed(A, entries=(entry("general.architecture", 8, text("flux")),), data=32),
        "of the architecture 'flux'; supported are sd3, t5, t5encoder",
    ),
    "many axes": (packed(listed("a", (1,) * 9)), "'a' has 9 axes"),
    "an axis of zero": (packed(listed("a", (4, 0))), "has the shape [4, 0]"),
    "an absurd axis": (packed(listed("a", (2**62, 2**62))), "has the shape [46"),
    "an absurd size": (packed(listed("a", (2**40, 2**40))), "the file is cut off"),
    "an unknown type": (packed(listed("a", (4,), kind=77)), "a is of the GGUF type 77"),
    "a type that ggml has removed": (packed(listed("a", (4,), kind=4)), "the GGUF type 4"),
    "rows that are not blocks": (packed(listed("a", (2, 48), kind=8)), "cannot be Q8_0, in blocks"),
    "a single number in blocks": (packed(listed("a", (), kind=8)), "cannot be Q8_0"),
    "a tensor twice": (packed(A, listed("a", (4,), at=32)), "'a' is listed twice"),
    "tensors at one place": (packed(A, listed("b", (4,))), "overlaps another tensor"),
    "tensors that overlap": (packed(listed("a", (64,)), B, data=512), "overlaps another tensor"),
    "a gap": (packed(A, listed("b", (4,), at=64), data=96), "out of place"),
    "a tensor off its alignment": (packed(A, listed("b", (4,), at=16)), "out of place"),
    "a position without end": (packed(listed("a", (4,), at=2**63)), "out of place"),
    "cut off": (packed(A, B)[:-40], "the file is cut off, with"),
    "too long": (packed(A, B, data=4096), "longer than its header says"),
    "the shape of nothing": (
        packed(A, entries=(SD3, reshaped("b", 4)), data=32),
        "'comfy.gguf.orig_shape.b' is [4], not a shape",
    ),
    "a shape of other size": (
        packed(A, entries=(SD3, reshaped("a", 5)), data=32),
        "is [5], not a shape of a tensor",
    ),
    "no known model": (packed(A, B), "nor any other known model"),
    "no tensors": (packed(data=0), "holds no tensors at all"),
    "a language model": (packed(listed("blk.0.attn_q.weight", (4,)), data=32), "a language model"),
    "a T5 decoder": (packed(listed("dec.blk.0.attn_q.weight", (4,)), data=32), "a T5 decoder"),
    "the encoder of T5": (packed(listed("enc.blk.0.attn_q.weight", (4,)), data=32), "the T5 enc"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_file_of_a_model_is_refused_in_one_message(tmp_path, name):
    content, expected = HOSTILE[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError) as refusal:
        mmdit.load_mmdit(path)
    message = str(refusal.value)
    assert str(path) in message and expected in message, message
    assert "\n" not in message


def test_a_header_has_a_longest_length(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_header, "LONGEST_HEADER", 1000)
    path = tmp_path / "x.gguf"
    path.write_bytes(packed(A, entries=(entry("x", 8, text("y" * 5000)),)))
    with pytest.raises(UserError, match="a header of more than 1,000 bytes"):
        open_file(path)


def test_every_cut_and_every_changed_byte_is_refused_or_read(model, tmp_path):
    """No other exception leaves the reader, wherever the header is damaged."""
    whole = packed(A, B, listed("c", (2, 32), kind=8, at=64), data=64 + 96)
    path = tmp_path / "x.gguf"
    path.write_bytes(whole)
    assert read_gguf_header(path).tensors["c"].rows == 2
    for end in range(len(whole) - 32):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError):
            open_file(path)
    refused = 0
    for at in range(len(whole) - 160):
        for value in (0, 1, 0x7F, 0xFF):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            try:
                archive = open_file(path)
                assert all(archive[key].shape == info.shape for key, info in archive.infos.items())
            except UserError:
                refused += 1
    assert refused > 2 * (len(whole) - 160)


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop("final_layer.linear.bias"), "1 missing: final_layer.linear.bias"),
    "unexpected": (lambda t: t.update(strange=torch.ones(3)), "1 unexpected: strange"),
    "misshapen": (
        lambda t: t.update({"t_embedder.mlp.0.weight": torch.ones(256, 32)}),
        "1 misshapen: t_embedder.mlp.0.weight [256, 32] instead of [256, 256]",
    ),
    "NaN": (
        lambda t: t["joint_blocks.0.x_block.mlp.fc1.weight"].view(-1)[3:4].fill_(float("nan")),
        "NaN or infinite: joint_blocks.0.x_block.mlp.fc1.weight",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("keep", [False, True])
def test_every_key_is_accounted_for(model, tmp_path, name, keep):
    change, expected = FAULTS[name]
    tensors = {key: t.detach() for key, t in exported(model("mmdit"), "original")}
    change(tensors)
    kinds = {k: "Q8_0" for k, t in tensors.items() if t.ndim == 2 and t.numel() > 1024}
    with np.errstate(all="ignore"):
        path = foreign(tmp_path / "x.gguf", tensors, kinds)
    with pytest.raises(UserError, match=re.escape(expected)):
        mmdit.load_mmdit(path, keep_quantized=keep)


def test_a_changed_byte_of_a_file_of_ours_is_found(model, tmp_path):
    path = mmdit.save_gguf(model("mmdit"), tmp_path / "x.gguf")
    content = bytearray(path.read_bytes())
    start = read_gguf_header(path).data
    known = open_file(path).metadata[gguf_archive.CONTENT]
    assert hashlib.sha256(content[start:]).hexdigest() == known
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged: its content is not what was written"):
        mmdit.load_mmdit(path)
    assert mmdit.load_mmdit(path, verify=False)


@pytest.mark.parametrize(
    ("value", "quantized", "expected"),
    [
        (float("nan"), "Q8_0", "NaN or infinite: joint_blocks.0"),
        (float("inf"), "BF16", "NaN or infinite: joint_blocks.0"),
        (1e30, "Q8_0", "too large for Q8_0"),
        (-1e5, "Q5_1", "too large for Q5_1"),
    ],
)
def test_what_a_type_cannot_hold_is_not_written(model, tmp_path, value, quantized, expected):
    network = model("mmdit")
    with torch.no_grad():
        network.blocks[0].image.mlp.fc1.weight[0, 0] = value
    with pytest.raises(UserError, match=expected):
        mmdit.save_gguf(network, tmp_path / "x.gguf", quantized=quantized)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quantized", ["Q8_0", "Q5_1", "Q4_0"])
def test_zeros_and_tiny_numbers_stay_finite(model, tmp_path, quantized):
    network = model("mmdit")
    with torch.no_grad():
        network.blocks[0].image.mlp.fc1.weight.zero_()
        network.blocks[0].image.mlp.fc2.weight.mul_(1e-40)
    read = mmdit.load_mmdit(mmdit.save_gguf(network, tmp_path / "x.gguf", quantized=quantized))
    assert not read.blocks[0].image.mlp.fc1.weight.any()
    assert not read.blocks[0].image.mlp.fc2.weight.any()


def test_what_has_no_place_in_a_gguf_file_is_refused(model, tiny, tiny_published, tmp_path):
    network = model("mmdit")
    for thing, name, options, expected in (
        (network, "x.safetensors", {}, "must end in .gguf"),
        (network, "x.gguf", {"quantized": "Q4_K"}, "quantized"),
        (tiny("autoencoder"), "x.gguf", {}, "not a.? Autoencoder"),
        (mmdit.load_pipeline(tiny_published), "x.gguf", {}, "give pipe.mmdit"),
    ):
        with pytest.raises(UserError, match=expected):
            mmdit.save_gguf(thing, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_without_the_package_what_needs_it_says_so(model, tmp_path, monkeypatch):
    network = model("mmdit")
    path = mmdit.save_gguf(network, tmp_path / "x.gguf")
    rows = np.zeros((2, BLOCK_TYPES["IQ4_NL"].size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "iq.gguf", "sd3")
    writer.add_tensor("a", rows, raw_dtype=GGMLQuantizationType.IQ4_NL)
    write(writer)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert mmdit.load_mmdit(path).compute_dtype == torch.bfloat16  # no package is needed
    needs = re.escape('pip install -e ".[gguf]"')
    with pytest.raises(UserError, match=f"writing GGUF files needs the package gguf.*{needs}"):
        mmdit.save_gguf(network, tmp_path / "y.gguf")
    with pytest.raises(UserError, match=f"IQ4_NL needs the package gguf.*{needs}"):
        open_file(tmp_path / "iq.gguf")["a"]


# The command


def test_the_command_quantizes_public_weights_and_runs(model, tmp_path, capsys):
    source = mmdit.save_single_file(model("mmdit"), tmp_path / "x.safetensors")
    out = tmp_path / "x.gguf"
    main([str(source), str(out), "--format", "gguf", "--quantized", "Q5_1"])
    assert capsys.readouterr().out == f"{out}\n"
    assert "Q5_1" in {info.dtype for info in open_file(out).infos.values()}
    again = tmp_path / "again.safetensors"
    main([str(out), str(again), "--format", "single_file", "--quantized", "scaled_fp8"])
    assert mmdit.load_mmdit(again).compute_dtype == torch.bfloat16
    t5 = mmdit.save_single_file(model("t5"), tmp_path / "t5.safetensors")
    main([str(t5), str(tmp_path / "t5.gguf"), "--format", "gguf", "--part", "t5"])
    assert compute(mmdit.load_t5(tmp_path / "t5.gguf")).isfinite().all()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--format", "gguf", "--quantized", "fp8"], "--format gguf has no --quantized fp8"),
        (["--quantized", "Q8_0"], "--format native has no --quantized Q8_0"),
        (["--format", "gguf", "--part", "t5"], "holds no T5 encoder"),
    ],
)
def test_mistakes_of_the_command_give_one_line(model, tmp_path, capsys, words, expected):
    source = mmdit.save_single_file(model("mmdit"), tmp_path / "x.safetensors")
    with pytest.raises(SystemExit) as stop:
        main([str(source), str(tmp_path / "x.gguf"), *words])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1
    assert not (tmp_path / "x.gguf").exists()
