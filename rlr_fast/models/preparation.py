"""What a network does for inference once instead of per call, and whether that still holds.

Nothing tells of every change of a tensor, so a preparation remembers what it was made from: which
modules, parameters and buffers stood where, each tensor's memory and version, and the hooks. Where
any of these differs, the preparation does not hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def hooks(module: nn.Module) -> list[dict[int, Any]]:
    """Return the module's own tables of forward and backward hooks, empty or not."""
    return [getattr(module, name) for name in _HOOKS]


class Snapshot:
    """State of modules at one moment, to tell later whether it is still the same.

    It sees what was replaced, added or removed, and changes in place, except those that leave no
    trace: ``parameter.data.copy_(…)``, the step of a fused optimizer, and plain attributes.

    Args:
        modules: Their own parameters, buffers, children and hooks count, not those of children.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        self._tables: list[Any] = [
            table
            for module in modules
            for table in (module._parameters, module._buffers, module._modules, *hooks(module))
        ]
        self._lengths = list(map(len, self._tables))
        self._places = [
            (table, name, value) for table in self._tables for name, value in table.items()
        ]
        self._tensors = [value for _, _, value in self._places if isinstance(value, Tensor)]
        # Aliases hold the memory, so that nothing else can come to lie at its address.
        self._aliases = [tensor.detach() for tensor in self._tensors]
        self._versions = self._read_versions()

    def holds(self) -> bool:
        """Return whether nothing has changed since."""
        return (
            all(table.get(name) is value for table, name, value in self._places)
            and list(map(len, self._tables)) == self._lengths
            and self._read_versions() == self._versions
            and all(
                tensor.data_ptr() == alias.data_ptr()
                for tensor, alias in zip(self._tensors, self._aliases, strict=True)
            )
        )

    def _read_versions(self) -> list[int]:
        return [tensor._version for tensor in self._tensors]
