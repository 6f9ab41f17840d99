"""Models without a fault, some of them odd: diagnose must find nothing."""

from __future__ import annotations

from dataclasses import replace

import torch
from benchmarks.diagnose.architectures import TIMM, build
from benchmarks.diagnose.data import Batch
from benchmarks.diagnose.faults.dataflow import pass_in_train_mode
from benchmarks.diagnose.faults.registry import EVERY, THREE, Bench, Metric, Planted, accuracy, healthy
from benchmarks.diagnose.training import PLAIN, Feed, Recipe, fit, norms
from torch import Tensor, nn

from batchnorm import fold, freeze, recalibrate


def _fine(bench: Bench, model: nn.Module, batches: list[Batch] | None = None) -> Planted:
    return bench.planted(model, [], model, batches=batches)


@healthy("held_out_32")
def held_out_32(bench: Bench) -> Planted:
    """Handed over in eval mode, with held-out pictures in batches of 32."""
    return _fine(bench, bench.trained(), bench.data.held_out(32))


@healthy("held_out_128")
def held_out_128(bench: Bench) -> Planted:
    """The same in batches of 128."""
    return _fine(bench, bench.trained(), bench.data.held_out(128))


@healthy("training_32")
def training_32(bench: Bench) -> Planted:
    """Handed over in eval mode, with the pictures of training in batches of 32."""
    return _fine(bench, bench.trained(), bench.data.training(32))


@healthy("training_128")
def training_128(bench: Bench) -> Planted:
    """The same in batches of 128."""
    return _fine(bench, bench.trained(), bench.data.training(128))


@healthy("in_train_mode_32")
def in_train_mode_32(bench: Bench) -> Planted:
    """Handed over in train mode, in the middle of a training script, with held-out pictures in batches of 32."""
    return _fine(bench, bench.trained().train(), bench.data.held_out(32))


@healthy("in_train_mode_128")
def in_train_mode_128(bench: Bench) -> Planted:
    """The same in batches of 128."""
    return _fine(bench, bench.trained().train(), bench.data.held_out(128))


@healthy("recalibrated")
def recalibrated(bench: Bench) -> Planted:
    """Statistics measured by ``batchnorm.recalibrate`` on the training part."""
    model = bench.trained()
    recalibrate(model, bench.data.training(128), progress=False)
    return _fine(bench, model)


@healthy("frozen")
def frozen(bench: Bench) -> Planted:
    """All norms frozen by ``batchnorm.freeze``, with their right statistics, for a fine-tuning: in train mode."""
    model = bench.trained()
    freeze(model)
    return _fine(bench, model.train())


@healthy("frozen_by_hand")
def frozen_by_hand(bench: Bench) -> Planted:
    """The model trains, its norms are in eval mode and do not learn; their statistics are right."""
    model = bench.trained().train()
    for norm in norms(model).values():
        norm.eval().requires_grad_(False)
    return _fine(bench, model)


@healthy("folded")
def folded(bench: Bench) -> Planted:
    """Every norm folded away by ``batchnorm.fold``: there is nothing to diagnose."""
    model = bench.trained()
    return _fine(bench, fold(model, bench.data.test_images[:8]).model)


def _dropout(model: nn.Module) -> None:
    """Let a Dropout go before the last layer, behind the last norm, where it belongs."""
    name, last = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    model.set_submodule(name, nn.Sequential(nn.Dropout(0.3), last))


@healthy("dropout", architectures=THREE)
def dropout(bench: Bench) -> Planted:
    """Trained with Dropout before the last layer; handed over in train mode."""
    return _fine(bench, bench.trained(replace(PLAIN, prepare=_dropout)).train())


@healthy("batches_of_16", architectures=THREE)
def batches_of_16(bench: Bench) -> Planted:
    """Trained in batches of 16, small but not too small, and recalibrated afterwards."""
    recipe: Recipe = replace(PLAIN, batch=16, epochs=3, learning_rate=0.05)
    model = bench.trained(recipe)
    recalibrate(model, bench.data.training(128), progress=False)
    return _fine(bench, model)


@healthy("poison_refused", architectures=("resnet-ours",))
def poison_refused(bench: Bench) -> Planted:
    """A batch with NaN went through this library's norms in train mode: they keep it out of their statistics."""
    model = bench.trained()
    images, labels = bench.data.training()[0]
    pass_in_train_mode(model, [(images.index_fill(0, torch.tensor([3]), torch.nan), labels)])
    return _fine(bench, model)


