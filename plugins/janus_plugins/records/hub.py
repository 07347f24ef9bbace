"""Data sets on the Hugging Face hub: the files of an address ``hf://datasets/OWNER/NAME@REVISION/FILES``."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from janus_modular import DataError
from janus_plugins.records.paths import expand_braces

PREFIX = "hf://"
ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/@]+))?/([^/].*)")
"""The form of huggingface_hub's file system; a revision is a commit, a tag or a branch (with ``%2F``)."""


def local_path(path: str) -> str:
    """Return a local path as it is; fetch the files of a hub address, and return where they are.

    huggingface_hub's cache and its offline mode (HF_HUB_OFFLINE=1) are honoured: files that are in the cache
    are not fetched again.

    Raises:
        DataError: the address has another form, or the hub does not give the files.
    """
    if not path.startswith(PREFIX):
        return path
    match = ADDRESS.fullmatch(path)
    if match is None:
        raise DataError(
            f"found the address '{path}'; expected hf://datasets/OWNER/NAME/FILES. FILES may have braces and"
            " wildcards, and @REVISION may follow NAME."
        )
    repository, revision, files = match.groups()
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repository,
            repo_type="dataset",
            revision=None if revision is None else unquote(revision),
            allow_patterns=expand_braces(files),
        )
    except (OSError, ValueError) as error:  # all of huggingface_hub's errors are one of these
        first_line = str(error).strip().partition("\n")[0]
        raise DataError(
            f"'{path}' cannot be fetched: {type(error).__name__}: {first_line}. Check the name, unset"
            " HF_HUB_OFFLINE if it is set, or fetch the files and write their path."
        ) from error
    return str(Path(folder, files))
