"""A timetable changes nothing but the time that a step takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glide_fast.models import UNet, modulation
from tests.models.tiny import noise, prompt, tiny

SCHEDULE = torch.tensor([950, 700, 3])


def made(model: UNet, given: dict[str, Any]) -> modulation.Timetable | None:
    with torch.inference_mode():
        return model.timetable(SCHEDULE, **given)


def evaluate(model: UNet, timesteps: torch.Tensor, given: dict[str, Any], **more: Any) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(noise(2, 3, 8, 8), timesteps, **given, **more)
        return out


def conditions(model: UNet) -> dict[str, Any]:
    if model.config.classes is not None:
        return {"labels": torch.tensor([1, 0])}
    with torch.inference_mode():
        return {"text": model.text(**prompt(2))} if model.config.text is not None else {}


@pytest.mark.parametrize(
    "variant", [{}, {"text": None, "classes": 4}, {"text": None}, {"scale_shift_norm": False}], ids=str
)
def test_steps_of_the_schedule_are_those_without_a_timetable(variant: dict[str, Any]) -> None:
    model = tiny(**variant)
    given = conditions(model)
    table = made(model, given)
    assert table is not None
    for timestep in SCHEDULE.tolist():
        timesteps = torch.full((2,), timestep)
        torch.testing.assert_close(
            evaluate(model, timesteps, given, timetable=table), evaluate(model, timesteps, given)
        )


@pytest.mark.parametrize("timesteps", [torch.tensor([700, 3]), torch.tensor([5, 5])], ids=str)
def test_other_timesteps_are_computed_as_ever(timesteps: torch.Tensor) -> None:
    model = tiny()
    given = conditions(model)
    table = made(model, given)
    assert table is not None
    assert table.at(timesteps) is None
    assert torch.equal(evaluate(model, timesteps, given, timetable=table), evaluate(model, timesteps, given))


def test_the_projections_are_not_computed_again() -> None:
    model = tiny()
    given = conditions(model)
    table = made(model, given)
    expected = evaluate(model, SCHEDULE[1:2], given)
    with torch.no_grad():
        for block in model.residual_blocks():
            block.emb_layers["1"].weight.fill_(float("nan"))
    torch.testing.assert_close(evaluate(model, SCHEDULE[1:2], given, timetable=table), expected)


def test_there_is_none_where_it_is_too_large_or_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    given = conditions(model)
    with monkeypatch.context() as patch:
        patch.setattr(modulation, "MOST_TIMETABLE_BYTES", 1000)
        assert made(model, given) is None
    handle = model.residual_blocks()[0].emb_layers["1"].register_forward_hook(lambda *_: None)
    assert made(model, given) is None
    handle.remove()
    assert made(model, given) is not None
