"""The weights of experts in a checkpoint, under the names that models and adapters give them.

A model of transformers 5 holds all experts of a layer as one weight, and an adapter is one of that.
Files hold them so too, or expert by expert, gate and up apart:

    M.gate_up_proj   (experts, 2 inner, hidden)     M.0.gate_proj.weight, M.0.up_proj.weight, ...
    M.down_proj      (experts, hidden, inner)       M.0.down_proj.weight, ...

Mixtral's files call the three w1, w3 and w2, and a part of M otherwise. A class may hold the
transposes of its stacked weights: gpt-oss does. No torch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from qkern.adapter_config import EXPERT_WEIGHTS
from qkern.checkpoint.source import Source, StoredTensor
from qkern.errors import AdapterMismatchError, CorruptFileError

_ONE: Final = re.compile(r"((?:.*\.)?experts)\.(\d+)\.(\w+)\.weight")
# Of an expert's matrix: the stacked weight, and the place among its parts, by rows.
_SLOTS: Final = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0),
    "w1": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
}
# What files call a part of a path that models call otherwise.
_RENAMED: Final = {".block_sparse_moe.": ".mlp."}


class Part(NamedTuple):
    """A tensor of a file, as a part of a stacked weight.

    Args:
        tensor: of the file.
        expert: whose it is; None if it is the whole stack.
        first: the first of its rows among the expert's.
    """

    tensor: StoredTensor
    expert: int | None = None
    first: int = 0


@dataclasses.dataclass(frozen=True)
class ExpertStack:
    """A weight of all experts of a layer.

    Args:
        name: in a model.
        parts: one that is the stack, or those of each expert in order.
        sizes: experts, and two more as a file with the stack has them; (experts, out, in) else.
        transposed: whether these are in and out; None if nothing in the file tells.
    """

    name: str
    parts: tuple[Part, ...]
    sizes: tuple[int, int, int]
    transposed: bool | None = False

    @property
    def tensors(self) -> list[StoredTensor]:
        """Of the file."""
        return [part.tensor for part in self.parts]

    def is_transposed(self, out_features: int, in_features: int) -> bool:
        """Whether the stack is (experts, in, out), for an adapter of these sizes.

        Raises:
            AdapterMismatchError: for other sizes, and if nothing tells.
        """
        straight = self.sizes[1:] == (out_features, in_features)
        turned = self.sizes[1:] == (in_features, out_features)
        if straight and turned and self.transposed is None:
            msg = (
                f"{self.name}: nothing in the file tells whether experts of "
                f"{out_features} x {in_features} are transposed: open it by qkern.load, and merge "
                "the model (load_adapter, merge_to_dense)"
            )
            raise AdapterMismatchError(msg)
        found = turned and not straight if self.transposed is None else self.transposed
        if not (turned if found else straight):
            msg = (
                f"{self.name}: the adapter is (out, in) = {(out_features, in_features)} for each "
                f"expert, the weight is {self.sizes}: is this the adapter's base model?"
            )
            raise AdapterMismatchError(msg)
        return found


def expert_stacks(base: Source) -> dict[str, ExpertStack]:
    """The weights of experts by their names in a model."""
    found = {stack.name: stack for stack in _stacked(base.tensors.values())}
    return found | {stack.name: stack for stack in _joined(base.tensors.values())}


def _stacked(tensors: Iterable[StoredTensor]) -> Iterable[ExpertStack]:
    """Those that files hold as models do."""
    known = {
        tensor.name: tensor
        for tensor in tensors
        if len(tensor.shape) == 3 and tensor.name.rpartition(".")[2] in EXPERT_WEIGHTS
    }
    for name, tensor in known.items():
        module = name.rpartition(".")[0]
        gate_up, down = known.get(f"{module}.gate_up_proj"), known.get(f"{module}.down_proj")
        transposed = None
        if gate_up is not None and down is not None:
            transposed = _are_transposed(gate_up.shape, down.shape)
        first, second, third = tensor.shape
        yield ExpertStack(name, (Part(tensor),), (first, second, third), transposed)


def _are_transposed(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool | None:
    """By their sizes, of which one is twice another; never are both ways right."""
    if gate_up[1:] == (2 * down[2], down[1]):
        return False
    return True if gate_up[1:] == (down[2], 2 * down[1]) else None


def _joined(tensors: Iterable[StoredTensor]) -> Iterable[ExpertStack]:
    """Those that files hold expert by expert."""
    found: dict[str, dict[tuple[int, int], StoredTensor]] = {}
    for tensor in tensors:
        one = _ONE.fullmatch(tensor.name)
        if one is None or one[3] not in _SLOTS or len(tensor.shape) != 2:
            continue
        weight, slot = _SLOTS[one[3]]
        name = f"{one[1]}.{weight}"
        for there, here in _RENAMED.items():
            name = name.replace(there, here)
        found.setdefault(name, {})[int(one[2]), slot] = tensor
    for name, by_place in found.items():
        experts = 1 + max(expert for expert, _ in by_place)
        slots = 2 if name.endswith(".gate_up_proj") else 1
        places = [(expert, slot) for expert in range(experts) for slot in range(slots)]
        missing = [place for place in places if place not in by_place]
        if missing:
            msg = f"{name}: the file lacks part {missing[0][1]} of expert {missing[0][0]}"
            raise CorruptFileError(msg)
        shapes = [[by_place[e, slot].shape for slot in range(slots)] for e in range(experts)]
        if any(shape != shapes[0] for shape in shapes) or len({s[1] for s in shapes[0]}) > 1:
            msg = f"{name}: its experts do not fit each other"
            raise CorruptFileError(msg)
        rows = [0, shapes[0][0][0]]
        parts = (Part(by_place[expert, slot], expert, rows[slot]) for expert, slot in places)
        size = (experts, sum(shape[0] for shape in shapes[0]), shapes[0][0][1])
        yield ExpertStack(name, tuple(parts), size)
