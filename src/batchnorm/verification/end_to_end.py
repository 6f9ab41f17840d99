r"""The end-to-end comparison of a rewritten model with the original, and the error that rounding allows it.

**In the model's own types.** The two models compute the same function with different roundings, so their outputs differ
by what rounding does to this network on these inputs. That is measured, on the original: every weight and statistic
that the rewrite touches is moved at random by one unit in its last place (at least the rounding of a merged weight; of
TF32 or bfloat16 where the device may compute float32 so), which draws all roundings after it anew. Let e₀ be the
greatest change of an output in :data:`NUDGES` = 4 such runs, u the unit roundoff of the output. The rewritten model may
differ by

.. math:: \mathrm{bound} = 8\,(e_0 + u \max|y|)

Its error is one more draw from the same three sources (its own rounding, the original's, that of the parameters). For
an output of one single number, normal errors, and without the second term, a fifth draw exceeds eight times the largest
of four with probability E[erf(\|X\|/8√2)⁴] ≈ 3·10⁻⁴; with more numbers, or that term, far less. A wrong rewrite is
wrong by far more than rounding: the silent bugs that this guards against were off by 1 to 17 where rounding is 10⁻⁶.

**In float64.** The same rewrite of a float64 copy must agree with that copy. To first order rounding errors scale with
u, so what is allowed is the bound above times 2⁹ v/u, v = 2⁻⁵³: the 2⁹ is for networks that amplify errors so much that
they saturate in the shorter type. For float32 this is a millionth of the bound above, which tells algebra from
rounding. A model that does not run in float64 (types named in its code) is not compared there; every site was, all the
same (:mod:`batchnorm.folding.proving.value_proof`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module

from batchnorm.dataflow.run import run
from batchnorm.errors import VerificationError
from batchnorm.files.tensor_memory import without_repeats
from batchnorm.models.outputs import NamedTensor, difference, scale_of

__all__ = ["Agreement", "ReferenceOutputs", "Runner", "spacing", "verify", "verify_float64"]

NUDGES = 4
_MARGIN = 8.0
_PATTERN = 65_537  # numbers; prime, so that it falls on other channels each time
_FLOAT64_SLACK = 2.0**9
_FLOAT64_ROUNDOFF = torch.finfo(torch.float64).eps / 2


Runner: TypeAlias = Callable[[Module, Any], list[NamedTensor]]


@dataclass(frozen=True)
class Agreement:
    """How well two models agree.

    Attributes:
        error: greatest absolute difference of their outputs.
        bound: what rounding allows, for the output in which the error is.
    """

    error: float
    bound: float


@dataclass(frozen=True)
class ReferenceOutputs:
    """The original's outputs, and how far one rounding of the touched parameters moves each of them."""

    outputs: list[NamedTensor]
    moved: list[float]

    @classmethod
    def of(cls, model: Module, example_inputs: Any, touched: Sequence[Tensor], run: Runner = run) -> ReferenceOutputs:
        """Run ``model`` as it is, then with the touched tensors nudged; they are put back."""
        outputs = run(model, example_inputs)
        moved = [0.0] * len(outputs)
        generator = torch.Generator().manual_seed(0)
        for _ in range(NUDGES):
            with _nudged(touched, generator):
                again = run(model, example_inputs)
            if [o.where for o in again] != [o.where for o in outputs]:
                moved = [float("inf")] * len(outputs)
                break
            moved = [max(m, difference(a.tensor, b.tensor).largest)
                     for m, a, b in zip(moved, outputs, again, strict=True)]  # fmt: skip
        return cls(outputs, moved)

    def bounds(self) -> list[float]:
        """Return the bound of each output: 8(e₀ + u·max|y|); for whole numbers, what the nudges changed."""
        return [
            _MARGIN * (moved + _roundoff(output.tensor) * scale_of(output.tensor)) if output.is_float else moved
            for output, moved in zip(self.outputs, self.moved, strict=True)
        ]


def _roundoff(tensor: Tensor) -> float:
    return float(torch.finfo(tensor.dtype).eps) / 2


