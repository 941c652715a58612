"""Whole pictures through the originals' objects, sampled as GLIDE's notebooks do: same seed, same picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from glide_fast.compat.glide_text2im.clip.model_creation import create_clip_model
from glide_fast.compat.glide_text2im.model_creation import create_model_and_diffusion
from glide_fast.compat.glide_text2im.respace import SpacedDiffusion
from glide_fast.compat.glide_text2im.text2im_model import Text2ImUNet
from tests.golden import assert_close, data, entry, fill


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The fixtures were computed with one thread, and networks this small gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stored(name: str, key: str) -> Tensor:
    return torch.from_numpy(data(name)[key])


def build(name: str, stage: str) -> tuple[Text2ImUNet, SpacedDiffusion]:
    model, diffusion = create_model_and_diffusion(**entry(name)[f"{stage}_options"])
    fill(model, entry(name)[f"{stage}_seed"])
    return model.eval(), diffusion


def prompt_of(model: Text2ImUNet, options: dict[str, Any], *prompts: str) -> dict[str, Tensor]:
    """Tokens and mask of the prompts, as the notebooks make them."""
    tokenizer: Any = model.tokenizer
    rows = [
        tokenizer.padded_tokens_and_mask(tokenizer.encode(prompt), options["text_ctx"]) for prompt in prompts
    ]
    return {
        "tokens": torch.tensor([tokens for tokens, _ in rows]),
        "mask": torch.tensor([mask for _, mask in rows], dtype=torch.bool),
    }


def classifier_free(model: Text2ImUNet, scale: float) -> Callable[..., Tensor]:
    """The notebooks' guidance on a batch of which the second half has no prompt."""

    def guided(x: Tensor, timesteps: Tensor, **conditions: Tensor) -> Tensor:
        half = x[: len(x) // 2]
        output = model(torch.cat([half, half]), timesteps, **conditions)
        epsilon, rest = output[:, :3], output[:, 3:]
        with_prompt, without = epsilon.chunk(2)
        mixed = without + scale * (with_prompt - without)
        return torch.cat([torch.cat([mixed, mixed]), rest], dim=1)

    return guided


def check_steps(name: str, stage: str, steps: list[dict[str, Tensor]]) -> Tensor:
    """Compare every stored step and the end; the last pictures return."""
    for key in data(name):
        if key.startswith(f"{stage}.step"):
            assert_close(steps[int(key.rpartition("step")[2])]["sample"], name, key)
    assert_close(steps[-1]["sample"], name, f"{stage}.final")
    assert_close(steps[-1]["pred_xstart"], name, f"{stage}.final_pred_xstart")
    return steps[-1]["sample"]


def assert_levels_close(x: Tensor, name: str) -> None:
    levels = ((x + 1) * 127.5).round().clamp(0, 255) - stored(name, "uint8").float()
    assert levels.abs().max() <= 1
    assert levels.abs().mean() < 0.01


def keep(known: dict[str, Tensor]) -> Callable[[Tensor], Tensor] | None:
    """The inpainting notebook's ``denoised_fn``; none where nothing is known."""
    if not known:
        return None
    image, mask = known["inpaint_image"], known["inpaint_mask"]
    return lambda x_start: x_start * (1 - mask) + image * mask


def known_of(name: str, size: int, copies: int) -> dict[str, Tensor]:
    if name != "picture_inpaint":
        return {}
    image, mask = stored(name, f"in.image{size}"), stored(name, f"in.mask{size}")
    return {"inpaint_image": image.repeat(copies, 1, 1, 1), "inpaint_mask": mask.repeat(copies, 1, 1, 1)}


@pytest.mark.parametrize("name", ["picture_text2im", "picture_inpaint"])
def test_text_to_picture_and_inpainting(name: str) -> None:
    given = entry(name)
    (base, base_diffusion), (up, up_diffusion) = build(name, "base"), build(name, "up")
    prompts = prompt_of(base, given["base_options"], given["prompt"], "")
    assert torch.equal(prompts["tokens"], stored(name, "in.tokens").long())
    assert torch.equal(prompts["mask"], stored(name, "in.mask").bool())

    torch.manual_seed(given["torch_seed"])  # after building, which draws as well
    known = known_of(name, 16, 2)
    steps = list(
        base_diffusion.p_sample_loop_progressive(
            classifier_free(base, given["guidance_scale"]),
            (2, 3, 16, 16),
            device="cpu",
            clip_denoised=True,
            model_kwargs={**prompts, **known},
            denoised_fn=keep(known),
        )
    )
    samples = check_steps(name, "base", steps)[:1]
    low_res = ((samples + 1) * 127.5).round() / 127.5 - 1
    assert ((low_res - stored(name, "low_res")).abs() * 127.5).max() < 1.01

    known = known_of(name, 32, 1)
    loop = (
        up_diffusion.ddim_sample_loop_progressive
        if name == "picture_text2im"
        else up_diffusion.p_sample_loop_progressive
    )
    conditions = prompt_of(up, given["up_options"], given["prompt"])
    steps = list(
        loop(
            up,
            (1, 3, 32, 32),
            noise=torch.randn(1, 3, 32, 32) * given["upsample_temp"],
            clip_denoised=True,
            model_kwargs={"low_res": stored(name, "low_res"), **conditions, **known},
            denoised_fn=keep(known),
        )
    )
    assert_levels_close(check_steps(name, "up", steps), name)
    assert_close(torch.randn(4), name, "rng_next")


def test_clip_guided_picture(tmp_path: Path) -> None:
    name = "picture_clip_guided"
    given = entry(name)
    model, diffusion = build(name, "base")
    path = tmp_path / "clip.yaml"
    path.write_text(yaml.safe_dump(given["clip_config"]), encoding="utf-8")
    clip = create_clip_model(config_path=str(path), device="cpu")
    for tower, seed in given["clip_seeds"].items():
        fill(getattr(clip, tower), seed)
    guide = clip.cond_fn([given["prompt"]], given["guidance_scale"])
    torch.manual_seed(given["torch_seed"])
    steps = list(
        diffusion.p_sample_loop_progressive(
            model,
            (1, 3, 16, 16),
            clip_denoised=True,
            model_kwargs=prompt_of(model, given["base_options"], given["prompt"]),
            cond_fn=guide,
        )
    )
    assert_levels_close(check_steps(name, "base", steps), name)
    assert_close(torch.randn(4), name, "rng_next")
