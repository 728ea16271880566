"""What training will take in memory, against what an allocator gives out in real steps."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from torch import nn

from mmdit.cli.formulations import store_formulations
from mmdit.cli.launch import launch
from mmdit.engine.footprint import Ledger, Share, bytes_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "eval" / "memory.py"
SMALL = ("model.depth=2", "model.width=96", "model.num_heads=2", "device=cpu")

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*words, code=0)`: what the script prints; on stderr, where code is 2."""

    def call(*words: str, code: int = 0) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["memory.py", *words])
        GlobalHydra.instance().clear()
        module = import_module("mmdit.cli.eval.memory")
        store_formulations()
        capsys.readouterr()
        if code == 0:
            launch(module.job, config_name="memory", verbatim=module.VERBATIM)
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stop:
            launch(module.job, config_name="memory", verbatim=module.VERBATIM)
        message = capsys.readouterr().err
        assert stop.value.code == code
        assert "Traceback" not in message
        return message

    return call


def report() -> dict[str, Any]:
    """The newest: what differs from an earlier report stands beside it."""
    files = Path("results/memory").glob("*.json")
    found: dict[str, Any] = json.loads(max(files, key=lambda f: f.stat().st_mtime_ns).read_text())
    return found


def check_measured(found: dict[str, Any], *, within: float = 0.1) -> None:
    assert set(found["measured"]) >= {"weights", "moments", "gradients", "activations", "total"}
    for name, row in found["measured"].items():
        assert row["measured"] > 0, name
        assert abs(row["deviation"]) < within, (name, row)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("precision=bf16", "batch=4"),
        *(
            pytest.param(words, marks=pytest.mark.slow)
            for words in [
                ("precision=fp32", "batch=64", "optimizer=muon"),
                (
                    "precision=bf16",
                    "batch=4",
                    "activation_checkpointing=selective",
                    "optimizer=muon",
                ),
                ("precision=fp32", "batch=64", "activation_checkpointing=selective"),
                (
                    *("precision=bf16", "batch=32", "activation_checkpointing=full"),
                    "training.accumulation=2",
                ),
                (
                    *("precision=fp32", "batch=8", "activation_checkpointing=full"),
                    "latents=from_pixels",
                ),
            ]
        ),
    ],
    ids=" ".join,
)
def test_a_prediction_is_what_real_steps_take(run, words):
    run("measure=true", *SMALL, *words)
    check_measured(report())


def test_weights_in_8_bits_are_not_predicted(run):
    message = run("adapter=lora", "base_dtype=int8", code=2)
    assert "base_dtype=int8: memory of weights in 8 bits is not predicted" in message


