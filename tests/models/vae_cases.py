"""Small VAEs, and a measure of the memory that a call takes."""

from __future__ import annotations

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xicon_infer.models.vae import VAEConfig, WanVAE
from xicon_infer.ops import vae_kernels

TINY = VAEConfig(dim=4, z_dim=4)


def tiny_vae(config=TINY, *, dtype=torch.float32, fast=False, seed=0, **kwargs) -> WanVAE:
    """A VAE with random weights and random gains; the seed fixes them whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)
    vae = WanVAE(config, fast=fast, **kwargs)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma"):
                parameter.copy_(1 + 0.2 * values)
            elif name.endswith("weight"):
                parameter.copy_(values / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * values)
    return vae.to(dtype).eval()


def noise(*shape, dtype=torch.float32, seed=1) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.clamp(-1, 1).to(dtype)


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that live at once, and the calls of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.live:
            return
        self.live[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.live.pop(key)


class CudnnLayout(Meter):
    """A meter under which convolutions lay out their results as cuDNN does, also on a CPU.

    PyTorch asks cuDNN for channels last in memory where input or weight have them so, and copies
    what has not. The CPU's own kernels mostly ignore the layout of videos.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.overloadpacket.__name__ != "convolution":
            return out
        last = torch.channels_last if out.ndim == 4 else torch.channels_last_3d
        given = [x.is_contiguous(memory_format=last) for x in args[:2]]
        self.calls["converted"] += any(given) and not all(given)
        return out.contiguous(memory_format=last) if any(given) else out.contiguous()


class PlainKernels:
    """In place of `ops.vae_triton`: the operators are there to be counted, their work is plain."""

    @staticmethod
    def fill_window(x, gain, bias, kept, window):
        vae_kernels.fill_window(x, gain, bias, kept, window, fused=False)

    @staticmethod
    def add_bias(y, bias, other):
        vae_kernels.add_bias(y, bias, other, fused=False)

    @staticmethod
    def interleave(pairs, bias, out):
        vae_kernels.interleave(pairs, bias, out, fused=False)
