"""Text tokens by caption index, read from a safetensors file as they are needed."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from haste_core.errors import HasteError
from haste_core.files import atomic


class Contexts:
    """The text tokens of numbered captions, (captions + 1, L, width); the last row is the empty caption.

    Rows are read from the file as they are needed.

    Raises:
        HasteError: the file is missing or holds something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with safe_open(path, framework="pt") as stream:
                shape = stream.get_slice("contexts").get_shape()
            if len(shape) != 3 or shape[0] < 2:
                raise ValueError(f"tensor of shape {tuple(shape)}")
        except (SafetensorError, OSError, ValueError) as error:
            raise HasteError(
                f"data.contexts {path}: {' '.join(str(error).split())}; expected a safetensors file with a tensor "
                f"`contexts` (captions + 1, tokens, width), written by haste_core.study.data.contexts.write"
            ) from error
        self.captions, self.length, self.width = shape[0] - 1, shape[1], shape[2]

    def __call__(self, indices: Tensor) -> Tensor:
        """Text tokens (B, L, width) of caption indices (B,), on their device."""
        with safe_open(self.path, framework="pt") as stream:
            rows = stream.get_slice("contexts")
            return torch.cat([rows[i : i + 1] for i in indices.tolist()]).to(indices.device)


def write(path: Path, contexts: Tensor, empty: Tensor) -> None:
    """Write the text tokens of captions (n, L, width) and of the empty caption (L, width) to a safetensors file."""
    with atomic(path) as temporary:
        save_file({"contexts": torch.cat([contexts, empty[None]]).contiguous()}, temporary)
