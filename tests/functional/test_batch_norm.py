from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.errors import ShapeError
from batchnorm.functional import batch_norm, use_backend
from batchnorm.kernels import ACCURACY, ACTIVATIONS, Transform
from batchnorm.kernels.accuracy import backward_bounds, train_forward_bound
from batchnorm.moments import Moments

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STATE = ("running_mean", "running_var", "weight", "bias")


def backend_or_dispatch(name):
    return nullcontext() if name is None else use_backend(name)


# -- torch's own operator inputs, with torch as the oracle ---------------------------------------------------------


@pytest.fixture(scope="module")
def op():
    # imported here: it takes seconds, and only the worker that runs these tests should pay
    from torch.testing._internal.common_methods_invocations import op_db

    found = [op for op in op_db if op.name == "nn.functional.batch_norm" and op.dtypes]
    assert len(found) == 1, "the other variants have no dtypes on CPU"
    return found[0]


def samples_of(op, dtype):
    """Return torch's sample and reference inputs, each also in channels-last layout where there is one."""
    made = [*op.sample_inputs("cpu", dtype, requires_grad=True), *op.reference_inputs("cpu", dtype, requires_grad=True)]
    assert len(made) >= 12
    for sample in made:
        arguments = dict(zip(STATE, sample.args, strict=True)) | sample.kwargs
        yield sample.input, arguments
        if sample.input.dim() == 4:
            yield channels_last(sample.input), arguments


def channels_last(x):
    return x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(x.requires_grad)


def run(function, x, arguments, dtype=None):
    """Return output, running statistics and gradients, on fresh copies, converted to ``dtype`` if one is given."""
    fresh = {k: v.detach().to(dtype or v.dtype).clone() if torch.is_tensor(v) else v for k, v in arguments.items()}
    given = x.dtype
    x = x.detach().to(dtype or given).requires_grad_()
    leaves = {"input": x}
    for name in ("weight", "bias"):
        if fresh[name] is not None:
            leaves[name] = fresh[name].requires_grad_()
    y = function(x, **fresh)
    dy = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(given).to(x.dtype).reshape(y.shape)
    gradients = dict(zip(leaves, torch.autograd.grad(y, tuple(leaves.values()), dy), strict=True))
    return {"output": y, **{k: fresh[k] for k in STATE[:2]}, **{f"d {k}": v for k, v in gradients.items()}}, dy


@pytest.mark.every(2)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_inputs_give_torchs_numbers_bit_for_bit(op, dtype):
    for x, arguments in samples_of(op, dtype):
        ours, _ = run(batch_norm, x, arguments)
        torchs, _ = run(F.batch_norm, x, arguments)
        for name, value in torchs.items():
            if value is None:
                assert ours[name] is None
            else:
                torch.testing.assert_close(ours[name], value, rtol=0, atol=0, equal_nan=True, msg=name)
        assert ours["output"].stride() == torchs["output"].stride()


@pytest.mark.every(2)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_inputs_on_the_reference_give_torchs_numbers_in_float64(op, dtype):
    for x, arguments in samples_of(op, dtype):
        with use_backend("reference"):
            ours, dy = run(batch_norm, x, arguments)
        exact, _ = run(F.batch_norm, x, arguments, torch.float64)
        torchs, _ = run(F.batch_norm, x, arguments)
        assert ours.keys() == torchs.keys()
        assert ours["output"].stride() == torchs["output"].stride()
        for name, bound in bounds_of(x.detach(), dy, arguments, exact).items():
            if torchs[name] is None:
                assert ours[name] is None
                continue
            assert ours[name].dtype == torchs[name].dtype
            assert ((ours[name].double() - exact[name]).abs() <= bound).all(), name


