"""Estimates the memory and time of code by running it on meta tensors (shapes without values).

There are no formulas for activations: a `Meter` intercepts every operator of the real code on
torch's meta device. A storage counts from the creation of its first tensor to the deletion of its
last, so tensors saved by autograd count for as long as they are kept. Workspaces that libraries
allocate inside a matrix product are not visible.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet, finalize

import torch
from torch import Tensor, UntypedStorage, library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from .speed import Speed

aten = torch.ops.aten
MEASURED = "activations, gradients"


@dataclass
class Phase:
    """A part of a run: its peak memory (bytes by purpose) and its duration."""

    memory: Counter[str]
    seconds: float = 0.0


class Meter(TorchDispatchMode):
    """Tracks the live storages, except those of the tensors `outside`, and estimates the time.

    Floating-point tensors lose their values. Ids, masks and positions keep theirs, because shapes
    depend on them; but if an operator has any input without values, its result has none either.
    """

    def __init__(self, speed: Speed, outside: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._speed = speed
        self._storages = WeakSet(tensor.untyped_storage() for tensor in outside)
        self._alive = 0
        self._phase = Phase(Counter())

    @contextmanager
    def phase(self) -> Iterator[Phase]:
        """Measure the enclosed code as one phase. Storages that are already alive count too."""
        self._phase = Phase(Counter({MEASURED: self._alive}))
        with self:
            yield self._phase

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        out = self.call(func, inputs, args, kwargs)
        outputs = _tensors(out)
        for tensor in outputs:
            self._count(tensor.untyped_storage())
        # Views move no data, and an embedding reads only a few of its rows.
        if func is not aten.embedding.default and not func.is_view:
            size = sum(tensor.nbytes for tensor in inputs + outputs)
            self._phase.seconds += self._speed.seconds(_flops(func, args, kwargs, out), size)
        return out

    def call(self, func: Any, inputs: list[Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        """The operator's result, without values if it is floating-point or an input has none."""
        if not any(tensor.is_meta for tensor in inputs):
            out = func(*args, **kwargs)
            return out.to("meta") if isinstance(out, Tensor) and out.is_floating_point() else out
        if "device" in kwargs:
            kwargs = kwargs | {"device": torch.device("meta")}
        args, kwargs = tree_map_only(Tensor, _without_values, (args, kwargs))
        return func(*args, **kwargs)

    def _count(self, storage: UntypedStorage) -> None:
        if storage not in self._storages:
            self._storages.add(storage)
            self._change(storage.nbytes())
            finalize(storage, self._change, -storage.nbytes())

    def _change(self, size: int) -> None:
        self._alive += size
        memory = self._phase.memory
        memory[MEASURED] = max(memory[MEASURED], self._alive)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _without_values(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def _flops(func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    if func.name().startswith("aten::_scaled_dot_product"):
        # Two matrix products forward, five backward; queries and gradients have the same size.
        operations = 10 if "backward" in func.name() else 4
        return operations * args[0].numel() * args[2].shape[-2]
    formula = flop_registry.get(func.overloadpacket)
    return formula(*args, **kwargs, out_val=out) if formula else 0


def fused_attention() -> library.Library:
    """Make attention on the meta device use as much memory as a fused kernel on real devices.

    Otherwise it would store all attention scores. In effect until the returned object is deleted.
    """
    kernels = library.Library("aten", "IMPL")
    kernels.impl("scaled_dot_product_attention", _attention, "AutogradMeta")
    return kernels


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: object,  # scale, and enable_gqa: this kernel always supports grouped queries
) -> Tensor:
    attend = aten._scaled_dot_product_flash_attention_for_cpu
    return attend(q, k, v, dropout_p, is_causal, attn_mask=attn_mask)[0]
