import contextlib
import gc
import json

import pytest
import torch
from tests.interrupts import Interrupting
from torch import nn
from torch.nn.modules import module as hooks

import batchnorm
from batchnorm.errors import ArgumentTypeError, BatchNormError, ShapeError, StateError, UnknownNameError
from batchnorm.models.calling import compiled_modules_eager
from batchnorm.monitor import WatchResult, watch
from batchnorm.monitor.observe import ModelObserver


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, torch.Tensor]:
    """A small convolutional network trained on real pictures, and pictures it has not seen."""
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(bunch.images / 16).float()[:, None], torch.tensor(bunch.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1347], order[1347:]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 64, bias=False),
        nn.BatchNorm1d(64),
        nn.Sigmoid(),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    g = torch.Generator().manual_seed(1)
    for _ in range(250):
        batch = train[torch.randint(len(train), (60,), generator=g)]
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), x[test]


def seen(model: nn.Module, x: torch.Tensor, batch: int = 60, **options) -> WatchResult:
    with torch.no_grad(), watch(model, **options) as w:
        for part in x.split(batch):
            model(part)
    return w.result()


def test_new_pictures_of_the_same_kind_are_no_drift(digits) -> None:
    model, x = digits
    assert not seen(model, x).drifted
    for seed in range(20):
        part = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: 16 + 8 * seed]
        assert not seen(model, x[part]).drifted


@pytest.mark.parametrize(
    "change",
    [
        lambda x: 1 - x,
        lambda x: x.rot90(1, (-2, -1)),
        lambda x: x + 0.2,
        lambda x: 0.5 * x,
        lambda x: (x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1),
    ],
    ids=["inversion", "quarter turn", "brighter", "paler", "noise"],
)
def test_changed_pictures_are_drift(digits, change) -> None:
    model, x = digits
    assert seen(model, change(x)).drifted


@pytest.mark.parametrize("change", [lambda x: x, lambda x: 1 - x])
def test_the_batch_size_does_not_matter(digits, change) -> None:
    model, x = digits
    results = [seen(model, change(x), batch) for batch in (2, 33, 450)]
    for result in results[1:]:
        assert result.drifted == results[0].drifted
        for a, b in zip(result.layers, results[0].layers, strict=True):
            assert a.samples == b.samples == 450
            # the forward pass itself rounds differently for other batch sizes
            torch.testing.assert_close(a.shift, b.shift, rtol=1e-3, atol=1e-5)


def test_one_sample_is_not_enough(digits) -> None:
    model, x = digits
    result = seen(model, x[:1])
    assert result.verdict == "not judged"
    with pytest.raises(StateError, match=r"not known.*1 sample seen, at least 16 needed.*Let the watched model"):
        _ = result.drifted
    assert {layer.status for layer in result.layers} == {"too few samples"}
    assert {layer.effective for layer in result.layers} == {None}
    assert "σ (" not in str(result)  # no channel is named where none can be judged
    assert "Not enough samples to judge: 1 sample seen, at least 16 needed." in str(result)


def test_nothing_called(digits) -> None:
    with watch(digits[0]) as w:
        pass
    result = w.result()
    assert result.verdict == "not judged"
    with pytest.raises(StateError, match="the model was not called while it was watched"):
        _ = result.drifted
    assert result.to_dict()["drifted"] is None
    assert "was not called" in str(result)


def test_norms_that_data_takes_no_way_through_do_not_spoil_the_verdict_of_the_others() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.rare, self.unused = (nn.BatchNorm1d(3) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x) + self.rare(x[:1])

    model, x = Model(), torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    for norm in (model.used, model.rare, model.unused):
        norm.num_batches_tracked += 1
    result = seen(model.eval(), x, 32)
    assert [layer.status for layer in result.layers] == ["as stored", "too few samples", "not called"]
    assert not result.drifted
    assert "1 of 3 norms could be judged" in str(result)
    assert seen(model, x + 1, 32).drifted


