from __future__ import annotations

import torch

from batchnorm.travel.maps import Map


def test_the_inverse_leads_back():
    scale, shift = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    map_ = Map.per_channel(scale, shift, 4)
    for both in (map_.then(map_.inverse()), map_.inverse().then(map_)):
        torch.testing.assert_close(both.scale, torch.ones(1, 5, 1, 1, dtype=torch.float64))
        torch.testing.assert_close(both.shift, torch.zeros(1, 5, 1, 1, dtype=torch.float64))