def spacing(tensor: Tensor) -> float:
    """Return the spacing at 1 of the numbers that convolutions and matrix products make of the tensor's elements."""
    stored = float(torch.finfo(tensor.dtype).eps)
    if tensor.dtype != torch.float32:
        return stored
    backends: Any = torch.backends  # whose settings are set at run time
    if tensor.device.type == "cuda":
        allowed = {
            backends.cudnn.conv.fp32_precision,
            backends.cuda.matmul.fp32_precision,
            backends.cudnn.fp32_precision,
        }
    else:
        of_cpu = backends.mkldnn
        allowed = {of_cpu.conv.fp32_precision, of_cpu.matmul.fp32_precision, of_cpu.fp32_precision}
    allowed.add(backends.fp32_precision)
    return max([stored, *(_SPACING_OF[name] for name in allowed if name in _SPACING_OF)])


_SPACING_OF = {"tf32": 2.0**-10, "bf16": 2.0**-7}


@contextmanager
def _nudged(tensors: Sequence[Tensor], generator: torch.Generator) -> Iterator[None]:
    """Multiply every element by 1 − ε, 1 or 1 + ε at random, ε the spacing of its type at 1; put all back after."""
    tensors = [without_repeats(tensor.detach()) for tensor in tensors]
    kept = [tensor.clone() for tensor in tensors]
    with torch.no_grad():
        try:
            for tensor in tensors:
                # a pattern that is repeated is random enough, and drawn a thousand times sooner
                length = max(1, min(_PATTERN, tensor.numel()))
                pattern = torch.randint(-1, 2, (length,), generator=generator, device="cpu")
                repeats = -(-tensor.numel() // length)
                wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
                factors = 1 + pattern.to(tensor.device, wide) * spacing(tensor)
                factors = factors.repeat(repeats)[: tensor.numel()].reshape(tensor.shape)
                tensor.copy_(factors.mul_(tensor))
            yield
        finally:
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)


def verify(reference: ReferenceOutputs, outputs: list[NamedTensor]) -> Agreement:
    """Compare a rewritten model's outputs with the reference.

    Raises:
        VerificationError: an output differs by more than its bound, or nothing could be compared.
    """
    return _compare(reference.outputs, outputs, reference.bounds(), "")


def verify_float64(
    before: list[NamedTensor], after: list[NamedTensor], reference: ReferenceOutputs, roundoff: float
) -> Agreement | None:
    """Compare what a float64 copy of the original returns with what it returns after the same rewrite.

    None where it does not return the same things as the original, so that there is nothing to compare it with.

    Args:
        before: what the copy returns for the inputs that the reference was made on.
        after: what it returns after the rewrite.
        reference: of the original in its own types.
        roundoff: the unit roundoff of the original's parameters.

    Raises:
        VerificationError: they differ by more than rounding in float64 explains.
    """
    if [o.where for o in before] != [o.where for o in reference.outputs]:
        return None
    scaled = _FLOAT64_SLACK * _FLOAT64_ROUNDOFF
    bounds = [
        bound * scaled / max(roundoff, _roundoff(output.tensor)) if output.is_float else bound
        for bound, output in zip(reference.bounds(), reference.outputs, strict=True)
    ]
    return _compare(before, after, bounds, " in float64")


def _compare(before: list[NamedTensor], after: list[NamedTensor], bounds: Sequence[float], where: str) -> Agreement:
    if [o.where for o in before] != [o.where for o in after]:
        raise VerificationError(
            f"The folded model returns {len(after)} tensors and the original {len(before)}{where}, differently nested. "
            "The folded model is not returned and the original is unchanged."
        )
    worst, compared = Agreement(0.0, 0.0), 0
    for old, new, bound in zip(before, after, bounds, strict=True):
        gap = difference(old.tensor, new.tensor)
        if not gap.largest <= bound < float("inf"):
            raise VerificationError(
                f"Output {old.where or '(the only one)'} of the folded model differs from the original's by "
                f"{gap.largest:.3g}{where}; rounding explains at most {bound:.3g}. The folded model is not returned "
                "and the original is unchanged. If the model's output is not determined by its inputs (random numbers, "
                "a counter, a clock), make it so and fold again."
            )
        compared += gap.compared
        if old.is_float and gap.largest >= worst.error:
            worst = Agreement(gap.largest, bound)
    if not before:
        raise VerificationError(
            f"The model returns no tensor on the example inputs{where}, so that nothing can be verified. Let its "
            "forward return what it computes. The original is unchanged."
        )
    if not compared:
        raise VerificationError(
            f"The model returns no finite number on the example inputs{where}, so that nothing can be verified. Give "
            "inputs on which it does, and look for NaN in its parameters and statistics. The original is unchanged."
        )
    return worst
