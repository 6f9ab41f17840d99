"""Three ways in which pictures come to differ; each the same every time, and none changes what it is given."""

from __future__ import annotations

import torch

from batchnorm.demo.corruptions import CORRUPTIONS

NOISE, INVERSION, ROTATION = CORRUPTIONS.values()


def test_inversion_and_rotation() -> None:
    image = torch.tensor([[[0.0, 0.25], [0.5, 1.0]]])
    assert INVERSION(image).tolist() == [[[1.0, 0.75], [0.5, 0.0]]]
    assert ROTATION(image).tolist() == [[[0.25, 1.0], [0.0, 0.5]]]
    assert torch.equal(ROTATION(ROTATION(ROTATION(ROTATION(image)))), image)


def test_noise_has_its_deviation_within_the_range_and_is_drawn_alike() -> None:
    gray = torch.full((100, 28, 28), 0.5)
    noisy = NOISE(gray)
    inside = (noisy > 0) & (noisy < 1)
    assert noisy.min() == 0
    assert noisy.max() == 1
    # within ±0.5 lie ±1.67 of 0.3: of a normal distribution 90.4 %, and there its deviation is 0.79 of the whole one
    assert abs(float(inside.float().mean()) - 0.904) < 0.005
    assert torch.equal(NOISE(gray), noisy)
    assert torch.equal(gray, torch.full((100, 28, 28), 0.5))


def test_the_random_numbers_of_the_caller_are_as_before() -> None:
    state = torch.get_rng_state()
    NOISE(torch.zeros(4, 4))
    assert torch.equal(torch.get_rng_state(), state)
