"""The decoder inside a larger, multimodal model: its config, and the names of its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable

from transformers import PreTrainedConfig

DECODER_PREFIXES = {
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?(?!lm_head)": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
"""The names of a multimodal checkpoint's decoder, in new and old formats, and the decoder's own names."""


def text_part(family: PreTrainedConfig) -> PreTrainedConfig:
    """Return the decoder's config in a larger model's config; the same config if it is a decoder's."""
    text = family.get_text_config(decoder=True)
    if text is not family:  # the larger model's config has the key
        text.tie_word_embeddings = family.tie_word_embeddings
    return text


def is_part(family: PreTrainedConfig) -> bool:
    """Return True if the decoder is part of a larger, multimodal model."""
    return family.get_text_config(decoder=True) is not family


def decoder_names(names: Iterable[str]) -> set[str]:
    """Return the decoder's own names of its weights in a larger model's files."""
    own = set()
    for name in names:
        for theirs, ours in DECODER_PREFIXES.items():
            if re.match(theirs, name):
                own.add(re.sub(theirs, ours, name))
                break
    return own
