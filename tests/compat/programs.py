"""Programs written for the original projects, as text: notebooks and READMEs in a small configuration."""

from __future__ import annotations

import json
from pathlib import Path

INSTALL = "# Once.\n!pip install git+https://github.com/openai/glide-text2im\n%matplotlib inline"

MODELS = """
import torch as th
from PIL import Image
from IPython.display import display

from glide_text2im.download import load_checkpoint
from glide_text2im.model_creation import (
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    model_and_diffusion_defaults_upsampler,
)

has_cuda = False
device = th.device('cpu' if not has_cuda else 'cuda')

def make(defaults, name, small):
    options = dict(defaults, **small)
    options['use_fp16'] = has_cuda
    model, diffusion = create_model_and_diffusion(**options)
    model.eval()
    if has_cuda:
        model.convert_to_fp16()
    model.to(device)
    model.load_state_dict(load_checkpoint(name, device, progress=False))
    return model, diffusion, options

def show_images(batch):
    levels = ((batch + 1) * 127.5).round().clamp(0, 255).to(th.uint8).cpu()
    display(Image.fromarray(levels.permute(2, 0, 3, 1).reshape([batch.shape[2], -1, 3]).numpy()))

def text(model, options, *prompts):
    rows = [
        model.tokenizer.padded_tokens_and_mask(model.tokenizer.encode(prompt), options['text_ctx'])
        for prompt in prompts
    ]
    return dict(
        tokens=th.tensor([tokens for tokens, _ in rows], device=device),
        mask=th.tensor([mask for _, mask in rows], dtype=th.bool, device=device),
    )

prompt, guidance_scale, upsample_temp = "an oil painting of a corgi", 3.0, 0.997
"""

GUIDED = """
def model_fn(x_t, ts, **kwargs):
    half = x_t[: len(x_t) // 2]
    out = model(th.cat([half, half], dim=0), ts, **kwargs)
    eps, rest = out[:, :3], out[:, 3:]
    cond, uncond = th.split(eps, len(eps) // 2, dim=0)
    mixed = uncond + guidance_scale * (cond - uncond)
    return th.cat([th.cat([mixed, mixed], dim=0), rest], dim=1)
"""

TEXT2IM = [
    INSTALL,
    MODELS,
    """
import json
small = json.load(open('options.json'))
model, diffusion, options = make(model_and_diffusion_defaults(), 'base', small['base'])
model_up, diffusion_up, options_up = make(model_and_diffusion_defaults_upsampler(), 'upsample', small['up'])
print('total base parameters', sum(x.numel() for x in model.parameters()))
""",
    GUIDED,
    """
th.manual_seed(71)
model.del_cache()
samples = diffusion.p_sample_loop(
    model_fn,
    (2, 3, options["image_size"], options["image_size"]),
    device=device,
    clip_denoised=True,
    progress=False,
    model_kwargs=text(model, options, prompt, ""),
    cond_fn=None,
)[:1]
model.del_cache()
show_images(samples)
""",
    """
up_shape = (1, 3, options_up["image_size"], options_up["image_size"])
up_samples = diffusion_up.ddim_sample_loop(
    model_up,
    up_shape,
    noise=th.randn(up_shape, device=device) * upsample_temp,
    device=device,
    clip_denoised=True,
    progress=False,
    model_kwargs=dict(
        low_res=((samples+1)*127.5).round()/127.5 - 1, **text(model_up, options_up, prompt)
    ),
    cond_fn=None,
)[:1]
show_images(up_samples)
len(up_samples)
""",
]

