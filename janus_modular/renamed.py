"""The renamed names of the previous version; errors about an old name contain the new name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Container, Mapping
from typing import Any, TypeVar

Class = TypeVar("Class", bound=type)

RENAMED: Mapping[str, tuple[str, ...]] = {
    "--layout": ("--format",),
    "IGNORED": ("IGNORE_INDEX",),
    "Layout": ("CheckpointFormat",),
    "LayoutContract": ("CheckpointFormatContract",),
    "LayoutExample": ("CheckpointFormatExample",),
    "LearnsInPart": ("PartiallyTrainable",),
    "Part": ("ComponentSpec",),
    "PartConfig": ("ComponentConfig",),
    "PictureError": ("ImageError",),
    "PictureToDraw": ("ImageTarget",),
    "PictureToRead": ("ImageInput",),
    "Sampling": ("TextSampler", "ImageSampler"),
    "SamplingLoopContract": ("TextSamplerContract", "ImageSamplerContract"),
    "announcements": ("entry_points",),
    "answer_parts": ("answer_segments",),
    "capacity": ("max_seq_len",),
    "check_needed": ("check_required",),
    "code_vectors": ("codebook_embeddings",),
    "code_width": ("code_dim",),
    "compose": ("from_components",),
    "draw": ("decode_image",),
    "drawing_loop": ("image_sampler",),
    "drawing_parts": ("drawing_segments",),
    "drop_condition": ("condition_dropout",),
    "embedding_width": ("embedding_dim",),
    "finish": ("post_training_steps",),
    "forbidden": ("suppressed_ids",),
    "generation_at": ("generation_mask",),
    "generation_pixels": ("generation_images",),
    "generation_promises": ("generation_attributes",),
    "head_width": ("head_dim",),
    "image_next": ("sample_image",),
    "is_on": ("is_enabled",),
    "kind": ("task",),
    "layout": ("checkpoint-format", "format_name"),
    "layout_detects": ("format_detects",),
    "layout_round_trip": ("format_round_trip",),
    "layouts": ("formats",),
    "learn_picture_ends": ("learn_image_ends",),
    "left_over": ("unexpected_keys",),
    "lies_in": ("belongs_to",),
    "needed": ("required",),
    "never_said": ("suppress_tokens",),
    "open_checkpoint": ("from_checkpoint",),
    "open_picture": ("open_image",),
    "pad": ("pad_id",),
    "part": ("component",),
    "parts": ("graphs", "other_graphs"),
    "pick": ("sample_with_noise",),
    "picture": ("image",),
    "picture_tokens": ("image_tokens",),
    "pictures": ("images",),
    "register_layouts": ("register_formats",),
    "register_sampling_loops": ("register_text_samplers", "register_image_samplers"),
    "rows_do_not_mix": ("batch_invariance",),
    "runtime_says": ("runtime_attributes",),
    "sampling-loop": ("text-sampler", "image-sampler"),
    "sampling_loop": ("image_sampler",),
    "sampling_loops": ("text_samplers", "image_samplers"),
    "settings": ("text_settings", "image_settings"),
    "source_own_chance": ("source_randomness",),
    "text_loop": ("text_sampler",),
    "text_next": ("sample_text",),
    "trained_apart": ("frozen_submodules",),
    "trained_parts": ("trained_segments",),
    "understanding_at": ("understanding_mask",),
    "vocab": ("vocab_size",),
    "what_learns": ("trainable_parameters",),
    "width": ("feature_dim", "hidden_size"),
}
"""Old name -> new names: of the public API, interface members, config keys, graphs and options.

An old name with several meanings has a new name for each.
"""


def renamed(word: str, known: Container[str]) -> str:
    """Return the new names of an old name that are among ``known``, quoted; "" if there are none."""
    return " or ".join(f"'{name}'" for name in RENAMED.get(word, ()) if name in known)


def refuse_renamed(module: str, name: str, known: Container[str]) -> None:
    """Check a name that is looked up in a module.

    Raises:
        ImportError: the name is one of the previous version; says the new one.
    """
    if successor := renamed(name, known):
        raise ImportError(f"{module}: {name!r} is called {successor} now", name=module)


def explain_renamed(cls: Class) -> Class:
    """Add the new name to errors about an old name of a class: an attribute, or a constructor's argument.

    Raises:
        AttributeError: (when an object's attribute is read) there is none of this name.
        TypeError: (when an object is made) the constructor has no such argument.
    """
    construct: Any = cls.__init__  # type: ignore[misc]  # of this class, not of a subclass
    parameters = set(inspect.signature(construct).parameters)
    known = parameters | set(dir(cls))

    @functools.wraps(construct)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs.keys() - parameters:
            if successor := renamed(name, parameters):
                raise TypeError(f"{cls.__name__}: the argument {name!r} is called {successor} now")
        construct(self, *args, **kwargs)

    def missing_attribute(self: Any, name: str) -> Any:
        successor = renamed(name, known)
        now = f". It is called {successor} now" if successor else ""
        text = f"{type(self).__name__!r} object has no attribute {name!r}{now}"
        raise AttributeError(text, name=name, obj=self)

    cls.__init__ = constructor  # type: ignore[misc]
    cls.__getattr__ = missing_attribute  # type: ignore[attr-defined]
    return cls
