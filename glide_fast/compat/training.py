"""The training loop that guided- and improved-diffusion share, its checkpoints and its log.

A run directory (the logger's) gets the model, its averages and the optimiser: ``model000010.pt``,
``ema_0.9999_000010.pt``, ``opt000010.pt``, each whole or not there. A run goes on from the model's file, with
its neighbours.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from glide_fast.compat import distributed, logger
from glide_fast.compat.diffusion import GaussianDiffusion
from glide_fast.compat.half import INITIAL_LOG_LOSS_SCALE, MixedPrecisionTrainer
from glide_fast.compat.layers import update_ema
from glide_fast.compat.timestep_samplers import LossAwareSampler, ScheduleSampler, UniformSampler
from glide_fast.files import replacing

__all__ = [
    "INITIAL_LOG_LOSS_SCALE",
    "TrainLoop",
    "find_ema_checkpoint",
    "find_resume_checkpoint",
    "get_blob_logdir",
    "log_loss_dict",
    "parse_resume_step_from_filename",
]

Batches = Iterator[tuple[Tensor, dict[str, Tensor]]]


class TrainLoop:
    """Trains ``model`` on ``data`` for ever, or for ``lr_anneal_steps`` steps with a rate that falls to zero.

    ``microbatch`` pictures go through the model at a time (-1: all); their gradients add up. ``ema_rate`` is
    one rate or several, separated by commas. ``resume_checkpoint`` is a model's file to go on from.
    """

    anneals_first: ClassVar[bool] = False
    trainer: ClassVar[type[MixedPrecisionTrainer]] = MixedPrecisionTrainer

    def __init__(
        self,
        *,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        data: Batches,
        batch_size: int,
        microbatch: int,
        lr: float,
        ema_rate: float | str,
        log_interval: int,
        save_interval: int,
        resume_checkpoint: str | os.PathLike[str],
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        schedule_sampler: ScheduleSampler | None = None,
        weight_decay: float = 0.0,
        lr_anneal_steps: int = 0,
    ) -> None:
        self.model = model
        self.diffusion = diffusion
        self.data = data
        self.batch_size = batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr = lr
        self.ema_rate = (
            [float(rate) for rate in ema_rate.split(",")] if isinstance(ema_rate, str) else [ema_rate]
        )
        self.log_interval = log_interval
        self.save_interval = save_interval
        self.resume_checkpoint = resume_checkpoint
        self.use_fp16 = use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.weight_decay = weight_decay
        self.lr_anneal_steps = lr_anneal_steps
        self.step = 0
        self.resume_step = 0
        self.global_batch = batch_size * distributed.world_size()
        self.sync_cuda = torch.cuda.is_available()
        self._load_and_sync_parameters()
        self.mp_trainer = self.trainer(model=model, use_fp16=use_fp16, fp16_scale_growth=fp16_scale_growth)
        self.opt = torch.optim.AdamW(self.mp_trainer.master_params, lr=lr, weight_decay=weight_decay)
        if self.resume_step:
            self._load_optimizer_state()
            self.ema_params = [self._load_ema_parameters(rate) for rate in self.ema_rate]
        else:
            self.ema_params = [self._copy_of_master_params() for _ in self.ema_rate]
        self.use_ddp = distributed.world_size() > 1
        self.ddp_model: nn.Module = self._replicated(model) if self.use_ddp else model

    def run_loop(self) -> None:
        """Train until the rate is annealed, for ever without annealing; saves at intervals and at the end."""
        while not self.lr_anneal_steps or self.step + self.resume_step < self.lr_anneal_steps:
            batch, cond = next(self.data)
            self.run_step(batch, cond)
            if self.step % self.log_interval == 0:
                logger.dumpkvs()
            if self.step % self.save_interval == 0:
                self.save()
                if os.environ.get("DIFFUSION_TRAINING_TEST") and self.step > 0:
                    return
            self.step += 1
        if (self.step - 1) % self.save_interval != 0:
            self.save()

    def run_step(self, batch: Tensor, cond: Mapping[str, Tensor]) -> None:
        """One step on pictures [B, C, H, W] and their conditions."""
        self.forward_backward(batch, cond)
        if self.anneals_first:
            self._anneal_lr()
        if self.mp_trainer.optimize(self.opt):
            self._update_ema()
        if not self.anneals_first:
            self._anneal_lr()
        self.log_step()

    def forward_backward(self, batch: Tensor, cond: Mapping[str, Tensor]) -> None:
        """Add up the gradients of a batch, microbatch by microbatch."""
        self.mp_trainer.zero_grad()
        device = next(self.model.parameters()).device
        for start in range(0, batch.shape[0], self.microbatch):
            rows = slice(start, start + self.microbatch)
            micro = batch[rows].to(device)
            micro_cond = {name: values[rows].to(device) for name, values in cond.items()}
            last = start + self.microbatch >= batch.shape[0]
            t, weights = self.schedule_sampler.sample(micro.shape[0], device)
            compute_losses = functools.partial(
                self.diffusion.training_losses, self.ddp_model, micro, t, model_kwargs=micro_cond
            )
            no_sync: Callable[[], Any] | None = getattr(self.ddp_model, "no_sync", None)
            with nullcontext() if last or no_sync is None else no_sync():
                losses = compute_losses()
                if isinstance(self.schedule_sampler, LossAwareSampler):
                    self.schedule_sampler.update_with_local_losses(t, losses["loss"].detach())
                log_loss_dict(self.diffusion, t, {name: part * weights for name, part in losses.items()})
                self.mp_trainer.backward((losses["loss"] * weights).mean())

    def log_step(self) -> None:
        """Log how far the run is."""
        done = self.step + self.resume_step
        logger.logkv("step", done)
        logger.logkv("samples", (done + 1) * self.global_batch)

    def save(self) -> None:
        """Write the model, its averages and the optimiser; the first process does."""
        step = self.step + self.resume_step
        if distributed.rank() == 0:
            files: dict[str, Sequence[Tensor]] = {f"model{step:06d}.pt": self.mp_trainer.master_params}
            for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
                files[f"ema_{rate}_{step:06d}.pt"] = params
            for name, values in files.items():
                logger.log(f"saving {name}...")
                _save(self.mp_trainer.master_params_to_state_dict(values), name)
            _save(self.opt.state_dict(), f"opt{step:06d}.pt")
        if distributed.world_size() > 1:
            dist.barrier()

    def _anneal_lr(self) -> None:
        if not self.lr_anneal_steps:
            return
        done = (self.step + self.resume_step) / self.lr_anneal_steps
        for group in self.opt.param_groups:
            group["lr"] = self.lr * (1 - done)

    def _update_ema(self) -> None:
        for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
            update_ema(params, self.mp_trainer.master_params, rate=rate)

    def _copy_of_master_params(self) -> list[Tensor]:
        return [copy.deepcopy(parameter.detach()) for parameter in self.mp_trainer.master_params]

    def _load_and_sync_parameters(self) -> None:
        checkpoint = find_resume_checkpoint() or self.resume_checkpoint
        if checkpoint:
            self.resume_step = parse_resume_step_from_filename(str(checkpoint))
            logger.log(f"loading model from checkpoint: {checkpoint}...")
            state = distributed.load_state_dict(checkpoint, map_location=distributed.dev())
            self.model.load_state_dict(state)
        distributed.sync_params(self.model.parameters())

    def _load_ema_parameters(self, rate: float) -> list[Tensor]:
        params = self._copy_of_master_params()
        checkpoint = find_ema_checkpoint(
            find_resume_checkpoint() or self.resume_checkpoint, self.resume_step, rate
        )
        if checkpoint:
            logger.log(f"loading EMA from checkpoint: {checkpoint}...")
            state = distributed.load_state_dict(checkpoint, map_location=distributed.dev())
            params = [each.detach() for each in self.mp_trainer.state_dict_to_master_params(state)]
        distributed.sync_params(params)
        return params

    def _load_optimizer_state(self) -> None:
        main = Path(find_resume_checkpoint() or self.resume_checkpoint)
        checkpoint = main.parent / f"opt{self.resume_step:06d}.pt"
        if checkpoint.exists():
            logger.log(f"loading optimizer state from checkpoint: {checkpoint}")
            state = distributed.load_state_dict(checkpoint, map_location=distributed.dev())
            self.opt.load_state_dict(state)

    def _replicated(self, model: nn.Module) -> nn.Module:
        devices = [distributed.dev()] if torch.cuda.is_available() else None
        return DistributedDataParallel(model, device_ids=devices)


def parse_resume_step_from_filename(filename: str) -> int:
    """The step in a name like path/to/model000010.pt; 0 where there is none."""
    _, found, rest = filename.rpartition("model")
    digits = rest.partition(".")[0]
    return int(digits) if found and digits.isdecimal() else 0


def get_blob_logdir() -> str | None:
    """The folder of checkpoints: $DIFFUSION_BLOB_LOGDIR, else the logger's."""
    return os.environ.get("DIFFUSION_BLOB_LOGDIR") or logger.get_dir()


def find_resume_checkpoint() -> str | None:
    """Where a run finds the checkpoint of one that was cut off: nowhere, until a caller replaces this."""
    return None


def find_ema_checkpoint(main_checkpoint: str | os.PathLike[str] | None, step: int, rate: float) -> str | None:
    """The average beside a model's checkpoint, if it exists."""
    if not main_checkpoint:
        return None
    path = Path(main_checkpoint).parent / f"ema_{rate}_{step:06d}.pt"
    return str(path) if path.exists() else None


def log_loss_dict(diffusion: GaussianDiffusion, ts: Tensor, losses: Mapping[str, Tensor]) -> None:
    """Log the mean of each loss [B], and its mean in each quarter of the steps."""
    for name, values in losses.items():
        logger.logkv_mean(name, values.mean().item())
        for step, value in zip(ts.tolist(), values.tolist(), strict=True):
            logger.logkv_mean(f"{name}_q{int(4 * step / diffusion.num_timesteps)}", value)


def _save(state: Any, name: str) -> None:
    with replacing(Path(get_blob_logdir() or ".") / name) as temporary:
        torch.save(state, temporary)
