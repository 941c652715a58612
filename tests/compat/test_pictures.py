"""Whole pictures through guided- and improved-diffusion's names: same seed, same picture as the originals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glide_fast.compat.guided_diffusion import script_util as guided_script
from glide_fast.compat.guided_diffusion import unet as guided
from glide_fast.compat.improved_diffusion import script_util as improved_script
from glide_fast.compat.improved_diffusion import unet as improved
from tests.golden import assert_close, data, entry, fill


def diffusion(script: Any, name: str, respacing: str) -> Any:
    options = entry(name)["diffusion"]
    return script.create_gaussian_diffusion(
        steps=options["steps"],
        learn_sigma=True,
        noise_schedule=options["name"],
        rescale_timesteps=options["rescale"],
        timestep_respacing=respacing,
    )


def check(loop: str, name: str, sampler: Any, model: Any, **arguments: Any) -> None:
    """Run a progressive loop from the fixture's seed and compare every stored step."""
    torch.manual_seed(entry(name)["torch_seed"])
    kind = "p_sample_loop" if loop == "p" else "ddim_sample_loop"
    steps = list(
        getattr(sampler, f"{kind}_progressive")(model, entry(name)["shape"], device="cpu", **arguments)
    )
    assert_close(torch.randn(4), name, f"{loop}.rng_next")
    assert_close(steps[-1]["sample"], name, f"{loop}.final")
    assert_close(steps[-1]["pred_xstart"], name, f"{loop}.final_pred_xstart")
    for key in data(name):
        if key.startswith(f"{loop}.step"):
            assert_close(steps[int(key.rpartition("step")[2])]["sample"], name, key)
    if loop == "p":
        levels = ((steps[-1]["sample"] + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        assert np.abs(levels.numpy().astype(int) - data(name)["uint8"]).max() <= 1


@pytest.mark.parametrize("loop", ["p", "ddim"])
def test_classifier_guidance(loop: str) -> None:
    name = "picture_classifier_guided"
    settings = entry(name)
    model = fill(guided.UNetModel(**settings["unet"]), settings["unet_seed"]).eval()
    classifier = fill(guided.EncoderUNetModel(**settings["classifier"]), settings["classifier_seed"]).eval()

    def cond_fn(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            log_probs = F.log_softmax(classifier(x_in, t), dim=-1)
            selected = log_probs[range(len(y)), y]
            return torch.autograd.grad(selected.sum(), x_in)[0] * settings["classifier_scale"]

    sampler = diffusion(guided_script, name, settings["diffusion"]["respacing"][loop])
    check(loop, name, sampler, model, cond_fn=cond_fn, model_kwargs={"y": torch.tensor(settings["y"])})


@pytest.mark.parametrize("loop", ["p", "ddim"])
def test_improved_diffusion(loop: str) -> None:
    name = "picture_improved"
    model = fill(improved.UNetModel(**entry(name)["unet"]), entry(name)["unet_seed"]).eval()
    check(loop, name, diffusion(improved_script, name, entry(name)["diffusion"]["respacing"]), model)
