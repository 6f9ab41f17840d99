"""The distance of two means and variances, by hand."""

from __future__ import annotations

import torch

from batchnorm.diagnosis.distance import squared_distance


def test_distance_is_symmetric_and_infinite_where_something_is_broken() -> None:
    a, b = (torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])), (torch.tensor([1.0, 1.0]), torch.tensor([4.0, 2.0]))
    assert torch.equal(squared_distance(*a, *b, 0.0), squared_distance(*b, *a, 0.0))
    # (0 − 1)²/2.5 + (½ log ¼)²
    expected = 1 / 2.5 + (0.5 * torch.tensor(0.25).log()) ** 2
    torch.testing.assert_close(squared_distance(*a, *b, 0.0)[0], expected)
    assert squared_distance(*a, *b, 0.0)[1] == 0
    for broken in (torch.nan, torch.inf, -1.0):
        variance = torch.tensor([1.0, broken])
        assert torch.isinf(squared_distance(a[0], variance, *b, 1e-5)[1])