def bounds_of(x, dy, arguments, exact):
    """Return how far each result of the reference may be from torch's in float64, the statistics being float64 sums.

    Both sides round: a value of torch's in float64 has the error that the same bound allows in float64, so twice the
    bound is room enough; n more units for torch's sums over n values.
    """
    if x.dim() < 2:
        return {"output": torch.zeros(()), "d input": torch.zeros(())}
    training, eps = arguments.get("training", False), arguments.get("eps", 1e-5)
    m = Moments.of(x)
    mean, var = (m.mean, m.variance()) if training else (arguments[k].double() for k in STATE[:2])
    t = Transform(
        mean, (var + eps).rsqrt(), *(arguments[k] if arguments[k] is None else arguments[k].detach() for k in STATE[2:])
    )
    factor = 2.0 + (m.count.max().item() if x.dtype == torch.float64 else 0.0)
    back = backward_bounds(dy, x, t, exact["d input"])
    size = {"output": train_forward_bound(x, t, exact["output"], m), "d input": back.input}
    for name, total in (("d weight", back.sum_dy_xhat), ("d bias", back.sum_dy)):
        if name in exact:
            size[name] = total + ACCURACY[x.dtype].eps * exact[name].abs()
    for name in STATE[:2]:
        if exact[name] is not None:
            # one rounding of the result to the dtype of the buffer, and float64 arithmetic on its two terms
            terms = exact[name].abs() + arguments[name].double().abs()
            size[name] = ACCURACY[x.dtype].eps * terms + 8 * m.count.max() * ACCURACY[torch.float64].eps * (terms + 1)
    return {name: factor * bound for name, bound in size.items()}


@pytest.mark.every(2)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("order", [1, 2])
def test_torchs_inputs_pass_gradcheck(op, backend, order):
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        x, arguments = sample.input, dict(zip(STATE, sample.args, strict=True)) | sample.kwargs
        leaves = {name: arguments[name] for name in ("weight", "bias") if arguments[name] is not None}

        def function(x, *values, arguments=arguments, leaves=leaves):
            fixed = {k: arguments[k] if arguments[k] is None else arguments[k].clone() for k in STATE[:2]}
            return batch_norm(x, **(arguments | fixed | dict(zip(leaves, values, strict=True))))

        with backend_or_dispatch(backend):
            check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
            # for torch's own derivatives a random projection of the Jacobian is enough
            assert check(function, (x, *leaves.values()), fast_mode=backend is None)


# -- activation, residual, mask --------------------------------------------------------------------------------------


def case(shape=(4, 3, 5), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(dtype)

    c = shape[1]
    state = {
        "running_mean": normal(c),
        "running_var": normal(c).abs() + 0.5,
        "weight": normal(c).requires_grad_(),
        "bias": normal(c).requires_grad_(),
    }
    return normal(*shape).requires_grad_(), state, normal(*shape).requires_grad_()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activation_and_residual_equal_their_composition(backend, training, activation):
    x, state, residual = case()
    fixed = {k: v.clone() for k, v in state.items() if k.startswith("running")}
    leaves = (x, state["weight"], state["bias"], residual)
    with backend_or_dispatch(backend):
        y = batch_norm(x, **(state | fixed), training=training, activation=activation, residual=residual)
    z = F.batch_norm(x, **state, training=training) + residual
    expected = z if activation is None else ACTIVATIONS[activation].function(z)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    ours = (y, *torch.autograd.grad(y, leaves, dy), *fixed.values())
    torchs = (expected, *torch.autograd.grad(expected, leaves, dy), state["running_mean"], state["running_var"])
    for a, b in zip(ours, torchs, strict=True):
        # 20 values a channel, all of size one: a few hundred roundings of float64
        torch.testing.assert_close(a, b, rtol=0, atol=1e3 * torch.finfo(torch.float64).eps)


@pytest.mark.every(13)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_first_and_second_derivatives_of_the_reference(training, activation, masked):
    x, state, residual = case((4, 2, 3))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool) if masked else None

    def function(x, weight, bias, residual):
        fixed = {k: state[k].clone() for k in STATE[:2]}
        return batch_norm(
            x, **fixed, weight=weight, bias=bias, training=training, activation=activation, residual=residual, mask=mask
        )

    leaves = (x, state["weight"], state["bias"], residual)
    with use_backend("reference"):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@st.composite
