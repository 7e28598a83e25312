"""What code holds in memory and computes, found by running it on tensors that have shapes and no
values.

Nothing here knows a formula for activations: a `Meter` sees every operator that real code calls on
torch's meta device. Floating-point numbers are never made; ids, masks and positions are, because
they decide shapes. The meter counts a storage from its first tensor to its last, so that what
autograd keeps counts for as long as it is kept. What it can't see are the workspaces of libraries
within a product.
"""

import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

ACTIVATIONS = "activations"
"""What is made for no purpose that is named."""

_PICKING = {
    aten.embedding.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
}
"""Operators that read only as much of their first argument as they give back."""


class Work(NamedTuple):
    """What an operator does: floating-point operations of products, and bytes that it reads and
    writes.
    """

    flops: int
    bytes: int


@dataclass
class Phase:
    """A part of a run: what its operators do, and bytes by purpose when it holds the most, here and
    elsewhere.
    """

    here: Counter[str] = field(default_factory=Counter)
    elsewhere: Counter[str] = field(default_factory=Counter)
    work: list[Work] = field(default_factory=list)


class Meter(TorchDispatchMode):
    """Keeps account of the storages that are alive, and of work. `phases` are those that `phase`
    has opened, by name.

    Storages for the purposes `elsewhere` lie in another memory than all others.

    Where an operator meets a tensor without values, all that it is given is taken to be without;
    whatever device is asked for, floating-point tensors are made without values.
    """

    def __init__(self, elsewhere: Collection[str] = ()) -> None:
        super().__init__()
        self.phases: dict[str, Phase] = {}
        self._elsewhere = elsewhere
        self._purpose = ACTIVATIONS
        self._purposes: dict[int, str] = {}  # of every storage that ever was, by number
        self._numbers: dict[int, int] = {}  # storage's address -> number
        self._watches: dict[int, weakref.ref] = {}
        self.changes: list[
            tuple[int, int]
        ] = []  # storage's number, bytes; 0 bytes where it is freed
        self._work: list[Work] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """What happens within is a phase of its own; what is alive before it counts."""
        phase, start = Phase(), len(self.changes)
        self._work = phase.work
        self.phases[name] = phase
        yield phase
        phase.here, phase.elsewhere = (
            self._fullest(start, elsewhere) for elsewhere in (False, True)
        )

    @contextmanager
    def making(self, purpose: str) -> Iterator[None]:
        """What is made within is for `purpose`."""
        before, self._purpose = self._purpose, purpose
        yield
        self._purpose = before

    def assign(self, purpose: str, tensors: Iterable[Tensor | None]) -> None:
        """These tensors are for `purpose`, whenever they were made."""
        for tensor in tensors:
            if tensor is not None:
                self._purposes[self._number(tensor)] = purpose

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = self.call(func, args, kwargs)
        given, made = (
            [x for x in tree_leaves(found) if isinstance(x, Tensor)]
            for found in ((args, kwargs), out)
        )
        for tensor in made:
            self._number(tensor)
        if not func.is_view:
            touched = made * 2 if func in _PICKING else given + made
            self._work.append(Work(_flops(func, args, kwargs, out), sum(x.nbytes for x in touched)))
        return out

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operator's result, without values where they are not known or not wanted."""
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        unknown = any(x.is_meta for x in given)
        if unknown and func is aten._local_scalar_dense.default:
            return 1  # a number nobody knows
        if unknown:
            args, kwargs = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
        if "device" not in kwargs or (given and not unknown):
            return func(*args, **kwargs)
        out = func(*args, **kwargs | {"device": torch.device("meta")})
        return out if unknown or out.is_floating_point() else func(*args, **kwargs)

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._numbers:
            number = len(self._purposes)
            self._numbers[address], self._purposes[number] = number, self._purpose
            self.changes.append((number, storage.nbytes()))
            self._watches[number] = weakref.ref(storage, lambda _: self._freed(address, number))
        return self._numbers[address]

    def _freed(self, address: int, number: int) -> None:
        del self._numbers[address], self._watches[number]
        self.changes.append((number, 0))

    def _fullest(self, start: int, elsewhere: bool) -> Counter[str]:
        """Bytes by purpose, in one of the two memories, at the fullest moment since so many
        changes.
        """
        now: Counter[str] = Counter()
        sizes: dict[int, int] = {}
        fullest: Counter[str] = Counter()
        for place, (number, size) in enumerate([*self.changes, (-1, 0)]):
            if place == start or (place > start and now.total() > fullest.total()):
                fullest = Counter(now)
            purpose = self._purposes.get(number)
            if number >= 0 and (purpose in self._elsewhere) == elsewhere:
                now[purpose] += size - sizes.get(number, 0)
                sizes[number] = size
        return +fullest


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    if func in _ATTENTION:
        q, k = args[_ATTENTION[func][0]], args[_ATTENTION[func][0] + 1]
        return _ATTENTION[func][1] * q.numel() * k.shape[-2]
    count = flop_registry.get(func._overloadpacket)
    return count(*args, **kwargs, out_val=out) if count else 0


_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: (0, 4),  # two products forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (1, 10),  # five backward
}
"""Fused attention -> where its queries stand among the arguments, and operations for each query's
number and key.
"""


@contextmanager
def fused_kernels(gpu: bool) -> Iterator[None]:
    """Within, attention and RMSNorm hold what the device's kernels hold: on the meta device
    attention would keep all scores, and RMSNorm fp32 copies that a GPU's kernel does without.

    They are replaced by name, because torch's function modes are off in what backward computes
    anew.
    """
    attention, norm = F.scaled_dot_product_attention, F.rms_norm
    F.scaled_dot_product_attention = _fused_attention
    if gpu:  # LayerNorm keeps its input and two numbers a row, RMSNorm its input and one
        F.rms_norm = lambda x, shape, weight, eps: F.layer_norm(x, shape, weight, None, eps)
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm = attention, norm


def _fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> Tensor:
    return aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, attn_mask=attn_mask
    )[0]
