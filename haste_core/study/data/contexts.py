"""Text tokens by caption index, read from a safetensors file as they are needed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from haste_core.errors import HasteError
from haste_core.files import atomic

# Files up to this many bytes are kept in memory.
KEPT = 2**28
_NAMES = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}


class Contexts:
    """The text tokens of numbered captions, (captions + 1, L, width); the last row is the empty caption.

    Rows of a large file are read as they are needed.

    Attributes:
        facts: encoder and hash of the captions, where `haste contexts` wrote the file.

    Raises:
        HasteError: the file is missing or holds something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._kept: Tensor | None = None
        try:
            with safe_open(path, framework="pt") as stream:
                shape = stream.get_slice("contexts").get_shape()
                self.facts: dict[str, str] = stream.metadata() or {}
                if len(shape) != 3 or shape[0] < 2:
                    raise ValueError(f"tensor of shape {tuple(shape)}")
                if self.path.stat().st_size <= KEPT:
                    self._kept = stream.get_tensor("contexts")
        except (SafetensorError, OSError, ValueError) as error:
            raise HasteError(
                f"data.contexts {path}: {' '.join(str(error).split())}; expected a safetensors file with a tensor "
                f"`contexts` (captions + 1, tokens, width), written by haste contexts"
            ) from error
        self.captions, self.length, self.width = shape[0] - 1, shape[1], shape[2]

    def __deepcopy__(self, memo: object) -> Contexts:
        return self  # it never changes, and an averaged generator reads the same rows

    def __call__(self, indices: Tensor) -> Tensor:
        """Text tokens (B, L, width) of caption indices (B,), on their device."""
        if self._kept is not None:
            return self._kept[indices.cpu()].to(indices.device)
        with safe_open(self.path, framework="pt") as stream:
            rows = stream.get_slice("contexts")
            return torch.cat([rows[i : i + 1] for i in indices.tolist()]).to(indices.device)


def write(path: Path, contexts: Tensor, empty: Tensor) -> None:
    """Write the text tokens of captions (n, L, width) and of the empty caption (L, width) to a safetensors file."""
    write_parts(path, [contexts, empty[None]], len(contexts) + 1)


def write_parts(path: Path, parts: Iterable[Tensor], count: int, facts: dict[str, str] | None = None) -> None:
    """Write text tokens (n, L, width) that come in parts, `count` rows in all, the last one of the empty caption.

    The file may be larger than memory. facts: of the file's metadata.
    """
    written = 0
    with atomic(path) as temporary, temporary.open("wb") as stream:
        for part in parts:
            if not written:
                shape, size = [count, *part.shape[1:]], count * part[0].nbytes
                entry = {"dtype": _NAMES[part.dtype], "shape": shape, "data_offsets": [0, size]}
                header = json.dumps({"__metadata__": facts or {}, "contexts": entry}).encode()
                header += b" " * (-len(header) % 8)
                stream.write(len(header).to_bytes(8, "little") + header)
            stream.write(part.contiguous().view(torch.uint8).numpy().tobytes())
            written += len(part)
    if written != count:
        raise ValueError(f"{written} rows of text tokens; expected {count}")
