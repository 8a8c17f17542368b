"""Captioned images of one's own: a folder with captions.jsonl, COCO's captions_*.json, or a column of captions.

images/captions.jsonl              {"file": "a.png", "caption": "a cat"} or {"file": ..., "captions": ["a cat", ...]}
images/train/captions.jsonl        the same for each split, in folders named train, validation, test
coco/annotations/captions_train2014.json, coco/train2014/*.jpg        as COCO has them
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import datasets

from haste_core.errors import HasteError, number_of
from haste_core.study import config
from haste_core.study.data.base import Captions
from haste_core.study.data.images import SPLITS, Images, data_fingerprint, find_column, load_splits, not_read, walk

LIST = "captions.jsonl"
_EXPECTED = f"a folder with {LIST} or COCO's captions_*.json, or a data set with a column of captions"


class CaptionedImages(Images):
    """RGB images with captions; labels are numbers of captions, of which a training batch draws one for each image.

    Raises HasteError where the data cannot be found or read, an image has no caption, or a caption is empty.
    """

    captions: Captions

    def __init__(self, data: config.DataSettings) -> None:
        self._image_column = data.image_column
        super().__init__(data.model_copy(update={"image_column": None, "label_column": None}))
        for split in self._splits.values():
            split.labels = self.captions.first[split.labels]
        self.classes = len(self.captions.texts)

    def _load(self, data: config.DataSettings) -> tuple[dict[str, Any], str]:
        """As for `Images`; labels number all images."""
        found, groups, note = load(str(data.path), data.caption_column, self._image_column)
        self.captions = Captions(groups)
        return found, note

    def _named(self) -> str:
        return number_of(len(self.captions.texts), "caption")

    def identity(self) -> dict[str, Any]:
        """As for `Images`, with the captions."""
        texts = hashlib.sha256("\0".join(self.captions.texts).encode()).hexdigest()[:16]
        return super().identity() | {"captions": texts}


def has_captions(path: str) -> bool:
    """True for a folder with a file of captions."""
    return bool(_coco_files(Path(path)) or _listed_folders(Path(path)))


def load(
    path: str, caption_column: str | None = None, image_column: str | None = None
) -> tuple[dict[str, Any], list[list[str]], str]:
    """Every split by name with columns "image" and "label", the number of the image; captions by that number; a note.

    path: as `data.path`. caption_column, image_column: of a data set. Raises HasteError as `CaptionedImages` does.
    """
    if not has_captions(path):
        return *_from_columns(path, caption_column, image_column), ""
    place, skipped = Path(path), Counter[str]()
    listed = {_coco_split(file): _coco(place, file) for file in _coco_files(place)}  # captions by file by split
    for folder in [] if listed else _listed_folders(place):
        listed["train" if folder == place else folder.name], others = _listed(place, folder)
        skipped += others
    return *_rows(place, listed), not_read(skipped)


def _rows(root: Path, listed: Mapping[str, Mapping[str, list[str]]]) -> tuple[dict[str, Any], list[list[str]]]:
    """Splits and captions of files below `root`, with captions by file by split."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    found: dict[str, Any] = {}
    groups: list[list[str]] = []
    for name, by_file in listed.items():
        split = next((SPLITS[w] for w in re.split(r"[^a-z]+", name.lower()) if w in SPLITS), name)
        split = name if split in found else split
        numbers = list(range(len(groups), len(groups) + len(by_file)))
        columns = {"image": [str(root / file) for file in by_file], "label": numbers}
        found[split] = datasets.Dataset.from_dict(columns, features=features)
        found[split]._fingerprint = data_fingerprint(root, [Path(file) for file in by_file])
        groups += [_checked(captions, f"data.path {root}: {file}") for file, captions in by_file.items()]
    return found, groups


def _checked(captions: Any, where: str) -> list[str]:
    """Captions of one image, none of them empty."""
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
        raise HasteError(f"{where} has no caption; expected a text or a list of texts; caption the image or remove it")
    if not all(caption.strip() for caption in captions):
        raise HasteError(
            f"{where} has an empty caption, which stands for no caption in training; expected words; write them or "
            f"leave that caption out"
        )
    return captions


