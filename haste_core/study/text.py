"""Text tokens of captions from a frozen encoder, prepared once: word embeddings of `wordllama`, or a CLIP.

Each row of the file is one caption, padded to a fixed length; the last row is the empty caption, the null label.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm.auto import tqdm

from haste_core.devices import default_device
from haste_core.errors import HasteError, number_of, one_line
from haste_core.files import atomic, locked, output_root, package_file
from haste_core.study import config
from haste_core.study.data import open_dataset
from haste_core.study.data.base import Captions, say

WORDS = "wordllama"
_WEIGHTS, _TOKENIZER = "weights/l2_supercat_256.safetensors", "tokenizers/l2_supercat_tokenizer_config.json"
# Captions that are encoded at a time.
PART = 256
# Files of text tokens up to this many bytes are kept in memory.
KEPT = 2**28
_NAMES = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16"}


class Contexts:
    """The text tokens of numbered captions, (captions + 1, L, width); the last row is the empty caption.

    Rows of a large file are read as they are needed. facts: encoder and hash of the captions, where `haste contexts`
    wrote the file. Raises HasteError where the file is missing or holds something else.
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
                f"data.contexts {path}: {one_line(error)}; expected a safetensors file with a tensor "
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


class Encoder(NamedTuple):
    """A frozen text encoder: number of tokens of each text, and text tokens (n, length, width) float16 of texts."""

    length: int
    sizes: Callable[[Sequence[str]], list[int]]
    encode: Callable[[Sequence[str]], Tensor]


def optional(name: str, command: str) -> Any:
    """A package that not everybody needs, imported; where it is not installed, HasteError names the command."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise HasteError(f"data.text_encoder needs the package {name}, which is not installed; {command}") from error


def positions(length: int, width: int) -> Tensor:
    """Sin-cos positions (length, width) of tokens in a row, whose mean square is 1."""
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(width // 2) / (width // 2))
    return torch.cat([angles.sin(), angles.cos()], 1) * 2**0.5


def word_files() -> tuple[Path, Path]:
    """Embeddings and tokenizer of the installed package wordllama; raises HasteError as `package_file` does."""
    needs = f"pip install {WORDS}==0.4.0.post1, or in a copy of this project: pip install -e '.[data]'"
    weights, tokenizer = (
        package_file(f"{WORDS}/{name}", "data.text_encoder", needs) for name in (_WEIGHTS, _TOKENIZER)
    )
    return weights, tokenizer


def words(length: int) -> Encoder:
    """The embedding of each token, brought to a mean square of 1, plus its sin-cos position; padding is zero.

    Embeddings alone say nothing of the order of words, and with it which colour is whose.
    """
    weights, tokenizer_file = word_files()
    tokenizers = optional("tokenizers", 'pip install -e ".[data]"')
    try:
        table = load_file(weights)["embedding.weight"].float()
    except (SafetensorError, OSError, KeyError) as error:
        raise HasteError(
            f"{weights} cannot be read, or has no tensor embedding.weight ({error}); expected the weights of {WORDS}"
        ) from error
    table = table / table.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def numbers(texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def encode(texts: Sequence[str]) -> Tensor:
        found = torch.zeros(len(texts), length, table.shape[1])
        for row, ids in zip(found, numbers(texts), strict=True):
            chosen = torch.tensor(ids[:length], dtype=torch.int64)
            row[: len(chosen)] = table[chosen] + positions(length, table.shape[1])[: len(chosen)]
        return found.half()

    return Encoder(length, lambda texts: [len(ids) for ids in numbers(texts)], encode)


def clip(name: str, length: int) -> Encoder:
    """The last hidden states of the text side of a CLIP of `transformers`, by hub name or folder.

    Raises HasteError where `transformers` or the weights are missing, or their names do not fit.
    """
    transformers = optional("transformers", "pip install transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model, report = transformers.CLIPTextModel.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:  # transformers, the hub and safetensors each raise their own
        raise HasteError(
            f"data.text_encoder {name!r} cannot be loaded: {one_line(error)[:300]}; expected {WORDS}, or a CLIP by hub "
            f"name (such as openai/clip-vit-large-patch14) or folder with config.json, model.safetensors and tokenizer "
            f"files"
        ) from error
    # transformers draws missing weights at random and only logs it.
    if missing := sorted(report["missing_keys"]):
        raise HasteError(
            f"data.text_encoder {name!r} lacks {len(missing)} tensors of a CLIP's text side ({missing[0]}, ...); "
            f"expected weights whose names fit"
        )
    if length > model.config.max_position_embeddings:
        raise HasteError(
            f"data.text_length {length}; expected at most {model.config.max_position_embeddings} with {name}"
        )
    model = model.eval().to(default_device())

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        given = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return model(input_ids=given["input_ids"].to(model.device)).last_hidden_state.half().cpu()

    return Encoder(length, lambda texts: [len(ids) for ids in tokenizer(list(texts))["input_ids"]], encode)


def facts_of(data: config.DataSettings, captions: Captions) -> dict[str, str]:
    """Encoder, length, and hash of the captions, for the file's metadata."""
    sha = hashlib.sha256("\0".join(captions.texts).encode()).hexdigest()[:16]
    return {"encoder": str(data.text_encoder), "length": str(data.text_tokens), "captions": sha}


