"""Old public names are errors that say the new name: of classes, functions, attributes and arguments."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest

import janus_modular
from janus_modular import ImageInput, ImageTarget, Janus, JanusError, Plugins, Processor, Sequence, testing

OLD_NAMES = {
    "IGNORED": "IGNORE_INDEX", "Layout": "CheckpointFormat", "LearnsInPart": "PartiallyTrainable",
    "Part": "ComponentSpec", "PartConfig": "ComponentConfig", "PictureError": "ImageError",
    "PictureToDraw": "ImageTarget", "PictureToRead": "ImageInput", "Sampling": "TextSampler",
    "lies_in": "belongs_to", "open_picture": "open_image", "part": "component", "pick": "sample_with_noise",
    "LayoutContract": "CheckpointFormatContract", "LayoutExample": "CheckpointFormatExample",
    "SamplingLoopContract": "TextSamplerContract",
}  # fmt: skip
"""Every name that `janus_modular` and `janus_modular.testing` listed before, and list no more."""


@pytest.mark.parametrize(("old", "new"), OLD_NAMES.items())
def test_an_old_name_says_the_new_name(old: str, new: str) -> None:
    module = janus_modular if new in janus_modular.__all__ else testing
    assert getattr(module, new) is not None
    with pytest.raises(ImportError, match=rf"'{old}' is called '{new}'.* now"):
        exec(f"from {module.__name__} import {old}")


def sequence() -> Sequence:
    tokens = np.zeros(2, np.int64)
    return Sequence(tokens, tokens, tokens > 0, tokens > 0)


@pytest.mark.parametrize(
    ("make", "old", "new"),
    [
        (lambda: ImageInput("a.png"), "picture", "image"),
        (lambda: ImageTarget("a.png"), "picture", "image"),
        (sequence, "understanding_at", "understanding_mask"),
        (sequence, "generation_at", "generation_mask"),
        (sequence, "generation_pixels", "generation_images"),
        (lambda: Plugins([]), "is_on", "is_enabled"),
        (lambda: Plugins([]), "announcements", "entry_points"),
        (lambda: object.__new__(Processor), "forbidden", "suppressed_ids"),
        (lambda: object.__new__(Processor), "picture_tokens", "image_tokens"),
        (lambda: object.__new__(Janus), "settings", "image_settings"),
    ],
)
def test_an_old_attribute_says_the_new_name(make, old: str, new: str) -> None:
    with pytest.raises(AttributeError, match=f"'{old}'. It is called .*'{new}' now"):
        getattr(make(), old)
    with pytest.raises(AttributeError, match=r"has no attribute 'nothing'$"):
        _ = make().nothing


@pytest.mark.parametrize(
    ("cls", "old", "new"),
    [
        (ImageInput, "picture", "image"),
        (ImageTarget, "picture", "image"),
        (Sequence, "understanding_at", "understanding_mask"),
        (Processor, "never_said", "suppress_tokens"),
        (Plugins, "announcements", "entry_points"),
    ],
)
def test_an_old_argument_says_the_new_name(cls: type, old: str, new: str) -> None:
    with pytest.raises(TypeError, match=f"{cls.__name__}: the argument '{old}' is called '{new}' now"):
        cls(**{old: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'nothing'"):
        cls(nothing=1)


def test_a_model_and_a_processor_are_given_as_an_assembly() -> None:
    with pytest.raises(JanusError, match=r"assembly: .*expected a ModelAssembly\(model, processor\)"):
        Janus.of(object(), object.__new__(Processor))


def test_classes_with_old_names_are_copied_as_others() -> None:
    image = ImageInput("a.png")
    assert copy.deepcopy(image) == pickle.loads(pickle.dumps(image)) == replace(image) == image
    assert not hasattr(image, "picture")
