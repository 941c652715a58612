"""Scripts as people write them for guided- and improved-diffusion, run unmodified on a few small pictures."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from glide_fast.compat import logger
from glide_fast.compat.guided_diffusion import script_util
from glide_fast.compat.run import run

TEMPLATE = """
import argparse, os
import blobfile as bf
import numpy as np
import torch as th
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel.distributed import DistributedDataParallel as DDP
from torch.optim import AdamW
from PACKAGE import dist_util, logger
from PACKAGE.image_datasets import load_data
from PACKAGE.resample import create_named_schedule_sampler
from PACKAGE.script_util import NUM_CLASSES, add_dict_to_argparser, args_to_dict
from PACKAGE.train_util import TrainLoop, log_loss_dict, parse_resume_step_from_filename
IMPORTS

def main():
    args = create_argparser().parse_args()
    dist_util.setup_dist()
    logger.configure()
    model, diffusion = create(**args_to_dict(args, model_defaults().keys()))
BODY

def create_argparser():
    defaults = DEFAULTS
    defaults.update(model_defaults())
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, defaults)
    return parser

def enlarge(data, size):
    for large, model_kwargs in data:
        model_kwargs["low_res"] = F.interpolate(large, size, mode="area")
        yield large, model_kwargs

def save(sample):
    sample = ((sample + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).contiguous()
    gathered = [th.zeros_like(sample) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, sample)
    if dist.get_rank() == 0:
        array = np.concatenate([each.cpu().numpy() for each in gathered])
        np.savez(os.path.join(logger.get_dir(), "samples.npz"), array)
    dist.barrier()
    logger.log("sampling complete")

if __name__ == "__main__":
    main()
"""
PLAIN = """
from PACKAGE.script_util import model_and_diffusion_defaults as model_defaults
from PACKAGE.script_util import create_model_and_diffusion as create
"""
ENLARGING = """
from PACKAGE.script_util import sr_model_and_diffusion_defaults as model_defaults
from PACKAGE.script_util import sr_create_model_and_diffusion as create
"""
CLASSIFYING = """
from PACKAGE.fp16_util import MixedPrecisionTrainer
from PACKAGE.script_util import classifier_and_diffusion_defaults as model_defaults
from PACKAGE.script_util import create_classifier_and_diffusion as create
"""
GUIDED = PLAIN + "from PACKAGE.script_util import create_classifier, classifier_defaults"
LOAD = """
    model.load_state_dict(dist_util.load_state_dict(args.model_path, map_location="cpu"))
    model.to(dist_util.dev())
    model.eval()
"""
TRAIN = """
    model.to(dist_util.dev())
    sampler = create_named_schedule_sampler(args.schedule_sampler, diffusion)
    size = getattr(args, "large_size", None) or args.image_size
    data = load_data(
        data_dir=args.data_dir, batch_size=args.batch_size, image_size=size, class_cond=args.class_cond
    )
    if hasattr(args, "small_size"):
        data = enlarge(data, args.small_size)
    TrainLoop(
        model=model,
        diffusion=diffusion,
        data=data,
        batch_size=args.batch_size,
        microbatch=args.microbatch,
        lr=args.lr,
        ema_rate=args.ema_rate,
        log_interval=args.log_interval,
        save_interval=args.save_interval,
        resume_checkpoint=args.resume_checkpoint,
        use_fp16=getattr(args, "use_fp16", False),
        schedule_sampler=sampler,
        weight_decay=args.weight_decay,
        lr_anneal_steps=args.lr_anneal_steps,
    ).run_loop()
"""
TRAIN_DEFAULTS = """dict(
    data_dir="", schedule_sampler="loss-second-moment", lr=1e-4, weight_decay=0.0, lr_anneal_steps=0,
    batch_size=1, microbatch=-1, ema_rate="0.9999", log_interval=10, save_interval=10000,
    resume_checkpoint="",
)"""
SAMPLE = """
    model_kwargs = {}
    if args.class_cond:
        classes = th.randint(low=0, high=NUM_CLASSES, size=(args.batch_size,), device=dist_util.dev())
        model_kwargs["y"] = classes
    sample_fn = diffusion.p_sample_loop if not args.use_ddim else diffusion.ddim_sample_loop
    shape = (args.batch_size, 3, args.image_size, args.image_size)
    save(sample_fn(model, shape, clip_denoised=True, model_kwargs=model_kwargs))
"""
LIKELIHOOD = """
    data = load_data(
        data_dir=args.data_dir, batch_size=args.batch_size, image_size=args.image_size,
        class_cond=args.class_cond, deterministic=True,
    )
    batch, model_kwargs = next(data)
    batch = batch.to(dist_util.dev())
    metrics = diffusion.calc_bpd_loop(model, batch, clip_denoised=True, model_kwargs=model_kwargs)
    for name in ("vb", "mse", "xstart_mse"):
        terms = metrics[name].mean(dim=0) / dist.get_world_size()
        dist.all_reduce(terms)
        np.savez(os.path.join(logger.get_dir(), f"{name}_terms.npz"), terms.numpy())
    logger.log(f"done: bpd={metrics['total_bpd'].mean().item()}")
"""
ENLARGE = """
    with bf.BlobFile(args.base_samples, "rb") as file:
        images = np.load(file)["arr_0"]
    low_res = th.from_numpy(images).float().permute(0, 3, 1, 2) / 127.5 - 1.0
    shape = (len(images), 3, args.large_size, args.large_size)
    save(diffusion.p_sample_loop(model, shape, clip_denoised=True, model_kwargs={"low_res": low_res}))
"""
CLASSIFY = """
    model.to(dist_util.dev())
    schedule_sampler = create_named_schedule_sampler("uniform", diffusion)
    dist_util.sync_params(model.parameters())
    mp_trainer = MixedPrecisionTrainer(
        model=model, use_fp16=args.classifier_use_fp16, initial_lg_loss_scale=16.0
    )
    model = DDP(
        model, device_ids=[dist_util.dev()], output_device=dist_util.dev(), broadcast_buffers=False,
        bucket_cap_mb=128, find_unused_parameters=False,
    )
    data = load_data(
        data_dir=args.data_dir, batch_size=2, image_size=args.image_size, class_cond=True, random_crop=True
    )
    opt = AdamW(mp_trainer.master_params, lr=1e-4, weight_decay=0.0)
    for step in range(args.iterations):
        logger.logkv("step", step + parse_resume_step_from_filename(""))
        batch, extra = next(data)
        labels = extra["y"].to(dist_util.dev())
        t, _ = schedule_sampler.sample(batch.shape[0], dist_util.dev())
        batch = diffusion.q_sample(batch.to(dist_util.dev()), t)
        logits = model(batch, timesteps=t)
        loss = F.cross_entropy(logits, labels, reduction="none")
        log_loss_dict(diffusion, t, {"train_loss": loss.detach()})
        mp_trainer.zero_grad()
        mp_trainer.backward(loss.mean())
        mp_trainer.optimize(opt)
        with th.no_grad():
            with model.no_sync():
                model.eval()
                model(batch, timesteps=t)
                model.train()
        logger.dumpkvs()
    if dist.get_rank() == 0:
        state = mp_trainer.master_params_to_state_dict(mp_trainer.master_params)
        th.save(state, os.path.join(logger.get_dir(), f"model{step:06d}.pt"))
    dist.barrier()
"""
GUIDE = """
    classifier = create_classifier(**args_to_dict(args, classifier_defaults().keys()))
    classifier.load_state_dict(dist_util.load_state_dict(args.classifier_path, map_location="cpu"))
    classifier.to(dist_util.dev())
    classifier.eval()

    def cond_fn(x, t, y=None):
        assert y is not None
        with th.enable_grad():
            x_in = x.detach().requires_grad_(True)
            log_probs = F.log_softmax(classifier(x_in, t), dim=-1)
            selected = log_probs[range(len(log_probs)), y.view(-1)]
            return th.autograd.grad(selected.sum(), x_in)[0] * args.classifier_scale

    def model_fn(x, t, y=None):
        return model(x, t, y if args.class_cond else None)

    classes = th.randint(low=0, high=NUM_CLASSES, size=(1,), device=dist_util.dev())
    for sample_fn in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        sample = sample_fn(
            model_fn, (1, 3, args.image_size, args.image_size), clip_denoised=True,
            model_kwargs={"y": classes}, cond_fn=cond_fn, device=dist_util.dev(),
        )
    save(sample)
"""
SCRIPTS = {
    "image_train": (PLAIN, TRAIN, TRAIN_DEFAULTS),
    "image_sample": (PLAIN, LOAD + SAMPLE, "dict(batch_size=2, use_ddim=False, model_path='')"),
    "image_nll": (PLAIN, LOAD + LIKELIHOOD, "dict(data_dir='', batch_size=2, model_path='')"),
    "super_res_train": (ENLARGING, TRAIN, TRAIN_DEFAULTS),
    "super_res_sample": (ENLARGING, LOAD + ENLARGE, "dict(base_samples='', model_path='')"),
    "classifier_train": (CLASSIFYING, CLASSIFY, "dict(data_dir='', iterations=2)"),
    "classifier_sample": (
        GUIDED,
        LOAD + GUIDE,
        "dict(model_path='', classifier_path='', classifier_scale=1.0, **classifier_defaults())",
    ),
}
SHAPES = {
    "guided_diffusion": (
        "--image_size 16 --channel_mult 1,2 --num_channels 32 --num_res_blocks 1 --num_heads 1 "
        "--attention_resolutions 8 --learn_sigma true --class_cond true --use_fp16 false --diffusion_steps 40"
    ),
    "improved_diffusion": (
        "--image_size 32 --num_channels 32 --num_res_blocks 1 --num_heads 1 --attention_resolutions 4 "
        "--learn_sigma true --class_cond true --noise_schedule cosine --diffusion_steps 40"
    ),
}
ENLARGER = (
    "--large_size 64 --small_size 16 --num_channels 32 --num_res_blocks 1 --num_heads 1 "
    "--attention_resolutions 8 --diffusion_steps 40 --timestep_respacing 3"
)
CLASSIFIER = "--image_size 64 --classifier_width 32 --classifier_depth 1 --classifier_attention_resolutions 8"


def script(folder: Path, package: str, name: str) -> Path:
    """The script, written for the package, in a folder."""
    text = TEMPLATE
    for mark, part in zip(("IMPORTS", "BODY", "DEFAULTS"), SCRIPTS[name], strict=True):
        text = text.replace(mark, part)
    path = folder / f"{name}.py"
    path.write_text(text.replace("PACKAGE", package), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of pictures, and a log, process group and thread count of the test's own."""
    (tmp_path / "pictures").mkdir()
    generator = np.random.default_rng(0)
    for index in range(4):
        pixels = generator.integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{'ab'[index % 2]}_{index}.png")
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "log"))
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "log,csv")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logger.reset()
    yield
    torch.set_num_threads(threads)
    logger.reset()
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("package", SHAPES)
def test_train_sample_and_likelihood(package: str, tmp_path: Path) -> None:
    shape, log = SHAPES[package].split(), tmp_path / "log"
    data = ["--data_dir", str(tmp_path / "pictures")]
    train = ["--batch_size", "2", "--microbatch", "1", "--lr_anneal_steps", "2", "--save_interval", "5"]
    run(script(tmp_path, package, "image_train"), [*shape, *data, *train])
    weights = ["--model_path", str(log / "ema_0.9999_000000.pt")]
    assert {path.name for path in log.glob("*.pt")} >= {"model000000.pt", "model000002.pt", "opt000002.pt"}
    assert "saving model000002.pt" in (log / "log.txt").read_text()
    for sampler in ("false", "true"):
        options = [*shape, *weights, "--use_ddim", sampler, "--timestep_respacing", "3"]
        run(script(tmp_path, package, "image_sample"), options)
        size = int(shape[1])
        assert np.load(log / "samples.npz")["arr_0"].shape == (2, size, size, 3)
    run(script(tmp_path, package, "image_nll"), [*shape, *weights, *data, "--timestep_respacing", "3"])
    assert np.isfinite(np.load(log / "vb_terms.npz")["arr_0"]).all()
    assert "done: bpd=" in (log / "log.txt").read_text()