def _inside(name: Any, where: str) -> str:
    path = PurePosixPath(name if isinstance(name, str) else "")
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise HasteError(f"{where} names {str(name)[:80]!r}; expected the name of an image within the folder")
    return str(path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise HasteError(f"{path}, line {line}, is not text in UTF-8; save the file as UTF-8") from error


def _listed_folders(root: Path) -> list[Path]:
    return [root] if (root / LIST).is_file() else sorted(path.parent for path in root.glob(f"*/{LIST}"))


def _listed(root: Path, folder: Path) -> tuple[dict[str, list[str]], Counter[str]]:
    """Captions by file, relative to `root`, of a folder with captions.jsonl, and files by suffix that are not read."""
    found: dict[str, list[str]] = {}
    above = folder.relative_to(root)
    for number, line in enumerate(_text(folder / LIST).splitlines(), 1):
        where = f"{folder / LIST}, line {number},"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise HasteError(f"{where} is no JSON ({error}); expected one object a line") from error
        if not isinstance(entry, dict):
            raise HasteError(f'{where} is no object; expected {{"file": ..., "caption": ...}}')
        name = str(above / _inside(entry.get("file"), where))
        found.setdefault(name, []).extend(_checked(entry.get("captions", entry.get("caption")), where))
    skipped: Counter[str] = Counter()
    there = {str(above / file) for file in walk(folder, (), skipped)}
    for names, problem in (
        (there - found.keys(), "without a caption"),
        (found.keys() - there, "that are not there, but have captions"),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise HasteError(
                f"{folder / LIST}: {number_of(len(names), 'image')} {problem} ({shown}); expected a line for each "
                f"image of the folder and no other; add or remove them"
            )
    skipped[".jsonl"] -= 1
    return dict(sorted(found.items())), skipped


def _coco_files(root: Path) -> list[Path]:
    return sorted(p for f in (root, root / "annotations") for p in f.glob("captions_?*.json"))


def _coco_split(path: Path) -> str:
    return path.stem.removeprefix("captions_")


def _coco(root: Path, path: Path) -> dict[str, list[str]]:
    """Captions by file, relative to `root`, of one of COCO's files."""
    try:
        content = json.loads(_text(path))
        names = {image["id"]: _inside(image["file_name"], str(path)) for image in content["images"]}
        found: dict[str, list[str]] = {name: [] for name in names.values()}
        for entry in content["annotations"]:
            found[names[entry["image_id"]]].extend(_checked(entry["caption"], f"{path}: annotation {entry.get('id')}"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HasteError(
            f"{path} is no file of COCO's captions ({type(error).__name__}: {error}); expected lists `images` (id, "
            f"file_name) and `annotations` (image_id, caption)"
        ) from error
    lacking = [name for name, captions in found.items() if not captions]
    if lacking or not found:
        raise HasteError(
            f"{path}: {number_of(len(lacking), 'image')} without a caption ({', '.join(lacking[:3])}); expected at "
            f"least one for each; caption them or take them out of the list"
        )
    name, first = _coco_split(path), next(iter(found))
    for folder in (name, f"images/{name}", "images", ""):
        if (root / folder / first).is_file():
            return {str(PurePosixPath(folder) / file): captions for file, captions in sorted(found.items())}
    raise HasteError(f"{path} names {first}, which is not there; expected the images in {root / name} or {root}")


def _from_columns(
    path: str, caption_column: str | None, image_column: str | None
) -> tuple[dict[str, Any], list[list[str]]]:
    """Splits and captions of a data set with a column of captions."""
    if Path(path).is_dir() and not any(p for d in (".", "*") for p in Path(path).glob(f"{d}/*.parquet")):
        raise HasteError(f"data.path {path!r} has no file of captions; expected {_EXPECTED}")
    found: dict[str, Any] = {}
    groups: list[list[str]] = []
    for name, rows in load_splits(path)[0].items():
        column = find_column(rows, path, "caption_column", caption_column)
        image = find_column(rows, path, "image_column", image_column)
        numbers = list(range(len(groups), len(groups) + len(rows)))
        for number, captions in enumerate(rows[column][:]):
            groups.append(_checked(captions, f"data {path}, column {column}: image {number}"))
        kept = rows.select_columns([image]).rename_columns({image: "image"})
        found[name] = kept.add_column("label", numbers)
        found[name]._fingerprint = rows._fingerprint  # that of the source, by which decoded images are kept
    return found, groups
