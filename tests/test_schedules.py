"""The shape of each schedule at its edges; what they do in training is in test_formula."""

import jax
import numpy as np
import pytest

from gnp_optax import schedules


def values(schedule, steps):
    return [float(schedule(step)) for step in range(steps)]


@pytest.mark.parametrize("warmup", [schedules.r_warmup, schedules.lambda_warmup])
def test_linear_warmup(warmup):
    np.testing.assert_allclose(values(warmup(0.4, 4), 6), [0, 0.1, 0.2, 0.3, 0.4, 0.4], rtol=1e-6)


@pytest.mark.parametrize(
    "warmup", [schedules.r_warmup, schedules.lambda_warmup, schedules.zero_warmup]
)
def test_no_warmup_is_constant(warmup):
    assert values(warmup(0.5, 0), 3) == [0.5, 0.5, 0.5]


def test_a_delayed_schedule_begins_after_the_warmup():
    found = values(schedules.delayed(schedules.r_warmup(0.4, 4), 3), 9)
    np.testing.assert_allclose(found, [0, 0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0.4], rtol=1e-6)
    constant = schedules.delayed(lambda step: 0.5, 2)
    assert values(constant, 4) == values(schedules.zero_warmup(0.5, 2), 4)
    assert values(schedules.delayed(schedules.every(2, 0.5), 0), 3) == [0.5, 0, 0.5]


def test_every_of_a_schedule_reads_it_at_the_same_step():
    schedule = schedules.every(2, schedules.lambda_warmup(1.0, 4))
    np.testing.assert_allclose(values(schedule, 7), [0, 0, 0.5, 0, 1, 0, 1])


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.r_warmup(0.4, 4),
        schedules.lambda_warmup(0.4, 4),
        schedules.zero_warmup(0.4, 4),
        schedules.every(3, 0.4),
        schedules.delayed(schedules.r_warmup(0.4, 2), 3),
    ],
)
def test_traced_and_concrete_steps_agree(schedule):
    traced = jax.vmap(schedule)(np.arange(8))
    np.testing.assert_allclose(traced, values(schedule, 8), rtol=1e-6)
