"""A training step, ours and others': the hybrid loss of Improved DDPM, its gradients, AdamW."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

import glide_fast
from bench.networks import noise, seeded
from bench.peers.plain import Positional, plain_unet
from bench.peers.runtimes import Unavailable
from bench.place import CPU, Place
from bench.subject import Outputs
from glide_fast.diffusion import GaussianDiffusion, Schedule
from glide_fast.diffusion.losses import hybrid_loss
from glide_fast.models import UNet, UNetConfig
from glide_fast.models.presets import preset

LEARNING_RATE = 1e-4
OUTER = "network."  # what Positional puts before its network's names


def small_adm(*, quick: bool) -> UNetConfig:
    """ADM's 64 px model at 64 channels, without dropout, whose draws would differ; smaller when quick."""
    config = replace(preset("guided-64x64-diffusion").unet, channels=64, head_channels=64, dropout=0.0)
    return replace(config, image_size=16, res_blocks=1, head_channels=32) if quick else config


@dataclass(frozen=True, kw_only=True)
class Example:
    """What one step learns from: pictures [B, 3, H, W], noise, steps of the schedule [B], labels [B]."""

    pictures: Tensor
    noise: Tensor
    steps: Tensor
    labels: Tensor

    @classmethod
    def of(cls, config: UNetConfig, batch: int) -> Example:
        """Random ones from a seed."""
        shape = (batch, config.image_channels, config.image_size, config.image_size)
        return cls(
            pictures=noise(*shape).clamp(-1, 1),
            noise=noise(*shape, seed=1),
            steps=torch.linspace(20, 980, batch).long(),
            labels=torch.arange(batch),
        )

    def at(self, place: Place) -> Example:
        """The same where it is measured, in float32."""
        return Example(**{each.name: getattr(self, each.name).to(place.device) for each in fields(self)})

    def double(self) -> Example:
        """The same in float64."""
        return replace(self, pictures=self.pictures.double(), noise=self.noise.double())


class Learner:
    """A network with parameters of its own, and the step that changes them."""

    def __init__(self, network: nn.Module, answer: Callable[..., Tensor]) -> None:
        self.parameters = list(network.parameters())
        self.names = [name for name, _ in network.named_parameters()]
        self.answer = answer
        self.diffusion = GaussianDiffusion(schedule=Schedule.create("cosine", 1000, ""))
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE)

    def loss(self, example: Example) -> Tensor:
        """The mean of the pictures' losses."""
        x = self.diffusion.q_sample(example.pictures, example.steps, example.noise)
        output = self.answer(x, self.diffusion.model_timesteps(example.steps), example.labels)
        terms = hybrid_loss(self.diffusion, output, example.pictures, x, example.steps, example.noise)
        return terms.loss.mean()

    def gradients(self, example: Example) -> Outputs:
        """The loss, then the gradient of each parameter in the order of their names."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(example)
        loss.backward()  # type: ignore[no-untyped-call]
        found = {
            name.removeprefix(OUTER): each.grad
            for name, each in zip(self.names, self.parameters, strict=True)
            if each.grad is not None
        }
        return loss.detach(), *(found[name].clone() for name in sorted(found))

    def step(self, example: Example) -> None:
        """One step of training."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(example).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def network(config: UNetConfig) -> UNet:
    """The U-Net with random weights, to be trained."""
    made = seeded(lambda: UNet(config))
    if not isinstance(made, UNet):
        raise TypeError(f"a U-Net was built, and became a {type(made).__name__}")
    return made.requires_grad_(True).train()


def our_learner(start: UNet, place: Place = CPU) -> Learner:
    """Our network, accelerated as a user would."""
    mine = glide_fast.accelerate(copy.deepcopy(start).to(place.device))
    mine.compute_dtype = place.training_dtype
    return Learner(mine, lambda x, t, labels: mine(x, t, labels=labels))


def plain_learner(
    start: UNet,
    *,
    dtype: torch.dtype = torch.float32,
    recompute_attention: bool = True,
    place: Place = CPU,
) -> Learner:
    """The original computation, whose attention computes its activations again in the backward pass."""
    twin = _twin(start, recompute_attention=recompute_attention).to(place.device, dtype)
    return Learner(twin, twin if dtype is torch.float64 else _mixed(twin, place))


def compiled_learner(start: UNet, place: Place = CPU) -> Learner:
    """torch.compile of the original computation; what to compute again is left to the compiler."""
    twin = _twin(start, recompute_attention=False).to(place.device)
    return Learner(twin, _mixed(torch.compile(twin), place))


def _mixed(answer: Callable[..., Tensor], place: Place) -> Callable[..., Tensor]:
    """The original on a GPU: float32 weights, products in half precision by autocast."""
    if not place.gpu:
        return answer

    def call(*inputs: Tensor) -> Tensor:
        with torch.autocast(place.device, place.training_dtype):
            return answer(*inputs).float()

    return call


def _twin(start: UNet, *, recompute_attention: bool) -> nn.Module:
    twin = copy.deepcopy(plain_unet(start, recompute_attention=recompute_attention))
    return Positional(twin, ("x", "timesteps", "labels")).requires_grad_(True).train()


def learner(peer: str, start: UNet, place: Place = CPU) -> Learner:
    """The peer's.

    Raises:
        Unavailable: the peer does not train.
    """
    if peer == "upstream":
        return plain_learner(start, place=place)
    if peer == "compile":
        return compiled_learner(start, place)
    raise Unavailable("it runs inference alone and trains nothing")


def saved_bytes(learner: Learner, example: Example) -> int:
    """Bytes that the forward pass keeps for the backward pass, besides the parameters, each memory once."""
    known = {each.untyped_storage().data_ptr() for each in learner.parameters}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = learner.loss(example)
    total = sum(kept.values())
    del loss
    return total
