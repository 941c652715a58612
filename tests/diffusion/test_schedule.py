"""Schedules, respacing and tables against the original's numbers, and their errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glide_fast.diffusion.schedule import (
    BETA_RAMPS,
    Schedule,
    beta_ramp,
    betas_for_alpha_bar,
    named_betas,
    space_timesteps,
)
from tests.golden import data, entry

NAMED = [key.split(".") for key in entry("schedules")["arrays"] if key.startswith(("linear.", "cosine."))]
TABLES = [key.split(".") for key in entry("tables")["arrays"]]


@pytest.mark.parametrize(("name", "steps"), NAMED)
def test_named_betas(name: str, steps: str) -> None:
    np.testing.assert_allclose(
        named_betas(name, int(steps)), data("schedules")[f"{name}.{steps}"], rtol=1e-15, atol=0
    )


def test_cosine_has_its_published_alias() -> None:
    np.testing.assert_array_equal(named_betas("squaredcos_cap_v2", 50), named_betas("cosine", 50))


@pytest.mark.parametrize("name", BETA_RAMPS)
def test_beta_ramp(name: str) -> None:
    expected = data("schedules")[f"get_beta_schedule.{name}"]
    np.testing.assert_allclose(beta_ramp(name, 100), expected, rtol=1e-15, atol=0)


def test_betas_for_alpha_bar() -> None:
    betas = betas_for_alpha_bar(30, lambda time: math.exp(-5 * time * time), max_beta=0.5)
    np.testing.assert_allclose(betas, data("schedules")["betas_for_alpha_bar"], rtol=1e-15, atol=0)


@pytest.mark.parametrize(("name", "steps", "respacing", "table"), TABLES)
def test_tables(name: str, steps: str, respacing: str, table: str) -> None:
    schedule = Schedule.create(name, int(steps), "" if respacing == "all" else respacing)
    expected = data("tables")[f"{name}.{steps}.{respacing}.{table}"]
    np.testing.assert_allclose(getattr(schedule, table), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("index", range(entry("space_timesteps")["count"]))
def test_space_timesteps(index: int) -> None:
    case = data("space_timesteps")[index]
    expected = case.get("all", case.get("glide_text2im"))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=r"respacing|stride"):
            space_timesteps(case["num_timesteps"], case["section_counts"])
    else:
        assert space_timesteps(case["num_timesteps"], case["section_counts"]) == expected


@settings(deadline=None)
@given(steps=st.integers(1, 500), share=st.floats(0, 1))
def test_one_section_spans_the_schedule(steps: int, share: float) -> None:
    count = max(1, round(share * steps))
    chosen = space_timesteps(steps, str(count))
    assert len(chosen) == count
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0
    assert chosen[-1] == (steps - 1 if count > 1 else 0)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_respacing_to_every_step_is_no_respacing(name: str) -> None:
    plain, respaced = Schedule.create(name, 1000), Schedule.create(name, 1000, "1000")
    np.testing.assert_array_equal(plain.betas, respaced.betas)
    np.testing.assert_array_equal(plain.timestep_map, np.arange(1000))
    np.testing.assert_allclose(plain.betas, named_betas(name, 1000), rtol=1e-11)


def test_lookup_rounds_to_float32_and_broadcasts() -> None:
    schedule = Schedule.create("cosine", 100)
    t = torch.tensor([3, 99, 0])
    values = schedule.at("sqrt_alphas_cumprod", t, torch.zeros(3, 3, 2, 2))
    assert values.shape == (3, 1, 1, 1)
    np.testing.assert_array_equal(
        values.flatten(), schedule.sqrt_alphas_cumprod[t.numpy()].astype(np.float32)
    )


def test_lookup_under_inference_mode_leaves_training_usable() -> None:
    schedule = Schedule.create("cosine", 10)
    t, x = torch.tensor([3]), torch.ones(1, 3, 2, 2, requires_grad=True)
    with torch.inference_mode():
        schedule.at("posterior_variance", t, x)
    (gradient,) = torch.autograd.grad((schedule.at("posterior_variance", t, x) * x).sum(), x)
    assert (gradient > 0).all()


@pytest.mark.parametrize(
    ("name", "steps", "respacing", "message"),
    [
        ("cosin", 1000, "", r"unknown noise schedule 'cosin'; known: linear, cosine"),
        ("cosine", 0, "", r"steps 0 must be at least 1"),
        ("cosine", 1000, "1", r"at least 2 steps"),
        ("linear", 10, "", r"must lie in \(0, 1\]; use at least 20 steps"),
        ("cosine", 1000, "1001", r"wants 1001 timesteps .* use at most 1000"),
        ("cosine", 1000, "ten", r"'ten' is not understood; use '100'"),
        ("cosine", 1000, "-5", r"chooses no timestep"),
        ("cosine", 1000, [0, 0], r"chooses no timestep"),
        ("cosine", 1000, "ddim999", r"no stride gives 999 of 1000"),
    ],
)
def test_errors_name_value_rule_and_fix(name: str, steps: int, respacing: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.create(name, steps, respacing)


def test_unknown_ramp_lists_the_known() -> None:
    with pytest.raises(ValueError, match="unknown beta ramp 'cube'; known: quad"):
        beta_ramp("cube", 10)


def test_map_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="must be as long as betas"):
        Schedule(betas=np.full(3, 0.1), timestep_map=np.arange(2), original_steps=3)
