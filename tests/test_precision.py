"""Where and how precisely is computed is what the config says, or it is refused."""

import pytest
import torch

import mmdit
from mmdit import precision
from mmdit.devices import available
from mmdit.errors import UserError
from mmdit.metrics.features import load_clip_features


@pytest.mark.parametrize("name", [None, 1.5, [1], True, "x", "", "meta", "hpu", "xla"])
def test_what_is_no_device_is_refused(name):
    with pytest.raises(UserError, match=r"^device="):
        available(name)


@pytest.mark.parametrize("name", ["cuda:7", "mps", "nonsense"])
def test_a_device_that_is_not_here_is_refused_in_one_line_before_anything_is_read(name):
    said = rf"^device={name} is not available here: use device=cpu or auto \(torch .*CUDA device"
    for load in (mmdit.load_pipeline, load_clip_features):
        with pytest.raises(UserError, match=said) as told:
            load("nowhere", device=name)
        assert len(str(told.value).splitlines()) == 1


def test_a_pipeline_may_be_put_where_there_is_most_power(tiny_published):
    pipe = mmdit.load_pipeline(tiny_published, device="auto")
    assert pipe.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("known", "dtype", "said"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16, "this cpu has AMX"),
        ({"avx512_f": True, "avx512_bf16": True}, torch.bfloat16, "this cpu has AVX512-BF16"),
        ({"neon": True, "bf16": True}, torch.bfloat16, "this cpu has NEON-BF16"),
        ({"sve_bf16": True, "bf16": True}, torch.bfloat16, "this cpu has SVE-BF16"),
        ({"avx2": True, "avx512_f": True}, torch.float32, "no bfloat16 matrix instructions"),
        ({}, torch.float32, "no bfloat16 matrix instructions"),
    ],
)
def test_auto_is_bf16_where_the_processor_multiplies_it(monkeypatch, known, dtype, said):
    monkeypatch.setattr(precision, "cpu_capabilities", lambda: known)
    assert precision.chosen_dtype(CPU, "auto") == dtype
    with precision.autocast(CPU, "auto")():
        assert torch.is_autocast_enabled("cpu") == (dtype == torch.bfloat16)
    assert said in precision.reason(CPU, "auto")
    for asked, expected in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        assert precision.chosen_dtype(CPU, asked) == expected
        assert precision.reason(CPU, asked) == f"{asked}, as requested by precision={asked}"


def test_capabilities_are_those_of_the_processor_with_old_versions_of_torch_too(monkeypatch):
    known = precision.cpu_capabilities()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert precision.cpu_capabilities() == {"amx_bf16": True, "avx512_bf16": False}
    assert set(precision.CPU_UNITS) & set(known) or known["architecture"] not in ("x86_64", "arm64")


def test_a_device_that_is_neither_gpu_nor_cpu_computes_in_float32():
    assert precision.chosen_dtype(torch.device("meta"), "auto") == torch.float32