INPAINT = [
    INSTALL,
    MODELS,
    """
import json
import numpy as np
small = json.load(open('options.json'))
model, diffusion, options = make(model_and_diffusion_defaults(), 'base-inpaint', small['base'])
model_up, diffusion_up, options_up = make(
    model_and_diffusion_defaults_upsampler(), 'upsample-inpaint', small['up']
)
known = {name: th.from_numpy(array) for name, array in np.load('known.npz').items()}

def paste(model_kwargs):
    def denoised_fn(x_start):
        mask, image = model_kwargs['inpaint_mask'], model_kwargs['inpaint_image']
        return x_start * (1 - mask) + image * mask
    return denoised_fn
""",
    GUIDED,
    """
th.manual_seed(71)
model_kwargs = dict(
    inpaint_image=known['image16'].repeat(2, 1, 1, 1),
    inpaint_mask=known['mask16'].repeat(2, 1, 1, 1),
    **text(model, options, prompt, ""),
)
samples = diffusion.p_sample_loop(
    model_fn,
    (2, 3, options["image_size"], options["image_size"]),
    device=device,
    clip_denoised=True,
    model_kwargs=model_kwargs,
    denoised_fn=paste(model_kwargs),
)[:1]
show_images(samples)
""",
    """
up_shape = (1, 3, options_up["image_size"], options_up["image_size"])
model_kwargs = dict(
    low_res=((samples+1)*127.5).round()/127.5 - 1,
    inpaint_image=known['image32'],
    inpaint_mask=known['mask32'],
    **text(model_up, options_up, prompt),
)
up_samples = diffusion_up.p_sample_loop(
    model_up,
    up_shape,
    noise=th.randn(up_shape, device=device) * upsample_temp,
    device=device,
    clip_denoised=True,
    model_kwargs=model_kwargs,
    denoised_fn=paste(model_kwargs),
)[:1]
show_images(up_samples)
""",
]

CLIP_GUIDED = [
    INSTALL,
    MODELS,
    """
import json
from glide_text2im.clip.model_creation import create_clip_model
from glide_text2im.tokenizer.simple_tokenizer import SimpleTokenizer

model, diffusion, options = make(
    model_and_diffusion_defaults(), 'base', json.load(open('options.json'))['base']
)
clip_model = create_clip_model(device=device, config_path='clip.yaml', tokenizer=SimpleTokenizer())
clip_model.image_encoder.load_state_dict(load_checkpoint('clip/image-enc', device))
clip_model.text_encoder.load_state_dict(load_checkpoint('clip/text-enc', device))
""",
    """
cond_fn = clip_model.cond_fn([prompt], guidance_scale)
th.manual_seed(71)
samples = diffusion.p_sample_loop(
    model,
    (1, 3, options["image_size"], options["image_size"]),
    device=device,
    clip_denoised=True,
    model_kwargs=text(model, options, prompt),
    cond_fn=cond_fn,
)
show_images(samples)
""",
]

CLIP_README = """
import sys
import torch
import clip
from PIL import Image

device = "cuda" if torch.cuda.is_available() else "cpu"
model, preprocess = clip.load(sys.argv[1], device=device)

image = preprocess(Image.open(sys.argv[2])).unsqueeze(0).to(device)
text = clip.tokenize(["a diagram", "a dog", "a cat"]).to(device)

with torch.no_grad():
    image_features = model.encode_image(image)
    text_features = model.encode_text(text)
    logits_per_image, logits_per_text = model(image, text)
    probs = logits_per_image.softmax(dim=-1).cpu().numpy()

print("Label probs:", probs)
"""

OBSERVER = """
import json
import os
import sys

import blobfile as bf
import clip.model
import glide_text2im.clip.encoders
import glide_fast.compat.guided_diffusion.unet
import helper_beside
from guided_diffusion import unet
import improved_diffusion.respace as respace

if __name__ == "__main__":
    with bf.BlobFile(bf.join(bf.dirname(sys.argv[0]), "seen.json"), "w") as file:
        json.dump(
            {
                "argv": sys.argv[1:],
                "same": unet is glide_fast.compat.guided_diffusion.unet,
                "nested": glide_text2im.clip.encoders.__name__,
                "spec": unet.__spec__.name,
                "clip": clip.model.CLIP.__module__,
                "steps": sorted(respace.space_timesteps(10, "2")),
                "beside": helper_beside.VALUE,
                "folder": os.getcwd(),
            },
            file,
        )
"""


def write_notebook(path: Path, cells: list[str]) -> Path:
    """An .ipynb file of code cells, with a cell of prose in front."""
    written = [{"cell_type": "markdown", "metadata": {}, "source": ["# Notes\n", "!not run"]}]
    for source in cells:
        lines = source.splitlines(keepends=True)
        written.append({"cell_type": "code", "metadata": {}, "source": lines, "outputs": []})
    path.write_text(json.dumps({"cells": written, "metadata": {}, "nbformat": 4, "nbformat_minor": 2}))
    return path