def prepare(data: config.DataSettings, captions: Captions | None = None) -> Contexts:
    """The text tokens of all captions, by default the data's, encoded unless their file is there.

    Raises HasteError where there are no captions, the encoder is missing, or the file is of other captions.
    """
    captions = captions or open_dataset(data).captions
    if captions is None:
        raise HasteError(
            f"data.kind {data.kind!r} at {data.path} has no captions; expected kind 'captions', or latents that haste "
            f"latents made of captioned images"
        )
    if data.text_encoder is None:
        raise HasteError("data.text_encoder is not set; expected wordllama, or a CLIP by hub name or folder")
    facts = facts_of(data, captions)
    name = f"{config.digest(facts)}.safetensors"
    path = Path(data.contexts) if data.contexts else output_root() / "runs" / "contexts" / name
    with locked(path.with_suffix(".lock"), f"the text tokens {path}", wait=True):
        if not path.is_file():
            length = data.text_tokens
            encoder = words(length) if data.text_encoder == WORDS else clip(data.text_encoder, length)
            counts = encoder.sizes(captions.texts)
            if cut := sum(count > encoder.length for count in counts):
                say(f"{number_of(cut, 'caption')} cut to {encoder.length} tokens, the longest has {max(counts):,}")
            write_parts(path, _encoded(encoder, captions.texts), len(captions.texts) + 1, facts)
    return check(Contexts(path), data, captions)


def _encoded(encoder: Encoder, texts: list[str]) -> Iterator[Tensor]:
    starts = range(0, len(texts), PART)
    for start in tqdm(starts, desc="text tokens", unit="batch", disable=len(starts) < 40, mininterval=1.0):
        yield encoder.encode(texts[start : start + PART])
    yield encoder.encode([""])


def check(contexts: Contexts, data: config.DataSettings, captions: Captions | None) -> Contexts:
    """The same text tokens; raises HasteError where they were made of other captions or by another encoder."""
    wanted = facts_of(data, captions) if captions is not None and data.text_encoder else {}
    for name, value in wanted.items():
        if contexts.facts.get(name, value) != value:
            raise HasteError(
                f"{contexts.path} was made with {name} {contexts.facts[name]}, now it is {value}; remove the file and "
                f"run haste contexts again"
            )
    return contexts


def find(data: config.DataSettings, captions: Captions | None = None) -> Contexts | None:
    """Text tokens of the data, of the file `data.contexts` or made at first use; None without a file and an encoder.

    captions: of the data, where they are at hand.
    """
    if data.contexts is None:
        return None if data.text_encoder is None else prepare(data, captions)
    if data.text_encoder is not None and not Path(data.contexts).is_file():
        raise HasteError(f"data.contexts {data.contexts} is missing; make it by: haste contexts STUDY")
    if captions is None and data.text_encoder is not None:
        captions = open_dataset(data).captions
    return check(Contexts(data.contexts), data, captions)
