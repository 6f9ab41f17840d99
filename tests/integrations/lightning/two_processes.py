"""A trainer of two processes: ``two_processes.py PACKAGE STRATEGY FOLDER SCENARIO...``.

It is a script, for processes are forked from one without threads only. Every scenario trains a module anew; each
process writes what it saw to ``FOLDER/SCENARIO-RANK.pt``, the main one what came back to ``FOLDER/SCENARIO-main.pt``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
pl = import_module(sys.argv[1])

from batchnorm.integrations.lightning import RecalibrateCallback  # noqa: E402  # it looks which package is in use

# 51 samples: one process has one sample less, for which the sampler repeats another
X = torch.randn(51, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 2.0, 9.0]) + 4
X = X.double()
BATCHES = [
    X[:8],
    X[8:11],
    X[11:30],
    X[30:40],
    X[40:51],
]  # in turns: 38 of the samples for one process, 13 for the other


def loader(**options: Any) -> DataLoader[Any]:
    dataset: Dataset[Any] = TensorDataset(X)
    return DataLoader(dataset, **{"batch_size": 8, **options})


class Module(pl.LightningModule):  # type: ignore[misc,name-defined]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2))

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self(batch[0]).exp() - batch[0][:, :1]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


class Measuring(RecalibrateCallback):
    """Writes down what each process has before and after; an error too, so that all come to the end."""

    def __init__(self, report: str, **options: Any) -> None:
        super().__init__(**options)
        self.report = report
        self.seen: list[dict[str, Tensor]] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        try:
            super().on_fit_start(trainer, pl_module)
        except Exception as error:
            torch.save({"refused": f"{type(error).__name__}: {error}"}, f"{self.report}-{trainer.global_rank}.pt")
            raise

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        self.seen.append(copied(pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        answer: dict[str, Any] = {"before": copied(pl_module), "validated": self.seen, "error": None}
        try:
            super().on_train_end(trainer, pl_module)
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        else:
            assert self.result is not None
            answer |= {"batches": self.result.batches, "processes": self.result.processes, "text": str(self.result)}
        averages = [c._average_model.module for c in trainer.callbacks if hasattr(c, "_average_model")]
        answer |= {"after": copied(pl_module), "average": copied(averages[0]) if averages else None}
        sampler = trainer.train_dataloader.sampler
        answer |= {"samples": len(list(sampler)), "sampler": type(sampler).__name__}
        torch.save(answer, f"{self.report}-{trainer.global_rank}.pt")


def call(module: Any, batch: Any) -> Any:
    return module(batch if isinstance(batch, Tensor) else batch[0])


def failing(module: Any, batch: Any) -> Any:
    if module.global_rank == 1:
        raise ValueError("one process has no memory left")
    return module(batch[0])


def fit(
    strategy: Any, report: str, *, train: Any = None, val: Any = None, before: tuple[Any, ...] = (), **options: Any
) -> None:
    module = Module().double()
    trainer = pl.Trainer(
        strategy=strategy, accelerator="cpu", devices=2, max_epochs=2, default_root_dir=Path(report).parent,
        logger=False, num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[*before, Measuring(report, **{"forward": call, **options})],
    )  # fmt: skip
    trainer.fit(module, loader(shuffle=True) if train is None else train, val)
    torch.save(copied(module), f"{report}-main.pt")


def refused(strategy: Any, report: str, **options: Any) -> None:
    try:
        fit(strategy, report, **options)
    except Exception as error:
        torch.save({"refused": str(error)}, f"{report}-main.pt")


def apart() -> Any:
    return pl.strategies.DDPStrategy(start_method="fork", broadcast_buffers=False)


SCENARIOS: dict[str, Callable[[str, str], None]] = {
    "whole": lambda s, r: fit(s, r, val=loader(), before_validation=True, save=f"{r}.ckpt"),
    "averaged": lambda s, r: fit(s, r, before=(pl.callbacks.EMAWeightAveraging(decay=0.8),), save=f"{r}.ckpt"),
    "failing": lambda s, r: fit(s, r, forward=failing),
    "one norm": lambda s, r: fit(s, r, names="net.4"),
    "apart": lambda s, r: fit(apart(), r),
    "one norm apart": lambda s, r: refused(apart(), r, names="net.4"),
    "part of the data": lambda s, r: fit(s, r, train=loader(batch_size=5, sampler=range(0, 51, 3))),
    "few batches": lambda s, r: fit(s, r, num_batches=2),
    "a list": lambda s, r: fit(s, r, dataloader=BATCHES),
    "a loader": lambda s, r: fit(s, r, dataloader=loader(batch_size=5, shuffle=True)),
}

if __name__ == "__main__":
    _, _, strategy, folder, *names = sys.argv
    for name in names:
        SCENARIOS[name](strategy, f"{folder}/{name}")
