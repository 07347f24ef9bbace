"""The renamed names of the previous version; errors about an old name contain the new name."""

from __future__ import annotations

from collections.abc import Container, Mapping

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
    "capacity": ("max_seq_len",),
    "code_vectors": ("codebook_embeddings",),
    "code_width": ("code_dim",),
    "compose": ("from_components",),
    "draw": ("decode_image",),
    "drawing_loop": ("image_sampler",),
    "drop_condition": ("condition_dropout",),
    "embedding_width": ("embedding_dim",),
    "finish": ("post_training_steps",),
    "generation_at": ("generation_mask",),
    "generation_promises": ("generation_attributes",),
    "head_width": ("head_dim",),
    "image_next": ("sample_image",),
    "kind": ("task",),
    "layout": ("checkpoint-format", "format_name"),
    "layout_detects": ("format_detects",),
    "layout_round_trip": ("format_round_trip",),
    "layouts": ("formats",),
    "left_over": ("unexpected_keys",),
    "lies_in": ("belongs_to",),
    "never_said": ("suppress_tokens",),
    "open_checkpoint": ("from_checkpoint",),
    "open_picture": ("open_image",),
    "pad": ("pad_id",),
    "part": ("component",),
    "parts": ("graphs",),
    "pick": ("sample_with_noise",),
    "picture_tokens": ("image_tokens",),
    "pictures": ("images",),
    "register_layouts": ("register_formats",),
    "register_sampling_loops": ("register_text_samplers", "register_image_samplers"),
    "rows_do_not_mix": ("batch_invariance",),
    "runtime_says": ("runtime_attributes",),
    "sampling-loop": ("text-sampler", "image-sampler"),
    "sampling_loop": ("image_sampler",),
    "sampling_loops": ("text_samplers", "image_samplers"),
    "source_own_chance": ("source_randomness",),
    "text_loop": ("text_sampler",),
    "text_next": ("sample_text",),
    "trained_apart": ("frozen_submodules",),
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
