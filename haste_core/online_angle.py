"""The angle between denoising and alignment gradients, read off an ordinary phase I step: no pass of its own.

Not in the paper, whose check takes a backward pass per loss (Eq. 2; Tables 9, 10, arXiv 2505.16792). Here the angle is
taken at activations instead of parameters: the part of the gradient that comes back through the alignment loss alone
is caught on an alias of the tensor, the whole gradient on the tensor itself, and their difference is the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haste_core.errors import HasteError
from haste_core.taps import QK, Seen

LOSSES = ("feature", "attention")
# Noise levels; the first bin is "near data" of Fig. 4, arXiv 2505.16792.
EDGES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


class OnlineAngle:
    """Sums, over training steps, of products between the gradients of alignment and of the rest of the loss.

    Use: compute the alignment losses on `watch(seen, t)` instead of `seen`; `read` from time to time, and `reset`.
    No number of the step changes, and only `read` waits for the device.

    Own part: "feature", at the tokens of the aligned depth, the gradient through projector and feature loss;
    "attention", at q and k of all aligned blocks together, the gradient of the attention loss read there.

    The rest is everything that reaches the same tensor from above it: the denoising loss, and with it other alignment
    losses read further up. At the tokens of depth d (from 1) these are the attention losses of blocks >= d (from 0). At
    q and k of block b they are the feature loss where b < d, and the attention losses of blocks > b. Losses read below
    never are part of it. So the rest is the denoising loss alone for the feature loss where no aligned block lies
    at or above d (the paper's sizes), and for attention where features are not aligned and one block is.

    The cosine is over all samples, tokens and widths of a bin at once, products of a sample with itself only; heads
    that are not aligned count in the rest. Under autocast q and k, and so their gradients, have half precision.
    Samples whose gradient is not finite (a step that loss scaling skips) are not counted.

    Args:
        device: of the training step.
        edges: of the bins of noise levels, ascending; values outside fall into the outermost bins.
        processes: how many train together. Each one's loss is a mean over its own samples, so its gradients are so many
            times longer; sums are kept in units in which their mean over processes is what one alone would have.
    """

    def __init__(self, device: torch.device | str = "cpu", edges: Sequence[float] = EDGES, processes: int = 1) -> None:
        self.units = torch.tensor([1 / processes] * 3 + [processes], dtype=torch.float64, device=device)
        self.edges = torch.tensor(edges, dtype=torch.float32, device=device)
        # own * rest, own^2, rest^2, samples; a long run adds up more samples than float32 can count.
        self.sums = torch.zeros(len(LOSSES), len(edges) - 1, 4, dtype=torch.float64, device=device)

    def watch(self, seen: Seen, t: Tensor) -> Seen:
        """The same values, as aliases for the alignment losses; the backward pass of this step is summed up.

        Args:
            seen: tokens, q and k of the student.
            t: (B,) noise levels in [0, 1], before `Objective.timesteps`.
        """
        bins = torch.bucketize(t.to(self.edges), self.edges[1:-1], right=True)
        member = bins[:, None] == torch.arange(len(self.edges) - 1, device=bins.device)  # (B, bins)
        tokens = {d: self._alias(h, 0, member, counts=i == 0) for i, (d, h) in enumerate(seen.tokens.items())}
        qk: dict[int, QK] = {}
        for i, (block, (q, k)) in enumerate(seen.qk.items()):
            # A sample counts once, however many tensors it is watched at.
            qk[block] = self._alias(q, 1, member, counts=i == 0), self._alias(k, 1, member, counts=False)
        return Seen(tokens, qk)

    def _alias(self, tensor: Tensor, loss: int, member: Tensor, counts: bool) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        own: list[Tensor] = []

        def keep(gradient: Tensor) -> None:
            own.append(gradient)

        def add(total: Tensor) -> None:
            # Nothing was kept where no loss read the alias.
            if own:
                self._add(loss, member, own.pop(), total, counts)

        alias = tensor.view_as(tensor)
        alias.register_hook(keep)
        tensor.register_hook(add)
        return alias

    @torch.no_grad()
    def _add(self, loss: int, member: Tensor, own: Tensor, total: Tensor, counts: bool) -> None:
        own, total = own.float().flatten(1), total.float().flatten(1)
        rest = total - own
        count = torch.full((len(own),), float(counts), device=own.device)
        parts = torch.stack([(own * rest).sum(1), own.square().sum(1), rest.square().sum(1), count], dim=1)
        parts = torch.where(parts.isfinite().all(1, keepdim=True), parts, 0.0).double() * self.units
        # Not index_add_, whose order of additions a GPU does not fix.
        self.sums[loss] += (member[:, :, None] * parts[:, None, :]).sum(0)

    def read(self) -> list[dict[str, Any]]:
        """Sums since the last `reset` as cosines; the only method that waits for the device.

        Returns:
            A row per bin of every loss that was seen: loss; bin, from 0; t_low, t_high; cosine, in [-1, 1], NaN for an
            empty bin; norm_ratio, length of the own part over that of the rest; count, samples.
        """
        edges = [round(edge, 6) for edge in self.edges.tolist()]
        rows = []
        for loss, sums in zip(LOSSES, self.sums.cpu().numpy(), strict=True):
            if not sums.any():
                continue
            with np.errstate(invalid="ignore", divide="ignore"):
                cosines, ratios = sums[:, 0] / np.sqrt(sums[:, 1] * sums[:, 2]), np.sqrt(sums[:, 1] / sums[:, 2])
            for i, (cosine, ratio) in enumerate(zip(cosines, ratios, strict=True)):
                facts = {"loss": loss, "bin": i, "t_low": edges[i], "t_high": edges[i + 1], "cosine": float(cosine)}
                rows.append(facts | {"norm_ratio": float(ratio), "count": round(float(sums[i, 3]))})
        return rows

    def summary(self) -> dict[str, Any]:
        """`online`: cosines by loss and bin (None: empty bin); `online_angle`: their mean. Empty before any sample."""
        rows = self.read()
        cosines = np.array([row["cosine"] for row in rows])
        known = ~np.isnan(cosines)
        if not known.any():
            return {}
        bins: dict[str, list[float | None]] = {}
        for row in rows:
            bins.setdefault(row["loss"], []).append(None if np.isnan(row["cosine"]) else row["cosine"])
        return {"online": bins, "online_angle": float(np.where(known, cosines, 0).sum() / known.sum())}

    def reset(self) -> None:
        """Begin again from nothing."""
        self.sums.zero_()

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the sums to where `fn` moves tensors; they stay float64."""
        device = fn(torch.zeros((), device=self.sums.device)).device
        self.sums, self.units, self.edges = (part.to(device) for part in (self.sums, self.units, self.edges))

    def state_dict(self) -> dict[str, Tensor]:
        """Sums and edges of the bins."""
        return {"sums": self.sums.clone(), "edges": self.edges.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what was saved.

        Raises:
            HasteError: it was summed up in other bins.
        """
        saved = state["edges"].tolist()
        if saved != self.edges.tolist():
            raise HasteError(f"online angles were saved in bins {saved}; expected {self.edges.tolist()}")
        self.sums.copy_(state["sums"])