@pytest.mark.slow
def test_an_adapter_takes_less_than_its_model(run):
    words = ("model=d24", "image_size=64", "batch=1", "activation_checkpointing=full")
    run(*words, "adapter=lora", "adapter.rank=16", "base_dtype=bf16")
    found = report()
    # Of 24 blocks: 8 matrices, but for the last, where the text has no output; 2 x 16 x 1536 each.
    assert found["trained"] == (24 * 8 - 1) * 2 * 16 * 1536
    assert found["peak"]["weights"] == found["peak"]["averages"] == 4 * found["trained"]
    assert found["peak"]["moments"] == pytest.approx(8 * found["trained"], rel=1e-3)
    assert found["peak"]["frozen parts"] < 2.3 * found["parameters"]["mmdit"]
    assert found["fits"][0] == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("parallel=fsdp", "precision=bf16", "batch=4"),
        ("parallel=fsdp", "precision=fp32", "batch=32", "activation_checkpointing=full"),
        ("parallel=ddp", "precision=bf16", "batch=8", "training.accumulation=2"),
    ],
    ids=" ".join,
)
def test_the_same_for_two_processes(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *meeting]
    command += [str(SCRIPT), "measure=true", *SMALL, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    check_measured(report(), within=0.15)  # gloo frees later on a busy machine


@pytest.mark.slow
def test_the_largest_model_over_64_processes(run):
    words = ("model=d38", "parallel=fsdp", "world_size=64", "batch=4")
    run(*words, "activation_checkpointing=full")
    found = report()
    assert (found["image_size"], found["text_length"]) == (1024, 154)
    parameters = found["parameters"]["mmdit"]
    assert 8.0e9 < parameters < 8.2e9
    share = 4 * parameters / 64
    sizes = {"weights": share, "averages": share, "moments": 2 * share}
    for name, size in sizes.items():
        assert size <= found["largest"][name] < 1.01 * size
    assert share <= found["kept_by_backward"] < 1.01 * share
    # Between its two passes, a block's input is kept and little else: two streams in bfloat16.
    inputs = 38 * 4 * (64**2 + 154) * 2432 * 2
    assert inputs < found["kept_by_forward"] < 1.3 * inputs
    assert found["total"] == sum(found["peak"].values())


@pytest.mark.slow
def test_more_processes_hold_smaller_shares(run):
    totals = {}
    words = ("model=d15", "batch=1", "image_size=256", "parallel=fsdp")
    for more in ("world_size=8", "world_size=16", "world_size=16 parallel.replicas=2"):
        run(*words, *more.split())
        totals[more] = report()["largest"]
    eight, sixteen, replicas = totals.values()
    assert sixteen["weights"] == pytest.approx(eight["weights"] / 2, rel=0.01)
    assert replicas == eight


@pytest.mark.slow
def test_cuda_keeps_no_probabilities(run):
    kept = {}
    for device in ("cpu", "cuda"):
        run("image_size=128", f"device={device}", "precision=fp32", "batch=4")
        kept[device] = report()["kept_by_forward"]
    probabilities = 4 * 4 * 3 * (16**2 + 26) ** 2 * 4  # layers, samples, heads, in float32
    assert kept["cpu"] - kept["cuda"] > 0.7 * probabilities


@pytest.mark.slow
def test_moments_by_optimizer(run):
    moments = {}
    for name in ("adamw", "muon", "adamw_8bit"):
        run("model=d15", "batch=1", "image_size=256", f"optimizer={name}")
        moments[name] = report()["largest"]["moments"]
    assert moments["adamw"] / 2 < moments["muon"] < 0.6 * moments["adamw"]
    assert moments["adamw"] / 4 < moments["adamw_8bit"] < 0.27 * moments["adamw"]


@pytest.mark.slow
def test_frozen_encoders_are_held_whole(run):
    frozen = []
    for encoders in ("[]", "[t5]"):
        run(
            *("model=d15", "image_size=256", "parallel=fsdp", "world_size=8", "batch=1"),
            f"encoders={encoders}",
        )
        frozen.append(report()["largest"]["frozen parts"])
    assert frozen[1] - frozen[0] == pytest.approx(9.5e9, rel=0.01)  # 4.76B values in 16 bits


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("batch=0",), "batch=0 must be a whole number of at least 1"),
        (("batch=many",), "batch='many' must be a whole number"),
        (("batchs=3",), "Did you mean batch?"),
        (("parallel=fsdp", "world_size=7"), "training.batch_size=128 must be divisible by"),
        (("world_size=2",), "parallel=single needs world_size=1, not 2"),
        (("world_size=0",), "world_size=0"),
        (("parallel=fsdp", "world_size=8", "parallel.replicas=3"), "parallel.replicas 3 must"),
        (("device=tpu",), "device=tpu must be auto, cuda or cpu"),
        (("precision=fp8",), "'fp8'"),
        (("image_size=33",), "33 must be a multiple of 8"),
        (("image_size=wide",), "image_size='wide' must be a whole number"),
        (("activation_checkpointing=some",), "must be one of none, selective, full"),
        (("optimizer=adamw_8bit", "parallel=fsdp", "world_size=2"), "choose ddp"),
        (("encoders=[bert]",), "clip_l, clip_g, t5"),
        (("encoders=[t5]", "measure=true"), "only predicted"),
        (("measure=maybe",), "measure='maybe' must be true or false"),
        (("measure=true", "parallel=ddp", "world_size=2"), "torchrun --nproc_per_node=2"),
        (("measure=true", "parallel=ddp"), "parallel=ddp is for processes that torchrun starts"),
        (("compile=true",), "compile=true"),
        (("model=d39",), "model has no option 'd39'"),
    ],
)
def test_a_mistake_ends_in_one_message(run, words, message):
    assert message in run(*words, code=2)


def test_the_ledger_counts_storages_once_and_forgets_them():
    layer = nn.Linear(8, 4, device="meta")
    with Ledger() as ledger:
        for weight in layer.parameters():
            ledger.claim(weight, "weights", counted=False)
        x = torch.empty(16, 8, device="meta")
        y = layer(x)
        assert ledger.held == {"weights": 0, "activations": 4 * (16 * 8 + 16 * 4)}
        view = y[2:]
        del y
        assert ledger.held["activations"] == 4 * (16 * 8 + 16 * 4)
        del view
        assert ledger.held["activations"] == 4 * 16 * 8
        half = layer.weight.half()
        assert ledger.held["weights in use"] == 2 * 8 * 4
        del half
    assert ledger.peak.total() == 4 * (16 * 8 + 16 * 4)


def test_shares_are_those_of_fsdp():
    share = Share(4)
    for rows in (1, 3, 4, 5, 8):
        weight = torch.empty(rows, 6)
        largest = max(len(chunk) for chunk in weight.chunk(4))
        assert share(weight.shape) == (largest, 6)
        assert share.gathered(weight) == 4 * largest * 6
    assert bytes_of([weight, weight[1:]]) == 8 * 6 * 4
