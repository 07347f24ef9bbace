"""Uploads a checkpoint to the Hugging Face hub, after it was verified."""

from __future__ import annotations

import os
import re
from pathlib import Path

from janus_modular.checkpoints.opening import open_lazily
from janus_modular.errors import CheckpointError
from janus_modular.foreign import reason
from janus_modular.plugins import Plugins
from janus_modular.weights.checksums import FILE, verify_checksums
from janus_modular.weights.writing import is_checkpoint_file

REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload a model with janus-modular",
    plugins: Plugins | None = None,
) -> str:
    """Upload the checkpoint in ``folder`` as one commit to the model repository ``repo_id``; return its URL.

    The repository is created if there is none, ``private`` if asked; so is the branch ``revision``. Its files
    that are not in the folder stay. The token and the endpoint are huggingface_hub's: ``hf auth login``, or
    the variables HF_TOKEN and HF_ENDPOINT.

    Raises:
        CheckpointError: the folder is no complete checkpoint, or has the state of a run; the hub refuses it.
    """
    from huggingface_hub import HfApi

    if not REPO_ID.fullmatch(repo_id):
        raise CheckpointError(f"found '{repo_id}'; expected the name of a repository on the hub: USER/NAME.")
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}; expected a checkpoint, such as RUN/model.")
    open_lazily(folder, plugins=plugins).check_weights()
    if (folder / FILE).is_file():
        verify_checksums(folder, is_checkpoint_file=is_checkpoint_file)
    if names := sorted(path.name for path in folder.glob("training*") if is_checkpoint_file(path.name)):
        raise CheckpointError(
            f"{folder} has the state of a run ({', '.join(names)}), which is for resuming; expected a model:"
            f" push RUN/model, or the result of janus-modular convert {folder} MODEL."
        )
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, revision=revision
        )
    except Exception as error:  # also those of its HTTP library, which are of classes of their own
        raise CheckpointError(
            f"{repo_id} on the hub: {reason(error.__cause__ or error)}. Is the token valid (hf auth login, or"
            " HF_TOKEN), and may it write there?"
        ) from error
    return str(commit.commit_url)
