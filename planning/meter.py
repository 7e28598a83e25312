"""What code holds in memory and how long it takes, found by running it on tensors that have shapes
and no values.

Nothing here knows a formula for activations: a `Meter` sees every operator that real code calls on
torch's meta device. A storage counts from its first tensor to its last, so that what autograd keeps
counts for as long as it is kept. The workspaces of libraries within a product can't be seen.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet, finalize

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from .speed import Speed

aten = torch.ops.aten
MEASURED = "activations, gradients"


@dataclass
class Phase:
    """A part of a run: bytes by purpose when it holds the most, and seconds."""

    memory: Counter[str]
    seconds: float = 0.0


class Meter(TorchDispatchMode):
    """Keeps account of the storages that are alive, those of the tensors `outside` excepted, and of
    time.

    Floating-point tensors lose their values here. Ids, masks and positions keep theirs, because
    they decide shapes; but where an operator meets a tensor without values, so is its result.
    """

    def __init__(self, speed: Speed, outside: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._speed = speed
        self._storages = WeakSet(tensor.untyped_storage() for tensor in outside)
        self._alive = 0
        self._phase = Phase(Counter())

    @contextmanager
    def phase(self) -> Iterator[Phase]:
        """What happens within is a phase; what is alive before it counts."""
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
        if func is not aten.embedding.default and not func.is_view:  # it reads few of its rows
            size = sum(tensor.nbytes for tensor in inputs + outputs)
            self._phase.seconds += self._speed.seconds(_flops(func, args, kwargs, out), size)
        return out

    def call(self, func: Any, inputs: list[Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        """The operator's result, without values where they are not known or not wanted."""
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
    if func.name().startswith("aten::_scaled_dot_product"):  # queries and gradients are of one size
        operations = 10 if "backward" in func.name() else 4  # five products backward, two forward
        return operations * args[0].numel() * args[2].shape[-2]
    formula = flop_registry.get(func.overloadpacket)
    return formula(*args, **kwargs, out_val=out) if formula else 0


def fused_attention() -> torch.library.Library:
    """While what is returned lives, attention on the meta device holds what the kernels of real
    devices hold; without it, it would keep all scores.
    """
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", _attention, "AutogradMeta")
    return library


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: object,  # scale, and enable_gqa: this kernel takes grouped queries in any case
) -> Tensor:
    attend = aten._scaled_dot_product_flash_attention_for_cpu
    return attend(q, k, v, dropout_p, is_causal, attn_mask=attn_mask)[0]
