"""A folder of images, with captions in text files beside them, or in class folders.

With ``captions: files``, ``cats/1.png`` has its caption in ``cats/1.txt``. With ``captions: folders``, the
first folder of its path is its class, as in ImageNet: ``n02123045/1.JPEG``; a file of ``names`` says what
classes are called. Subfolders are searched; a file is read when its sample is taken.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

import numpy as np

from janus_modular import DataError, Registry, Sample, Source, hookimpl, list_briefly
from janus_plugins.records.class_names import read_names
from janus_plugins.records.images import SUFFIXES, ImageFolder
from janus_plugins.records.options import RecordOptions
from janus_plugins.records.reader import RecordReader, located

log = logging.getLogger(__name__)


@dataclass
class ImageFolderConfig(RecordOptions):
    """The folder, and where its captions are."""

    expected: ClassVar[str] = "a folder of images"

    path: str = ""  # the folder; subfolders are searched
    captions: Literal["files", "folders"] = (
        "files"  # a text file beside each image, or the name of its class folder
    )
    suffix: str = ".txt"  # of the text files
    names: str | None = (
        None  # of the classes: a text file of lines `CLASS NAME`, or JSON: {CLASS: NAME or [NAME, ...]}
    )
    outside: bool = False  # allow links to images outside the folder

    def __post_init__(self) -> None:
        """Check the options, without the folder."""
        super().__post_init__()
        if not re.fullmatch(r"\.[^/\\]+", self.suffix) or self.suffix.lower() in SUFFIXES:
            raise ValueError(f"suffix: found '{self.suffix}'; expected that of a text file, such as .txt.")
        if self.names and self.captions == "files":
            raise ValueError("names: are those of class folders; set captions: folders, or leave them out.")


class ImagesWithCaptions:
    """The images of a folder as samples, in the order of their paths."""

    def __init__(self, config: ImageFolderConfig) -> None:
        """Find the images.

        Raises:
            DataError: there is no such folder, no image or no caption in it; or an image or a class without
                a name.
        """
        self.config = config
        self.folder = Path(config.path).expanduser()
        if not self.folder.is_dir():
            raise DataError(f"'{self.folder}' is no folder: set `path` to the folder of your images.")
        files = list_files(self.folder)
        self.images = [name for name in files if name.lower().endswith(SUFFIXES)]
        if not self.images:
            raise DataError(
                f"'{self.folder}' has no images: found {_suffixes(files)}; expected files ending in"
                f" {', '.join(SUFFIXES)}."
            )
        self._captions: list[str] = []
        self._names: dict[str, Any] = {}
        if config.captions == "files":
            self._captions = self._find_captions(files)
        else:
            self._names = self._class_names()
        self._report_unused(files)
        self._reader = RecordReader(ImageFolder(self.folder, config.outside), config)

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """Return a digest of the classes, and of the paths and sizes of images and captions."""
        digest = sha256(json.dumps(self._names).encode())
        for name in [*self.images, *self._captions]:
            digest.update(f"{name}\0{(self.folder / name).stat().st_size}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Return the sample of image ``index``; ``rng`` chooses among names, templates and questions.

        Raises:
            DataError: the image or its caption cannot be read; names the image.
        """
        name = self.images[index]
        with located(lambda: str(self.folder / name)):
            if self.config.captions == "folders":
                record = {"image": name, "class": self._names[PurePosixPath(name).parts[0]]}
            else:
                record = {"image": name, "caption": self._caption(self._caption_file(name))}
            return self._reader.sample(record, rng)

    def _caption_file(self, image: str) -> str:
        return str(PurePosixPath(image).with_suffix(self.config.suffix))

    def _caption(self, name: str) -> str:
        try:
            text = (self.folder / name).read_text("utf-8-sig")
        except FileNotFoundError as error:
            raise DataError(
                f"has no caption: expected a text in {PurePosixPath(name).name} beside the image. Write one,"
                " or skip such images with bad_samples.unreadable=skip."
            ) from error
        except (OSError, UnicodeError) as error:
            raise DataError(f"its caption {name} cannot be read: {error}. Expected text in UTF-8.") from error
        if not text.strip():
            raise DataError(f"its caption {name} is empty: expected a text.")
        return text

    def _find_captions(self, files: list[str]) -> list[str]:
        """Return the caption files that belong to an image."""
        captions = sorted({self._caption_file(name) for name in self.images} & {*files})
        if not captions:
            suffix = self.config.suffix
            hint = " for the metadata file in it, use the source jsonl" if "metadata.jsonl" in files else ""
            raise DataError(
                f"'{self.folder}' has {len(self.images):,} images and no caption: expected"
                f" {self._caption_file(self.images[0])} beside {self.images[0]}, and so on. If the captions"
                f" have another suffix than {suffix}, set suffix; if folders are classes, captions:"
                f" folders;{hint or ' for captions in a JSON file, use the source jsonl'}."
            )
        return captions

    def _class_names(self) -> dict[str, Any]:
        """Return the name, or a list of names, of each class folder."""
        paths = [PurePosixPath(name) for name in self.images]
        if outside := [str(path) for path in paths if len(path.parts) == 1]:
            raise DataError(
                f"{list_briefly(outside)} in '{self.folder}': in no class folder. With captions: folders,"
                " expected CLASS/IMAGE. Move them, or set captions: files."
            )
        classes = sorted({path.parts[0] for path in paths})
        if not self.config.names:
            return dict(zip(classes, classes, strict=True))
        path = Path(self.config.names).expanduser()
        names = read_names(path)
        if missing := [name for name in classes if name not in names]:
            raise DataError(
                f"'{path}' has no name for {list_briefly(missing)}: expected one for each of"
                f" {len(classes):,} class folders in '{self.folder}'."
            )
        return {name: names[name] for name in classes}

    def _report_unused(self, files: list[str]) -> None:
        if unused := sorted({*files} - {*self.images, *self._captions}):
            log.warning(
                "'%s': not used, as neither an image nor the caption of an image: %s",
                self.folder,
                list_briefly(unused),
            )


def list_files(folder: Path) -> list[str]:
    """Return the relative paths of all files below a folder, sorted, without those that begin with a dot.

    Raises:
        DataError: a folder cannot be read, or links lead back to a folder above.
    """

    def failed(error: OSError) -> None:
        raise DataError(f"'{error.filename}' cannot be read: {error.strerror}.") from error

    files: list[str] = []
    for path, folders, names in os.walk(folder, onerror=failed, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            inner = Path(path, name)
            if inner.is_symlink() and Path(path).resolve().is_relative_to(inner.resolve()):
                raise DataError(f"'{inner}' is a link to a folder above it: remove the link.")
        relative = Path(path).relative_to(folder)
        files += [(relative / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(files)


def _suffixes(files: list[str]) -> str:
    """Return how many files there are of each suffix: ``3 .txt, 1 .pdf``."""
    counts = Counter(PurePosixPath(name).suffix or "without a suffix" for name in files)
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common(5)) or "nothing"


@hookimpl
def register_sources(registry: Registry[Source]) -> None:
    """Register ``image-folder``."""
    registry.add("image-folder", ImagesWithCaptions, ImageFolderConfig)