def test_names(digits) -> None:
    model, x = digits
    assert [layer.name for layer in seen(model, x, names="4").layers] == ["4"]
    with pytest.raises(UnknownNameError, match="'9'"):
        watch(model, names="9")


def test_nan_batches_are_flagged_and_the_rest_still_compared(digits) -> None:
    model, x = digits
    x = x.clone()
    x[7] = torch.nan
    result = seen(model, x)
    assert result.drifted
    assert result.document().tone == "bad"
    assert "Non-finite values in 1, 4, 8" in str(result)
    assert all(layer.nonfinite == 1 and layer.distance < 0.1 for layer in result.layers)


def test_result_inside_the_block_and_going_on_later(digits) -> None:
    model, x = digits
    w = watch(model)
    with torch.no_grad():
        with w:
            model(x[:100])
            assert w.result().samples == 100
        with w:
            model(x[100:])
    whole = w.result()
    assert whole.samples == 450
    assert whole.layers[0].distance == pytest.approx(seen(model, x).layers[0].distance, abs=1e-4)
    with w, pytest.raises(StateError, match="running already"), w:
        pass


def test_report(digits) -> None:
    model, x = digits
    for pictures in (x, 1 - x, x[:1], x * torch.nan):
        result = seen(model, pictures)
        data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert data["verdict"] == result.verdict
        assert data["drifted"] is {"drifted": True, "as stored": False, "not judged": None}[result.verdict]
        assert [layer["name"] for layer in data["layers"]] == ["1", "4", "8"]
        assert [use["kind"] for use in data["activations"]] == ["relu", "relu", "sigmoid"]
        table = result.document().sections[0].blocks[0]
        assert table.tones == {i: "bad" for i, layer in enumerate(result.layers) if layer.flagged}
        text = result.text(verbose=True, width=160)
        assert all(name in text for name in ("norm", "sigmoid", "worst channel"))


def test_false_alarm_level_is_shared_among_the_norms() -> None:
    # 10 norms, each at the edge of its tolerance: were each tested at the full level, up to 40 % of the streams would
    # raise an alarm. With the level shared, 7 or more of 40 at level 0.05 have probability below 0.01.
    norms = nn.Sequential(*(nn.BatchNorm1d(16) for _ in range(10))).eval()
    for norm in norms:
        norm.running_mean.copy_(torch.where(torch.arange(16) % 2 == 0, 0.1, -0.1))

    class Side(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = norms

        def forward(self, x: torch.Tensor) -> None:
            for norm, part in zip(self.norms, x.unbind(2), strict=True):
                norm(part)

    alarms = 0
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        alarms += seen(Side(), torch.randn(48, 16, 10, generator=g), level=0.05).drifted
    assert alarms < 7


def test_models_without_stored_statistics_are_refused() -> None:
    with pytest.raises(StateError, match=r"Linear has no batch norm with stored statistics"):
        watch(nn.Linear(3, 3))
    with pytest.raises(StateError, match="track_running_stats=True"):
        watch(nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(StateError, match="never been updated"):
        watch(nn.Sequential(nn.BatchNorm1d(3)))
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(9, 3))
    watch(norm)
    watch(nn.Sequential(nn.BatchNorm1d(3), norm))  # one of them will do
    # a model with buffers may call a batch norm function with them; this one does not
    buffer_only = nn.Linear(3, 3)
    buffer_only.register_buffer("scale", torch.ones(3))
    with watch(buffer_only) as w:
        buffer_only(torch.randn(2, 3))
    with pytest.raises(StateError, match="no batch norm"):
        w.result()


def test_bad_arguments_are_refused_in_words() -> None:
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(9, 3))
    for error, arguments in (
        (ShapeError, {"tolerance": 0}),
        (ShapeError, {"tolerance": float("nan")}),
        (ShapeError, {"level": 0.5}),
        (ShapeError, {"level": 0}),
    ):
        with pytest.raises(error, match=f"watch: {next(iter(arguments))}="):
            watch(norm, **arguments)
    with pytest.raises(ArgumentTypeError, match=r"expected a torch\.nn\.Module; got str"):
        watch("model")
    assert issubclass(StateError, BatchNormError)


