"""A diagnosis as text, as data and as a page."""

from __future__ import annotations

import json

import torch
from tests.diagnosis.metrics import spread_out

import batchnorm


def test_the_result_prints_and_turns_into_data_and_a_page(net, batches, tmp_path) -> None:
    net.bn2.running_mean[0] = torch.nan
    result = batchnorm.diagnose(net, batches, spread_out)
    text = str(result)
    assert "bn2" in text
    assert "poisoned" in text
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["findings"][0]["cause"] == "poisoned"
    assert data["layers"][1]["mean_shift"][0] is None
    page = result.to_html(tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") >= 2 * len(result.layers)
    assert "bn2: poisoned" in repr(result)
