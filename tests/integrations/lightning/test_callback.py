"""The callback in trainers of the real package, under both of its names. Skipped where Lightning is not installed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from batchnorm.errors import ArgumentTypeError, BatchError, ShapeError, StateError, UnknownNameError
from batchnorm.nn import freeze
from batchnorm.statistics import recalibrate

SKIP = "Lightning is not installed (pip install lightning)"
warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
PACKAGES = ("lightning.pytorch", "pytorch_lightning")


# under the other name the same code runs; two processes run it in test_processes.py
@pytest.fixture(params=[PACKAGES[0], pytest.param(PACKAGES[1], marks=pytest.mark.sweep)])
def pl(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param, reason=SKIP)


@pytest.fixture
def callback() -> Any:
    pytest.importorskip("lightning.pytorch", reason=SKIP)
    return import_module("batchnorm.integrations.lightning").RecalibrateCallback


X = torch.randn(50, 3, generator=torch.Generator().manual_seed(1)) * 2 + 4
Y = X.sum(1, keepdim=True)


def loader(batch_size: int = 16, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=batch_size, **options)


def module_of(pl: Any, **overrides: Any) -> Any:
    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
            self.bn = nn.BatchNorm1d(1)
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Any:
            return self.bn(self.net(x))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return nn.functional.mse_loss(self(x), y)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.seen.append(self.net[1].running_var.clone())
            assert not self.training

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    for name, value in overrides.items():
        setattr(Module, name, value)
    return Module()


def fit(
    pl: Any, module: Any, callbacks: list[Any], folder: Path, train: Any = None, val: Any = None, **more: Any
) -> Any:
    options = {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, "logger": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(callbacks=callbacks, default_root_dir=folder, **options | more)
    trainer.fit(module, loader() if train is None else train, val)
    return trainer


def exact(module: Any, x: Tensor = X) -> Tensor:
    """The variance that the first norm meets."""
    with torch.no_grad():
        return module.net[0](x).double().var(0).float()


def assert_exact(module: Any, x: Tensor = X) -> None:
    torch.testing.assert_close(module.net[1].running_var, exact(module, x), rtol=1e-5, atol=1e-6)


def test_the_statistics_are_exact_when_training_ends(pl: Any, callback: Any, tmp_path: Path) -> None:
    module, measuring = module_of(pl), callback()
    fit(pl, module, [measuring], tmp_path)
    assert_exact(module)
    assert measuring.result.batches == 4
    assert [layer.name for layer in measuring.result.layers] == ["net.1", "bn"]
    expected = module_of(pl)
    expected.load_state_dict(module.state_dict())
    recalibrate(expected, loader())
    assert torch.equal(expected.bn.running_var, module.bn.running_var)
    assert module.training
    measuring.result.undo()
    assert not torch.allclose(module.net[1].running_var, exact(module), rtol=1e-3)


def test_the_checkpoint_it_saves_holds_them(pl: Any, callback: Any, tmp_path: Path) -> None:
    module = module_of(pl)
    fit(pl, module, [callback(save=tmp_path / "last.ckpt")], tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["net.1.running_var"], module.net[1].running_var)
    assert_exact(module)


def test_validation_sees_statistics_of_that_moment(pl: Any, callback: Any, tmp_path: Path) -> None:
    first: list[Tensor] = []

    def remember(self: Any) -> None:
        first.append(exact(self))

    module = module_of(pl, on_validation_epoch_end=remember)
    keeping = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
    callbacks = [keeping, callback(before_validation=True)]
    fit(pl, module, callbacks, tmp_path, val=loader(50), enable_checkpointing=True, num_sanity_val_steps=1)
    # one batch of the sanity check, in which nothing is measured, then one an epoch
    assert len(module.seen) == 3
    assert torch.equal(module.seen[0], torch.ones(4))
    for seen, wanted in zip(module.seen[1:], first[1:], strict=True):
        torch.testing.assert_close(seen, wanted, rtol=1e-5, atol=1e-6)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["net.1.running_var"], module.seen[2])


def test_frozen_norms_keep_theirs_before_validation_too(pl: Any, callback: Any, tmp_path: Path) -> None:
    left: list[set[str]] = []

    class Reading(pl.Callback):  # type: ignore[misc]
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            left.append({each.name for each in measuring.result.left})

    def keep_in_eval_mode(self: Any, *args: Any) -> None:
        self.bn.eval()

    module, measuring = module_of(pl, on_train_batch_start=keep_in_eval_mode), callback(before_validation=True)
    freeze(module, "net.1")
    with pytest.raises(StateError, match=r"none of the norms .*bn: frozen by hand"):
        fit(pl, module, [measuring], tmp_path, val=loader())
    module = module_of(pl, on_train_batch_start=keep_in_eval_mode)
    fit(pl, module, [measuring, Reading()], tmp_path, val=loader())
    assert left == [{"bn"}, {"bn"}]
    assert torch.equal(module.bn.running_var, torch.ones(1))
    assert not module.bn.training


def ema(pl: Any, **options: Any) -> Any:
    if not hasattr(pl.callbacks, "EMAWeightAveraging"):
        pytest.skip("this version of Lightning has no EMAWeightAveraging")
    return pl.callbacks.EMAWeightAveraging(decay=0.8, **options)


@pytest.mark.parametrize("use_buffers", [True, False])
def test_behind_an_average_it_measures_the_averaged_weights(
    pl: Any, callback: Any, tmp_path: Path, use_buffers: bool
) -> None:
    module, plain = module_of(pl), module_of(pl)
    average = ema(pl, use_buffers=use_buffers)
    trainer = fit(
        pl, module, [average, callback(before_validation=True, save=tmp_path / "ema.ckpt")], tmp_path, val=loader()
    )
    fit(pl, plain, [], tmp_path)
    assert not torch.allclose(module.net[0].weight, plain.net[0].weight)
    assert_exact(module)
    # the checkpoint comes from the copy that the other callback holds, as do later validation runs
    saved = torch.load(tmp_path / "ema.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["net.1.running_var"], module.net[1].running_var)
    assert torch.equal(saved["net.0.weight"], module.net[0].weight)
    module.seen.clear()
    trainer.validate(module, loader(), verbose=False)
    assert torch.equal(module.seen[0], module.net[1].running_var)
    assert_exact(module)


def test_what_is_validated_is_the_average_and_training_goes_on_with_its_own(
    pl: Any, callback: Any, tmp_path: Path
) -> None:
    def compare(self: Any) -> None:
        torch.testing.assert_close(self.net[1].running_var, exact(self), rtol=1e-5, atol=1e-6)

    module, plain = module_of(pl, on_validation_epoch_start=compare), module_of(pl)
    fit(pl, module, [ema(pl), callback(before_validation=True)], tmp_path, val=loader())
    trained: list[Tensor] = []
    current = module_of(pl, on_train_epoch_end=lambda self: trained.append(self.net[1].running_var.clone()))
    fit(pl, current, [ema(pl), callback(before_validation=True)], tmp_path, val=loader())
    fit(pl, plain, [], tmp_path)
    assert torch.equal(trained[-1], plain.net[1].running_var)


def test_behind_lightnings_own_swa(pl: Any, callback: Any, tmp_path: Path) -> None:
    module = module_of(pl)
    fit(pl, module, [pl.callbacks.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1), callback()], tmp_path)
    assert_exact(module)
    assert module.net[1].momentum == 0.1


def test_an_average_of_other_weights_is_left_alone(pl: Any, callback: Any, tmp_path: Path) -> None:
    class Beside(pl.Callback):  # type: ignore[misc]
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self.average = torch.optim.swa_utils.AveragedModel(pl_module)

    beside = Beside()
    fit(pl, module_of(pl), [beside, callback()], tmp_path)
    assert torch.equal(beside.average.module.net[1].running_var, torch.ones(4))


def test_averages_of_something_else_do_not_end_the_training(pl: Any, callback: Any, tmp_path: Path) -> None:
    others = {
        "another model": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
        "no parameters": nn.ReLU(),
        "another size": nn.Linear(3, 9),
        "another dtype": module_of(pl).double(),
        "lazy": nn.LazyLinear(2),
    }

    class Holding(pl.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.held = {name: AveragedModel(model) for name, model in others.items()}
            for name, average in self.held.items():
                setattr(self, name.replace(" ", "_"), average)

    module, holding, path = module_of(pl), Holding(), tmp_path / "last.ckpt"
    before = {
        name: {k: v.clone() for k, v in a.state_dict().items() if not is_lazy(v)} for name, a in holding.held.items()
    }
    fit(pl, module, [holding, callback(save=path)], tmp_path)
    assert_exact(module)
    assert path.exists()
    for name, average in holding.held.items():
        for key, value in before[name].items():
            assert torch.equal(average.state_dict()[key], value)


class Breaks:
    """Batches, of which the last cannot be read; from the second walk on in the loader of training."""

    def __init__(self, walks: int) -> None:
        self.walks = walks

    def __iter__(self) -> Iterator[Any]:
        self.walks -= 1
        yield X[:16], Y[:16]
        if self.walks < 0:
            raise OSError("the disk is gone")


@pytest.mark.parametrize("how", ["dataloader", "training loader", "forward", "interrupt"])
def test_a_measurement_that_fails_does_not_lose_the_trained_weights(
    pl: Any, callback: Any, how: str, tmp_path: Path
) -> None:
    def failing(module: Any, batch: Any) -> Any:
        raise KeyboardInterrupt if how == "interrupt" else ValueError("no memory left")

    options: dict[str, Any] = {"save": tmp_path / "last.ckpt"}
    train: Any = None
    if how == "dataloader":
        options["dataloader"] = Breaks(0)
    elif how == "training loader":
        train = Breaks(2)
    else:
        options["forward"] = failing
    module, untouched = module_of(pl), {k: v.clone() for k, v in module_of(pl).state_dict().items()}
    error: Any = SystemExit if how == "interrupt" else BatchError
    with pytest.raises(error) as caught:
        fit(pl, module, [callback(**options)], tmp_path, train=train)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in saved.items())
    assert not torch.equal(saved["net.0.weight"], untouched["net.0.weight"])
    if error is BatchError:
        assert str(caught.value).endswith(f"were saved to {tmp_path / 'last.ckpt'}.")


class Counting:
    """Notes that training began."""

    def __init__(self) -> None:
        self.began = False

    def __iter__(self) -> Iterator[Any]:
        self.began = True
        yield X, Y


def no_norms(pl: Any) -> Any:
    module = module_of(pl)
    module.net, module.bn = nn.Linear(3, 1), nn.Identity()
    return module


def all_frozen(pl: Any) -> Any:
    module = module_of(pl)
    freeze(module)
    return module


def batches() -> Iterator[Any]:
    yield X


@pytest.mark.parametrize(
    ("make", "options", "error", "words"),
    [
        (module_of, lambda _: {"names": "nowhere"}, UnknownNameError, "'nowhere': no norm of that name"),
        (module_of, lambda _: {"names": ["bn", "net.9"]}, UnknownNameError, "'net.9': no norm"),
        (no_norms, lambda _: {}, StateError, "holds no batch norm"),
        (all_frozen, lambda _: {}, StateError, "none of the norms can be recalibrated"),
        (module_of, lambda _: {"dataloader": batches(), "before_validation": True}, StateError, "a generator can be"),
        (module_of, lambda _: {"dataloader": iter([X]), "before_validation": True}, StateError, "a list_iterator can"),
        (module_of, lambda folder: {"save": folder}, StateError, "is a folder"),
    ],
    ids=["name", "one of the names", "no norms", "all frozen", "generator", "iterator", "folder"],
)
def test_what_would_be_refused_after_training_is_refused_before(
    pl: Any, callback: Any, make: Any, options: Any, error: type[Exception], words: str, tmp_path: Path
) -> None:
    train = Counting()
    with pytest.raises(error, match=words):
        fit(pl, make(pl), [callback(**options(tmp_path))], tmp_path, train=train)
    assert not train.began


def test_a_training_loader_that_is_over_after_training_is_refused(pl: Any, callback: Any, tmp_path: Path) -> None:
    steps: list[int] = []
    module = module_of(pl, on_train_batch_start=lambda self, *args: steps.append(1))
    with pytest.raises(StateError, match="training loader is a generator"):
        fit(pl, module, [callback()], tmp_path, train=((X, Y) for _ in range(3)), max_epochs=1)
    assert not steps


def test_frozen_norms_that_are_named_are_measured(pl: Any, callback: Any, tmp_path: Path) -> None:
    module = all_frozen(pl)
    fit(pl, module, [callback(names="*")], tmp_path)
    assert_exact(module)


def test_before_an_average_it_is_refused(pl: Any, callback: Any, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="stands before EMAWeightAveraging"):
        fit(pl, module_of(pl), [callback(), ema(pl)], tmp_path)
    with pytest.raises(StateError, match="stands before StochasticWeightAveraging"):
        fit(pl, module_of(pl), [callback(), pl.callbacks.StochasticWeightAveraging(swa_lrs=0.02)], tmp_path)


def test_batches_go_through_the_transfer_hooks_under_the_trainers_precision(
    pl: Any, callback: Any, tmp_path: Path
) -> None:
    calls: list[str] = []
    dtypes: list[torch.dtype] = []

    class Data(pl.LightningDataModule):  # type: ignore[misc]
        def train_dataloader(self) -> Any:
            return loader()

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            calls.append("before")
            return batch

        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            calls.append(f"to {device}")
            return [part.to(device) for part in batch]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + 10, batch[1]]

    class Watching(pl.Callback):  # type: ignore[misc]
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            calls.clear()
            dtypes.clear()
            pl_module.net[0].register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))

    module = module_of(pl)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", precision="bf16-mixed", callbacks=[Watching(), callback()], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, datamodule=Data())
    # four batches, and the first once more, to see that it brings the same
    assert calls == ["before", "to cpu"] * 5
    assert dtypes == [torch.bfloat16] * 5
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        met = module.net[0](X + 10).double()
    torch.testing.assert_close(module.net[1].running_mean, met.mean(0).float(), rtol=1e-5, atol=1e-5)


def test_how_many_batches(pl: Any, callback: Any, tmp_path: Path) -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield from zip(X, Y, strict=True)

    fit(pl, module_of(pl), [few := callback(num_batches=2)], tmp_path)
    assert few.result.batches == 2
    fit(pl, module_of(pl), [limited := callback()], tmp_path, limit_train_batches=3)
    assert limited.result.batches == 3
    endless = DataLoader(Endless(), batch_size=16)
    fit(pl, module_of(pl), [bounded := callback(num_batches=5)], tmp_path, endless, max_epochs=None, max_steps=7)
    assert bounded.result.batches == 5


def test_another_loader_and_another_call(pl: Any, callback: Any, tmp_path: Path) -> None:
    module = module_of(pl)
    other = [{"image": X[:20]}, {"image": X[20:30]}]
    options = {"dataloader": other, "forward": lambda m, batch: m(batch["image"]), "names": "net.1"}
    fit(pl, module, [measuring := callback(**options)], tmp_path)
    assert_exact(module, X[:30])
    assert [layer.name for layer in measuring.result.layers] == ["net.1"]


def test_several_loaders_are_refused_before_training(pl: Any, callback: Any, tmp_path: Path) -> None:
    steps: list[Any] = []
    module = module_of(pl, training_step=lambda self, batch, i: steps.append(batch))
    with pytest.raises(StateError, match="there are 2 training loaders"):
        fit(pl, module, [callback()], tmp_path, [loader(), loader()])
    assert steps == []


def test_kept_workers_are_refused_before_training(pl: Any, callback: Any, tmp_path: Path) -> None:
    kept = loader(num_workers=1, persistent_workers=True)
    with pytest.raises(StateError, match="persistent_workers=True"):
        fit(pl, module_of(pl), [callback(before_validation=True)], tmp_path, kept, loader())


@pytest.mark.parametrize(("number", "error"), [(0, ShapeError), (2.5, ArgumentTypeError)])
def test_numbers_of_batches_that_mean_nothing(callback: Any, number: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="num_batches: expected"):
        callback(num_batches=number)


@pytest.mark.parametrize(
    ("option", "error", "words"),
    [
        ({"order": "random"}, UnknownNameError, "order='random'; expected one of 'sequential', 'parallel'"),
        ({"estimator": "median"}, UnknownNameError, "estimator='median'"),
        ({"tolerance": 0}, ShapeError, "tolerance=0: expected a positive number"),
        ({"dataloader": X}, ArgumentTypeError, r"got one tensor of shape \(50, 3\)"),
    ],
)
def test_options_that_make_no_sense(callback: Any, option: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        callback(**option)


@pytest.mark.parametrize(
    ("option", "error", "words"),
    [
        ({"memory": "4 horses"}, ArgumentTypeError, "memory='4 horses'"),
        ({"cache": "no/such/folder"}, BatchError, "cache='no/such/folder': No such file"),
    ],
)
def test_what_the_machine_does_not_offer_is_refused_before_training(
    pl: Any, callback: Any, tmp_path: Path, option: Any, error: type[Exception], words: str
) -> None:
    steps: list[Any] = []
    module = module_of(pl, training_step=lambda self, batch, i: steps.append(batch))
    with pytest.raises(error, match=words):
        fit(pl, module, [callback(**option)], tmp_path)
    assert steps == []


def test_options_mean_what_they_mean_to_recalibrate(pl: Any, callback: Any, tmp_path: Path) -> None:
    module, measuring = module_of(pl), callback(order="parallel", tolerance=10.0)
    fit(pl, module, [measuring], tmp_path, loader(4))
    result = measuring.result
    assert (result.order, result.tolerance) == ("parallel", 10.0)
    assert result.batches == 8  # of 13: where the parallel order looks for the first time
    assert_exact(module, X[:32])
    # memory for nothing: the batches wait on disk, and the loader is walked through again
    shelved: list[int] = []

    def look(module: Any, batch: Any) -> Any:
        shelved.append(len(list(tmp_path.glob("batchnorm-*/*.bin"))))
        return module(batch[0])

    module, measuring = module_of(pl), callback(memory=0, cache=tmp_path, forward=look)
    fit(pl, module, [measuring], tmp_path)
    assert max(shelved) > 0
    assert_exact(module)
    assert list(tmp_path.glob("batchnorm-*")) == []


# -- the import ------------------------------------------------------------------------------------------------------
