"""A copy of a training's tensors in memory that is used again, laid out as the bytes of a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mae_core.sealed import Entry, write_flushed

PIECE = 1 << 22
"""Bytes that are hashed and written at a time; both let the training's thread run meanwhile."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the format."""

Whole = Callable[[Tensor], Tensor]
"""Gives all of a tensor of which every process may hold a part; all processes call it for the same tensors in the same order."""

Layout = list[tuple[str, torch.dtype, torch.Size]]


class Snapshot:
    """Tensors as they were at one moment.

    The bytes of the file stand in memory in one piece, so that nothing is copied again on the way to disk. Safetensors' own
    `save_file` makes a second copy and holds the interpreter, so that training would stand still while it writes.

    Args:
        pinned: Page-locked memory, which a GPU copies to while it computes.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self.pinned = pinned
        self.num_bytes = 0
        self._layout: Layout = []
        self._header = b""
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._places: dict[str, Tensor] = {}

    def take(self, tensors: Mapping[str, Tensor], whole: Whole) -> None:
        """Copy tensors; from a GPU the copy is under way when this returns, and in line before whatever it is told to do next.

        Raises:
            ValueError: A tensor is of a dtype that the format does not have.
        """
        self._make_room(tensors)
        for name, tensor in tensors.items():
            self._places[name].copy_(whole(tensor.detach()), non_blocking=self.pinned)

    def write(self, path: Path) -> Entry:
        """Write them as a safetensors file and flush it; its entry in a manifest."""
        return write_flushed(path, self._pieces())

    def _pieces(self) -> Iterator[bytes | memoryview]:
        yield self._header
        array = self._bytes.numpy().data
        for start in range(0, len(array), PIECE):
            yield array[start : start + PIECE]

    def _make_room(self, tensors: Mapping[str, Tensor]) -> None:
        """Lay the file out, unless it is laid out for such tensors already: wide dtypes first, so that all are aligned."""
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{name} is of {tensor.dtype}, which no checkpoint holds; it holds {', '.join(DTYPES.values())}")
        layout = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
        if self._header and layout == self._layout:
            return
        entries, start = {}, 0
        for name, dtype, shape in sorted(layout, key=lambda item: (-item[1].itemsize, item[0])):
            end = start + shape.numel() * dtype.itemsize
            entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._bytes = torch.empty(start, dtype=torch.uint8, pin_memory=self.pinned)
        self._places = {}
        for name, dtype, shape in layout:
            first, last = entries[name]["data_offsets"]
            self._places[name] = self._bytes[first:last].view(dtype).view(shape)
        self._header, self._layout = len(text).to_bytes(8, "little") + text, layout
        self.num_bytes = len(self._header) + start
