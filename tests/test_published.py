"""Pipelines of public weights: against the reference, against diffusers, and saved again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mmdit
from mmdit.checkpoints.archive import open_file
from mmdit.checkpoints.public import load
from mmdit.errors import UserError
from mmdit.flow.guidance import ClassifierFreeGuidance, SkipLayerGuidance
from mmdit.flow.condition import Condition
from mmdit.flow.solvers import dpmpp_2m, euler
from mmdit.models.autoencoder import Autoencoder
from mmdit.pipeline import NetworkVelocity, to_pixels
from mmdit.published import published_objective
from mmdit.text.conditioning import TextConditioner, TextEncoder, TokenIds


def hints(model: dict[str, Any]) -> dict[str, Any]:
    """What the shapes of a golden case do not tell."""
    names = {"num_heads": "num_heads", "num_attention_heads": "num_heads", "hidden_act": "activation"}
    return {ours: model[theirs] for theirs, ours in names.items() if theirs in model}


@torch.no_grad()
def test_whole_pipeline_matches_the_reference(golden, tmp_path):
    case = golden("pipeline")
    models, calls = case.config["model"], case.config["call"]
    # The case has no VAE encoder: one of ours fills the file.
    spare = Autoencoder(width=32, multipliers=[1, 1], blocks=1)
    mmdit.save_single_file(spare, tmp_path / "vae.safetensors")
    whole = {
        f"first_stage_model.{key}": open_file(tmp_path / "vae.safetensors")[key]
        for key in open_file(tmp_path / "vae.safetensors").infos
    }
    save_file({**whole, **case.weights}, tmp_path / "all.safetensors")
    archive = open_file(tmp_path / "all.safetensors")
    parts = {
        kind: load(archive, kind, hints=hints(models[kind])) for kind in ("clip_l", "clip_g", "t5")
    }
    network = load(archive, "mmdit", hints=hints(models["mmdit"]))
    autoencoder = load(archive, "autoencoder")
    print(case.inputs.keys())
