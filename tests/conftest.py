"""One thread for torch: tensors in tests are small, and tests may run side by side."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