def test_an_empty_list_of_names_means_no_norm() -> None:
    with pytest.raises(StateError, match="names is empty"):
        watch(torch.nn.BatchNorm1d(3), names=[])


@pytest.mark.parametrize(("buffer", "value"), [
    ("running_mean", float("nan")), ("running_mean", float("inf")), ("running_var", float("nan")),
    ("running_var", float("inf")), ("running_var", -1.0),
])  # fmt: skip
def test_statistics_that_are_not_finite_are_blamed_and_not_the_data(buffer, value):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Tanh()).eval()
    getattr(model[0], buffer)[1] = value
    with watch(model) as watching:
        for _ in range(4):
            model(torch.randn(16, 3))
    result = watching.result()
    assert result.layers[0].status == "non-finite statistics"
    assert (result.layers[0].nonfinite, result.layers[0].distance) == (0, None)
    assert result.verdict == "not judged"
    assert result.summary.startswith("The statistics of 0 are NaN, infinite or negative")
    with pytest.raises(StateError, match=r"The statistics of 0 are NaN.*recalibrate the model"):
        _ = result.drifted
    assert "non-finite statistics" in str(result)


def test_values_behind_statistics_that_are_not_finite_are_no_drift():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).eval()
    model[0].running_mean[1] = float("nan")
    with watch(model) as watching:
        model(torch.randn(64, 3))
    result = watching.result()
    assert [layer.status for layer in result.layers] == ["non-finite statistics", "non-finite values"]
    assert result.verdict == "not judged"
    assert "Non-finite values in 1, which may come of that." in result.summary


def test_what_a_norm_behind_an_infinite_variance_meets_is_no_drift_and_what_one_before_it_meets_may_be():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)), torch.randn(64, 3)
    for _ in range(200):
        model(x)
    model.eval()[1].running_var.fill_(float("inf"))
    for data, verdict in ((x, "not judged"), (x + 5, "drifted")):
        with watch(model) as watching:
            model(data)
        result = watching.result()
        assert [layer.status for layer in result.layers][1:] == ["non-finite statistics", "drifted"]
        assert result.verdict == verdict
        assert ("Drift: 1 of 3 norms" in result.summary) == (verdict == "drifted")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupted_anywhere_as_it_begins_or_ends_a_watch_leaves_no_hook():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2)).eval()
    model[0].running_mean += 1

    def begin_and_end() -> None:
        with batchnorm.watch(model):
            pass

    for n in range(1, 10_000):
        with contextlib.suppress(KeyboardInterrupt):
            Interrupting(n).run(begin_and_end)
            break
        gc.collect()
        assert not hooks._global_forward_hooks, f"interrupted at {n}"
        assert not hooks._global_forward_pre_hooks, f"interrupted at {n}"
        assert compiled_modules_eager.depth() == 0, f"interrupted at {n}"
    assert n > 10


def test_an_interrupt_as_the_end_begins_ends_the_watch_that_is_kept(monkeypatch):
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2)).eval()
    model[0].running_mean += 1
    watching, close, calls = batchnorm.watch(model), ModelObserver.close, []

    def interrupted_once(self) -> None:
        calls.append(self)
        if len(calls) == 1:
            raise KeyboardInterrupt
        close(self)

    monkeypatch.setattr(ModelObserver, "close", interrupted_once)
    with pytest.raises(KeyboardInterrupt), watching:
        pass
    assert not hooks._global_forward_hooks
    with watching:  # it can be entered again
        assert len(hooks._global_forward_hooks) == 1
    assert not hooks._global_forward_hooks
