"""What tells a tensor's values from all others, whatever its layout in memory."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from batchnorm.files.tensor_memory import bytes_of

__all__ = ["digest_of"]


def digest_of(tensor: Tensor) -> bytes:
    """Return a digest of a tensor's shape, dtype and bits; strides, memory format and device make no difference.

    NaN equals itself, and −0 is not 0. Tensors without bytes of their own that could be read (meta tensors, and wrapper
    subclasses such as a DTensor, of which each process holds another part) are told apart by shape and dtype only.

    >>> x = torch.arange(6.0).view(2, 3)
    >>> digest_of(x) == digest_of(x.t().contiguous().t())
    True
    """
    found = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    for part in _plain(tensor.detach()):
        found.update(memoryview(bytes_of(part.cpu()).numpy()))  # type: ignore[arg-type]
    return found.digest()


def _plain(tensor: Tensor) -> list[Tensor]:
    """Return dense tensors that hold everything of a tensor."""
    if tensor.is_meta or is_traceable_wrapper_subclass(tensor):
        return []
    if tensor.is_quantized:
        about = [torch.tensor([tensor.q_scale(), tensor.q_zero_point()], device="cpu")] if _per_tensor(tensor) else []
        if not about:
            about = [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
        return [tensor.int_repr(), *about]
    if tensor.layout == torch.sparse_coo:
        joined = tensor.coalesce()
        return [joined.indices(), *_plain(joined.values())]
    if tensor.layout != torch.strided:
        return _plain(tensor.to_dense())
    return [tensor]


def _per_tensor(tensor: Tensor) -> bool:
    return tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric)