def masked_cases(draw: st.DrawFn):
    """Draw a shape and a mask that leaves at least two positions."""
    n, c, space = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.sampled_from([(), (4,), (2, 3)]))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=n * 6, max_size=n * 6)))
    mask = mask[: n * max(1, torch.Size(space).numel())].reshape(n, *space)
    if mask.sum() < 2:
        mask.fill_(True)
    return (n, c, *space), mask, draw(st.integers(0, 2**20))


@given(masked_cases(), st.booleans(), st.sampled_from([None, "relu", "sigmoid"]))
def test_a_mask_is_the_operation_on_the_valid_subset(drawn, training, activation):
    shape, mask, seed = drawn
    if training and mask.sum() < 2:
        return
    x, state, residual = case(shape, seed=seed)
    fixed = {k: v.clone() for k, v in state.items() if k.startswith("running")}
    leaves = (x, state["weight"], state["bias"], residual)

    def rows(values):
        return values.movedim(1, -1)[mask]

    y = batch_norm(x, **(state | fixed), training=training, activation=activation, residual=residual, mask=mask)
    z = F.batch_norm(rows(x), **state, training=training) + rows(residual)
    expected = z if activation is None else ACTIVATIONS[activation].function(z)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
    ours = (rows(y), *torch.autograd.grad(y, leaves, dy), *fixed.values())
    torchs = (expected, *torch.autograd.grad(expected, leaves, rows(dy)), state["running_mean"], state["running_var"])
    # two values a channel may lie close together: rstd, at most 1/√eps = 316, enters the gradient twice
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=316**2 * 100 * torch.finfo(torch.float64).eps)
    invalid = ~mask.unsqueeze(1).expand(shape)
    assert y[invalid].eq(0).all()
    assert all(g[invalid].eq(0).all() for g in (ours[1], ours[4]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_non_finite_padding_has_no_influence(dtype, training):
    x, state, residual = case(dtype=dtype)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    results = []
    for dirt in (0.0, torch.nan, torch.inf):
        fixed = {k: v.clone() for k, v in state.items() if k.startswith("running")}
        leaves = [torch.where(mask[:, None], v.detach(), dirt).requires_grad_() for v in (x, residual)]
        parameters = [state["weight"], state["bias"]]
        y = batch_norm(
            leaves[0], **(state | fixed), training=training, activation="silu", residual=leaves[1], mask=mask
        )
        dy = torch.where(mask[:, None], torch.ones_like(y), dirt)
        results.append((y, *fixed.values(), *torch.autograd.grad(y, [*leaves, *parameters], dy)))
    for dirty in results[1:]:
        for a, b in zip(results[0], dirty, strict=True):
            assert torch.equal(a, b)


def test_a_mask_of_all_true_changes_nothing_but_the_backend():
    x, state, _ = case()
    masked_state = {k: v.detach().clone() for k, v in state.items()}
    y = batch_norm(x, **masked_state, training=True, mask=torch.ones(4, 5, dtype=torch.bool))
    expected = F.batch_norm(x, **state, training=True)
    torch.testing.assert_close(y, expected, rtol=0, atol=100 * torch.finfo(torch.float64).eps)


def test_a_mask_may_differ_between_channels():
    x, _, _ = case((6, 3))
    mask = torch.rand(6, 3, generator=torch.Generator().manual_seed(3)) > 0.3
    y = batch_norm(x, None, None, training=True, mask=mask)
    for c in range(3):
        one = F.batch_norm(x[mask[:, c], c][:, None], None, None, training=True)
        torch.testing.assert_close(y[mask[:, c], c], one[:, 0], rtol=0, atol=1e3 * torch.finfo(torch.float64).eps)
    assert y[~mask].eq(0).all()


def test_an_all_false_mask_is_an_empty_batch():
    x, state, _ = case()
    before = {k: v.detach().clone() for k, v in state.items()}
    y = batch_norm(x, **state, training=True, mask=torch.zeros(4, 5, dtype=torch.bool))
    y.sum().backward()
    assert y.eq(0).all()
    assert x.grad.eq(0).all()
    assert state["weight"].grad.eq(0).all()
    for k in STATE:
        assert torch.equal(state[k], before[k])


def test_one_valid_value_is_refused_and_leaves_no_trace():
    x, state, _ = case()
    before = {k: v.detach().clone() for k, v in state.items()}
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 2] = True
    with pytest.raises(
        ShapeError, match=r"at least 2 values per channel; the mask leaves 1 of 20 \(batch 4 × space 5\)"
    ):
        batch_norm(x, **state, training=True, mask=mask)
    assert all(torch.equal(state[k], before[k]) for k in STATE)
    batch_norm(x, **state, training=False, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_half_data_with_float32_parameters(dtype, backend):
    x, state, residual = case(dtype=dtype)
    state = {k: v.detach().float() for k, v in state.items()}
    exact = F.relu(
        F.batch_norm(x.double(), None, None, *(state[k].double() for k in STATE[2:]), True) + residual.double()
    )
    with backend_or_dispatch(backend):
        y = batch_norm(x, **state, training=True, activation="relu", residual=residual)
    assert y.dtype == dtype
    assert state["running_mean"].dtype == torch.float32
    # fused it is rounded once; composed of torch's operators after the norm and after the sum
    roundings = 1 if backend else 2
    magnitude = exact.abs() + residual.double().abs() + 1
    assert ((y.double() - exact).abs() <= roundings * torch.finfo(dtype).eps * magnitude).all()


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)])
@pytest.mark.parametrize("training", [True, False])
def test_empty_batches_do_what_torchs_do(backend, shape, training):
    results = []
    for function in (batch_norm, F.batch_norm):
        x = torch.zeros(shape, requires_grad=True)
        mean, var, weight = torch.full((3,), 2.0), torch.full((3,), 3.0), torch.ones(3, requires_grad=True)
        with backend_or_dispatch(backend):
            y = function(x, mean, var, weight, None, training, 0.5)
        results.append((y, mean, var, *torch.autograd.grad(y.sum(), (x, weight))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_third_derivatives_exist():
    x, state, _ = case((3, 2))
    with use_backend("reference"):
        y = batch_norm(x, None, None, state["weight"], state["bias"], True, activation="tanh")
        for _ in range(3):
            (y,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert y.abs().max() > 0


# -- function transforms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_vmap_and_grad_transforms(masked):
    x, state, _ = case((4, 3, 5))
    stats, weight = [state[k] for k in STATE[:2]], state["weight"].detach()
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(3)) > 0.3 if masked else None

    def loss(x):
        return batch_norm(x, *stats, weight, activation="silu", mask=mask).square().sum()

    many = torch.stack([x.detach(), 2 * x.detach()])
    per_sample = torch.func.vmap(torch.func.grad(loss))(many)
    for one, gradient in zip(many, per_sample, strict=True):
        leaf = one.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e3 * torch.finfo(torch.float64).eps)

    def batch_loss(x):
        return batch_norm(x, None, None, weight, training=True, activation="silu", mask=mask).square().sum()

    leaf = x.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(batch_loss(leaf), leaf)
    got = torch.func.vmap(torch.func.grad(batch_loss))(many)[0]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e3 * torch.finfo(torch.float64).eps)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, in its forward-mode rules
def test_forward_mode_where_torch_has_it():
    x, state, _ = case()

    def f(x):
        return batch_norm(x, None, None, state["weight"].detach(), training=True, activation="tanh")

    value = x.detach()
    _, tangent = torch.func.jvp(f, (value,), (torch.ones_like(value),))
    assert (tangent.abs() <= 1e3 * torch.finfo(torch.float64).eps).all()  # a norm does not see a constant shift