@pytest.mark.parametrize("package", SHAPES)
def test_super_resolution(package: str, tmp_path: Path) -> None:
    log, shape = tmp_path / "log", ENLARGER.split()
    train = ["--data_dir", str(tmp_path / "pictures"), "--batch_size", "1", "--lr_anneal_steps", "1"]
    run(script(tmp_path, package, "super_res_train"), [*shape, *train])
    np.savez(tmp_path / "base.npz", np.zeros((1, 16, 16, 3), dtype=np.uint8))
    options = ["--model_path", str(log / "model000000.pt"), "--base_samples", str(tmp_path / "base.npz")]
    run(script(tmp_path, package, "super_res_sample"), [*shape, *options])
    assert np.load(log / "samples.npz")["arr_0"].shape == (1, 64, 64, 3)


def test_classifier(tmp_path: Path) -> None:
    package, log, classifier = "guided_diffusion", tmp_path / "log", CLASSIFIER.split()
    data = ["--data_dir", str(tmp_path / "pictures")]
    run(script(tmp_path, package, "classifier_train"), [*classifier, *data, "--iterations", "2"])
    rows = (log / "progress.csv").read_text().splitlines()
    assert "train_loss" in rows[0].split(",")
    assert len(rows) == 3
    shape = (
        "--num_channels 32 --num_res_blocks 1 --num_heads 1 --attention_resolutions 8 --diffusion_steps 40"
    )
    guide = ["--classifier_path", str(log / "model000001.pt"), "--timestep_respacing", "2"]
    model = script_model(shape.split())
    torch.save(model.state_dict(), tmp_path / "model.pt")
    options = [*shape.split(), *classifier, *guide, "--model_path", str(tmp_path / "model.pt")]
    run(script(tmp_path, package, "classifier_sample"), options)
    assert np.load(log / "samples.npz")["arr_0"].shape == (1, 64, 64, 3)


def script_model(options: Sequence[str]) -> torch.nn.Module:
    """The network that a script makes of its options."""
    parser = argparse.ArgumentParser()
    script_util.add_dict_to_argparser(parser, script_util.model_and_diffusion_defaults())
    args = vars(parser.parse_args(options))
    return script_util.create_model_and_diffusion(**args)[0]