def _inverted(bench: Bench) -> list[Batch]:
    return [(_negative(bench, images), labels) for images, labels in bench.data.held_out()]


def _negative(bench: Bench, images: Tensor) -> Tensor:
    return (1 - 2 * bench.data.mean) / bench.data.std - images


def _with_frozen(bench: Bench, feed: Feed | None = None) -> Recipe:
    """Return how a network learns while its norms are frozen: deep ones diverge at 0.05, for nothing scales them."""
    deep = bench.architecture in (*TIMM, "mobilenet")
    return Recipe(epochs=12, learning_rate=0.005 if deep else 0.05, feed=feed)


def _tuned(bench: Bench, metric: Metric | None) -> Planted:
    """Fine-tune on negatives with all norms frozen: the statistics stay those of the positives, and are needed so."""
    model = bench.trained()
    freeze(model)
    fit(model, bench.data, _with_frozen(bench, feed=lambda x, y, generator: (_negative(bench, x), y)), bench.seed)
    training = [(_negative(bench, images), labels) for images, labels in bench.data.training()]
    return bench.planted(
        model.eval(), [], model, batches=_inverted(bench), training_batches=training, metric=metric
    )  # fmt: skip


@healthy("frozen_finetuned", architectures=EVERY)
def frozen_finetuned(bench: Bench) -> Planted:
    """Fine-tuned on other pictures with ``batchnorm.freeze``; diagnosed without a metric."""
    return _tuned(bench, None)


@healthy("frozen_finetuned_accuracy", architectures=EVERY)
def frozen_finetuned_accuracy(bench: Bench) -> Planted:
    """The same, diagnosed by the accuracy."""
    return _tuned(bench, accuracy)


@healthy("frozen_early", architectures=EVERY)
def frozen_early(bench: Bench) -> Planted:
    """Five batches in train mode, then all norms frozen, and trained from there; diagnosed by the accuracy."""
    model = build(bench.architecture, bench.seed)
    pass_in_train_mode(model, bench.data.training()[:5])
    freeze(model)
    fit(model, bench.data, _with_frozen(bench), bench.seed)
    return bench.planted(model.eval(), [], model, metric=accuracy)


@healthy("eval_by_hand_accuracy", architectures=EVERY)
def eval_by_hand_accuracy(bench: Bench) -> Planted:
    """Fine-tuned with the norms in eval mode by hand, which leaves no trace; diagnosed by the accuracy."""
    model = bench.trained()
    held = {name: norm.train for name, norm in norms(model).items()}
    for norm in norms(model).values():
        norm.train = lambda mode=True, norm=norm: norm  # as a train() of the model's own that passes norms over
    fit(model, bench.data, _with_frozen(bench, feed=lambda x, y, generator: (_negative(bench, x), y)), bench.seed)
    for name in held:
        del norms(model)[name].train
    return bench.planted(model.eval(), [], model, batches=_inverted(bench), metric=accuracy)


@healthy("half_checkpoint", architectures=EVERY)
def half_checkpoint(bench: Bench) -> Planted:
    """The state dict went through float16, all of it, and back into a float32 model."""
    return _fine(bench, _rounded(bench, torch.float16))


@healthy("bfloat16_checkpoint", architectures=EVERY)
def bfloat16_checkpoint(bench: Bench) -> Planted:
    """The same through bfloat16."""
    return _fine(bench, _rounded(bench, torch.bfloat16))


def _rounded(bench: Bench, dtype: torch.dtype) -> nn.Module:
    model = bench.trained()
    state = model.state_dict()
    model.load_state_dict({k: v.to(dtype).to(v.dtype) if v.is_floating_point() else v for k, v in state.items()})
    return model


@healthy("untrained", architectures=EVERY)
def untrained(bench: Bench) -> Planted:
    """As constructed: no weights were loaded, which a note says."""
    return _fine(bench, build(bench.architecture, bench.seed).eval())


@healthy("zero_init", architectures=("resnet", "resnet-ours", "timm-resnet10t"))
def zero_init(bench: Bench) -> Planted:
    """γ of the last norm of every residual branch is 0, as networks begin; the statistics are right."""
    model = bench.trained()
    for name, norm in norms(model).items():
        if name.endswith("bn2"):
            nn.init.zeros_(norm.weight)
            nn.init.zeros_(norm.bias)
    recalibrate(model, bench.data.training(128), progress=False)
    return _fine(bench, model)
