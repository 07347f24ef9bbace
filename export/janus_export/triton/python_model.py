"""The model that runs inside of Triton's Python backend: every request is a job of one engine.

Inputs, all texts: ``prompt``; ``mode``, ``chat`` (the default) or ``draw``; ``images``, files that a question
is about; ``settings``, JSON of the sampler's settings and of ``stop``, ``n``, ``partial_images``,
``deadline``.

Each response has an ``event``, JSON with its ``type``: ``text`` (with ``text``), ``partial_image`` (with an
image in ``images``), or ``finished`` with the usage and the settings that were applied, and for a drawing all
its ``images``, as PNG files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from janus_modular.answers import Answer
from janus_modular.errors import JanusError, PromptError
from janus_modular.janus import Janus
from janus_modular.serving import AnswerRequest, DrawRequest, Engine, Event, Finished, PartialImage, TextDelta

if TYPE_CHECKING:
    from janus_modular.serving import Job

OWN_SETTINGS = {"chat": ("stop", "deadline"), "draw": ("n", "partial_images", "deadline")}
"""Settings that are not the sampler's, by mode."""

THREADS_PER_ROW = 4
"""Requests that are open at a time for each row; Triton queues the others."""


class TritonPythonModel:
    """What Triton's Python backend calls."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle beside this model, and start its engine."""
        parameters = {
            name: value["string_value"]
            for name, value in json.loads(args["model_config"])["parameters"].items()
        }
        folder = Path(args["model_repository"]) / args["model_version"] / parameters["bundle"]
        rows = int(parameters["rows"])
        self.janus = Janus.from_pretrained(folder, variant=parameters["variant"])
        self.engine = Engine(self.janus, rows)
        self._pool = ThreadPoolExecutor(rows * THREADS_PER_ROW, thread_name_prefix="janus-triton")

    def execute(self, requests: Sequence[Any]) -> None:
        """Start requests; their responses come from other threads."""
        for request in requests:
            self._pool.submit(self._answer, request)

    def finalize(self) -> None:
        """End all requests."""
        self.engine.close(drain=False)
        self._pool.shutdown()

    def _answer(self, request: Any) -> None:
        import triton_python_backend_utils as triton  # which is only inside of Triton

        sender, error = request.get_response_sender(), None
        try:
            job = self.engine.submit(job_request(_inputs(request, triton)))
            self._send_events(job, sender, triton)
        except JanusError as problem:
            error = triton.TritonError(str(problem))
        except Exception as problem:  # Triton would wait for a response that never comes
            error = triton.TritonError(f"{type(problem).__name__} inside of the model")
        if error is not None:
            sender.send(triton.InferenceResponse(output_tensors=[], error=error))
        sender.send(flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _send_events(self, job: Job, sender: Any, triton: Any) -> None:
        try:
            for event in job:
                if sender.is_cancelled():
                    return
                if outputs := event_outputs(event):
                    tensors = [
                        triton.Tensor(name, np.array(values, np.object_)) for name, values in outputs.items()
                    ]
                    sender.send(triton.InferenceResponse(output_tensors=tensors))
        finally:
            job.cancel()


def job_request(inputs: Mapping[str, Sequence[bytes]]) -> AnswerRequest | DrawRequest:
    """Return the job of a request, by the values of its inputs.

    Raises:
        PromptError: an input is missing, or is not what the mode takes.
    """
    mode = _only(inputs, "mode", b"chat").decode("utf-8", "replace")
    if mode not in OWN_SETTINGS:
        raise PromptError(f"mode: found {mode!r:.80}; expected chat or draw.")
    try:
        prompt = _only(inputs, "prompt").decode("utf-8")
        settings = json.loads(_only(inputs, "settings", b"{}"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise PromptError("prompt, settings: expected a text in UTF-8, and a JSON object.") from error
    if not isinstance(settings, dict):
        raise PromptError(f"settings: found {settings!r:.80}; expected a JSON object.")
    own = {name: settings.pop(name) for name in OWN_SETTINGS[mode] if name in settings}
    deadline = own.get("deadline")
    if deadline is not None and not (isinstance(deadline, int | float) and deadline > 0):
        raise PromptError(f"deadline: found {deadline!r:.80}; expected a number of seconds above 0.")
    images = list(inputs.get("images", ()))
    if mode == "chat":
        return AnswerRequest(prompt, images, settings=settings, **own)
    if images:
        raise PromptError("images: found images; expected none: the model draws from text alone.")
    return DrawRequest(prompt, settings=settings, **own)


def event_outputs(event: Event) -> dict[str, list[bytes]] | None:
    """Return the outputs of an event; None: it is not sent."""
    if isinstance(event, TextDelta):
        return {"event": [_json(type="text")], "text": [event.text.encode()]}
    if isinstance(event, PartialImage):
        described = _json(type="partial_image", index=event.index, number=event.number)
        return {"event": [described], "images": [_png(event.image)]}
    if not isinstance(event, Finished):
        return None
    result = event.result
    if isinstance(result, Answer):
        described = _json(
            type="finished",
            finish_reason=result.finish_reason,
            usage=asdict(result.usage),
            settings=result.settings,
        )
        return {"event": [described], "text": [str(result).encode()]}
    usages = [asdict(usage) for usage in result.usage]
    described = _json(type="finished", usage=usages, settings=result.settings)
    return {"event": [described], "images": [_png(image) for image in result]}


def _inputs(request: Any, triton: Any) -> dict[str, list[bytes]]:
    tensors = {
        name: triton.get_input_tensor_by_name(request, name)
        for name in ("mode", "prompt", "images", "settings")
    }
    return {name: [*tensor.as_numpy().ravel()] for name, tensor in tensors.items() if tensor is not None}


def _only(inputs: Mapping[str, Sequence[bytes]], name: str, default: bytes | None = None) -> bytes:
    values = inputs.get(name, [] if default is None else [default])
    if len(values) != 1:
        raise PromptError(f"{name}: found {len(values)} texts; expected one.")
    return values[0]


def _json(**fields: Any) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


def _png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
