import pytest

from batchnorm.monitor.student import critical_t

scipy_stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("degrees", [7, 15, 40, 1000])
@pytest.mark.parametrize("level", [0.05, 0.01, 1e-3, 1e-4])
def test_is_near_the_exact_value_as_documented(degrees: int, level: float) -> None:
    exact = scipy_stats.t.isf(level, degrees)
    assert critical_t(level, degrees) / exact - 1 <= (0.002 if degrees >= 15 else 0.013)


@pytest.mark.parametrize("degrees", [1, 2, 3, 5, 7, 15, 40, 1000])
@pytest.mark.parametrize("level", [0.05, 0.01, 1e-4, 1e-8])
def test_is_never_below_the_exact_value(degrees: int, level: float) -> None:
    # 1e-4: at many degrees of freedom approximation and exact value agree to that many digits
    assert critical_t(level, degrees) >= scipy_stats.t.isf(level, degrees) * (1 - 1e-4)
