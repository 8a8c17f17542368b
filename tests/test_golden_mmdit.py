"""MM-DiT's forward pass against numbers of the reference implementation (tests/golden/README.md)."""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from haste_core.alignment import attention_logits, projector
from haste_core.models import MMDiT
from haste_core.released import load_reference
from haste_core.taps import Taps

FILE = Path(__file__).parent / "golden" / "mmdit_a.safetensors"
EXACT = {"atol": 2e-5, "rtol": 1e-4}
SIZES = {
    "image_size": 32, "channels": 4, "classes": 1, "depth": 4, "width": 128, "heads": 4, "patch": 2,
    "context_width": 768,
}  # fmt: skip


def fill(name, shape, std):
    drawn = np.random.RandomState(crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(drawn.astype(np.float32) * np.float32(std))


def filled(module, prefix):
    return {f"{prefix}{n}": fill(f"mmdit-a.{prefix}{n}", v.shape, 0.05) for n, v in module.state_dict().items()}


def state_dicts():
    """The reference's state dict, and its projector's: every tensor by the rule, positions as they are."""
    mmdit = MMDiT(**SIZES)
    weights = filled(mmdit, "") | {"pos_embed": mmdit.pos_embed}
    return weights, filled(projector(128, 64, 16, seed=0), "projectors.0.")


@pytest.fixture(scope="module", params=["built here", "read from a file"])
def reference(request, tmp_path_factory):
    """The generator and its projector."""
    weights, projected = state_dicts()
    if request.param == "built here":
        mmdit, made = MMDiT(**SIZES), projector(128, 64, 16, seed=0)
        mmdit.load_state_dict(weights)
        made.load_state_dict({name.removeprefix("projectors.0."): value for name, value in projected.items()})
        return mmdit.eval(), made
    path = tmp_path_factory.mktemp("mmdit") / "mmdit.pt"
    torch.save(weights | projected, path)
    generator, (only,) = load_reference(path, family="mmdit")
    return generator, only


@torch.no_grad()
def test_velocity_projected_tokens_and_logits_of_the_image_tokens(reference):
    golden, (model, projected) = load_file(FILE), reference
    context = fill("mmdit-a.forward.context", (2, 77, 768), 1)
    tapped = model(golden["forward.x"], golden["forward.t"], context, Taps(depths=(3,), blocks=(1,)))
    assert golden["forward.velocity"].std() > 0.1
    assert_close(tapped.output, golden["forward.velocity"], **EXACT)
    assert_close(projected(tapped.tokens[3]), golden["forward.projected"], **EXACT)
    logits = attention_logits(*tapped.qk[1])[:, :, :4]
    assert_close(logits, golden["forward.image_attention_logits_block1_first_query_rows"], **EXACT)
