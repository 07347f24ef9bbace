"""Running samplers: their rows and batches, and checks of what they yield. Imports no torch.

The protocols are `janus_modular.protocols.TextSampler` and `janus_modular.protocols.ImageSampler`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from janus_modular.answers import AnswerRow
from janus_modular.arguments import option
from janus_modular.config.settings import check_settings
from janus_modular.errors import CheckError, JanusError, NotFiniteError, PromptError
from janus_modular.foreign import printable, reason
from janus_modular.protocols import (
    DrawingSteps,
    EncodedImages,
    ImageSampler,
    ImageSamplerSettings,
    Runtime,
    TextSampler,
    TextSamplerSettings,
    TokenSteps,
)
from janus_modular.registry import slot_label
from janus_modular.sequence import Sequence as Prompt
from janus_modular.sequence import occurrences
from janus_modular.suggest import did_you_mean

if TYPE_CHECKING:
    from janus_modular.model.model import JanusModel
    from janus_modular.plugins import Plugins

log = logging.getLogger(__name__)

Settings = TypeVar("Settings", TextSamplerSettings, ImageSamplerSettings)


def unusable_samplers(model: JanusModel, plugins: Plugins) -> dict[str, str]:
    """Return why a model's samplers cannot be used, by command (``chat``, ``draw``); {} where they can.

    Such a model opens all the same: ``chat`` needs no image sampler, and ``draw`` no text sampler.
    """
    reasons = {}
    for command, slot, name in (
        ("chat", "text_samplers", model.text_sampler),
        ("draw", "image_samplers", model.image_sampler),
    ):
        try:
            plugins.entry(slot, name)
        except JanusError as error:
            reasons[command] = str(error)
    return reasons


def chosen(settings: Mapping[str, Any], **named: Any) -> dict[str, Any]:
    """Return settings, and those of the named ones that are not None."""
    return {name: value for name, value in named.items() if value is not None} | dict(settings)


def with_settings(plugins: Plugins, slot: str, name: str, settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a registered sampler and its settings: the given ones, and its defaults.

    Raises:
        PromptError: the sampler has no setting of a name, or refuses a value.
    """
    entry = plugins.entry(slot, name)
    known = [field.name for field in fields(entry.config) if field.init]
    if unknown := sorted(set(settings) - set(known)):
        hint = " ".join(filter(None, (did_you_mean(word, known) for word in unknown)))
        raise PromptError(
            f"{', '.join(unknown)}: no such setting of the {slot_label(slot)} '{name}'; expected"
            f" {', '.join(known)}. {hint}".rstrip()
        )
    return entry.factory, _built(entry.config, settings, f"the {slot_label(slot)} '{name}'")


def _built(schema: type[Any], settings: Mapping[str, Any], sampler: str) -> Any:
    """Return settings as their dataclass, with values of the types that it declares.

    Values are first given to the dataclass as they are: it may check and convert them itself.
    """
    own = None
    try:
        own = schema(**settings)
    except PromptError:
        raise
    except Exception:  # the types of values may be the reason, which are checked next
        log.debug("%s does not take the values as they are", sampler, exc_info=True)
    values, errors = check_settings(schema, settings)
    if own is not None:  # it may have converted values, such as a fraction
        converted = {error.path: getattr(own, error.path) for error in errors}
        wrong = {error.path for error in check_settings(schema, converted)[1]}
        errors = [error for error in errors if error.path in wrong]
    if errors:
        raise PromptError(f"{sampler}: {' '.join(map(str, errors))}")
    if own is not None and all(_is_same(values[name], settings[name]) for name in settings):
        return own
    try:
        return schema(**values)
    except PromptError:
        raise
    except Exception as error:
        refused = [name for name in values if _refuses(schema, name, values[name])] or list(values)
        listed = ", ".join(f"{name}={printable(repr(values[name]), most=80)}" for name in refused)
        text = " ".join(str(error).split()) if isinstance(error, ValueError | JanusError) else reason(error)
        raise PromptError(f"{sampler} refuses {listed or 'its own defaults'}: {text}") from error


def _is_same(value: Any, original: Any) -> bool:
    return value is original or (type(value) is type(original) and bool(value == original))


def _refuses(schema: type[Any], name: str, value: Any) -> bool:
    """Return True if a setting is refused whatever the others are."""
    try:
        schema(**{name: value})
    except Exception:
        return True
    return False


class ChoosesSamplers:
    """The part of `janus_modular.Janus` that knows its samplers, and their settings."""

    runtime: Runtime
    plugins: Plugins

    def use_samplers(self, *, text: str | None = None, image: str | None = None) -> Self:
        """Use registered samplers in place of the model's own, from now on; return this object.

        Raises:
            PluginError: there is no sampler of a name.
        """
        for slot, name in (("text_samplers", text), ("image_samplers", image)):
            option(name, slot_label(slot), str, type(None), expected="the name of a registered sampler")
            if name is not None:
                self.plugins.entry(slot, name)
        if text is not None:
            self.runtime.text_sampler = text
        if image is not None:
            self.runtime.image_sampler = image
        return self

    def text_settings(self, settings: Mapping[str, Any]) -> TextSamplerSettings:
        """Return the settings with which `chat` answers: the given ones, and the sampler's defaults.

        Raises:
            PromptError: the text sampler has no setting of a name, or refuses a value.
        """
        return self._text_sampler(settings)[1]

    def image_settings(self, settings: Mapping[str, Any]) -> ImageSamplerSettings:
        """Return the settings with which `draw` draws; like `text_settings`."""
        return self._image_sampler(settings)[1]

    def _text_sampler(self, settings: Mapping[str, Any]) -> tuple[TextSampler[Any], TextSamplerSettings]:
        return with_settings(self.plugins, "text_samplers", self.runtime.text_sampler, settings)

    def _image_sampler(self, settings: Mapping[str, Any]) -> tuple[ImageSampler[Any], ImageSamplerSettings]:
        return with_settings(self.plugins, "image_samplers", self.runtime.image_sampler, settings)


def check_token_ids(sampler: str, yielded: Any, rows: int) -> NDArray[np.integer[Any]]:
    """Return what a text sampler yielded: the next token id of each row.

    Raises:
        CheckError: the sampler yielded something else.
    """
    fits = isinstance(yielded, np.ndarray) and yielded.shape == (rows,) and yielded.dtype.kind in "iu"
    if not fits:
        raise _protocol_error("text", sampler, f"yielded {_described(yielded)}", f"integer ids ({rows},)")
    return yielded


def check_progress(sampler: str, yielded: Any) -> tuple[int, int]:
    """Return what an image sampler yielded: the steps done, and the steps in all.

    Raises:
        CheckError: the sampler yielded something else.
    """
    if isinstance(yielded, tuple) and [isinstance(number, Integral) for number in yielded] == [True, True]:
        return yielded
    raise _protocol_error("image", sampler, f"yielded {_described(yielded)}", "(steps done, steps in all)")


def check_images(sampler: str, returned: Any, rows: int) -> EncodedImages:
    """Return what an image sampler returned: one image a row, and maybe what it was decoded from.

    Raises:
        CheckError: the sampler returned something else.
        NotFiniteError: pixels are NaN or infinite.
    """
    result = returned if isinstance(returned, EncodedImages) else EncodedImages(returned)
    images, encoded = result.images, result.encoded
    fits = isinstance(images, np.ndarray) and images.ndim == 4 and images.shape[:2] == (rows, 3)
    if not fits:
        raise _protocol_error("image", sampler, f"returned {_described(images)}", f"pixels ({rows}, 3, H, W)")
    if encoded is not None and not (isinstance(encoded, np.ndarray) and encoded.shape[:1] == (rows,)):
        raise _protocol_error(
            "image", sampler, f"returned {_described(encoded)}", f"encoded images ({rows}, ...)"
        )
    for name, values in {"pixels": images, "encoded images": encoded}.items():
        if values is not None and values.dtype.kind == "f" and not np.isfinite(values).all():
            raise NotFiniteError(f"the image sampler '{sampler}' returned {name} that are NaN or infinite")
    return result


def stream_texts(sampler: str, steps: TokenSteps, rows: Sequence[AnswerRow]) -> Iterator[tuple[int, str]]:
    """Pass the tokens of a text sampler to their rows; yield (row, text), until all rows have ended.

    Raises:
        CheckError: the sampler yielded something else than token ids.
    """
    active: NDArray[np.bool_] | None = None  # before the first step nothing can be sent
    while True:
        try:
            yielded = steps.send(active) if active is not None else next(steps)
        except StopIteration:
            break
        ids = check_token_ids(sampler, yielded, len(rows))
        for index, row in enumerate(rows):
            if row.is_active and (text := row.push(int(ids[index]))):
                yield index, text
        active = np.array([row.is_active for row in rows])
        if not active.any():
            steps.close()
            return
    for index, row in enumerate(rows):
        if row.is_active and (text := row.end()):
            yield index, text


@contextmanager
def progress_bar(
    progress: Callable[[int, int], None] | bool | None, label: str = "drawing"
) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of the steps done and the number of all steps; for True it drives a bar on stderr.

    In a notebook, the bar is shown below the cell.
    """
    if progress is not True:
        yield progress or (lambda done, total: None)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def draw_images(
    sampler: str, steps: DrawingSteps, rows: int, on_progress: Callable[[int, int], None]
) -> EncodedImages:
    """Run an image sampler to its end, reporting each step; return the images (rows, 3, H, W).

    Raises:
        CheckError: the sampler yielded something else than its progress, or returned no images.
        NotFiniteError: pixels are NaN or infinite.
    """
    while True:
        try:
            yielded = next(steps)
        except StopIteration as stop:
            return check_images(sampler, stop.value, rows)
        on_progress(*check_progress(sampler, yielded))


def with_numbers(settings: Settings, prompts: Sequence[Prompt]) -> Settings:
    """Return settings that have the number of each row: how often the same prompt came before.

    Raises:
        PromptError: the settings have numbers, and not one for each prompt.
    """
    if len(settings.numbers) not in (0, len(prompts)):
        raise PromptError(
            f"numbers: found {len(settings.numbers)}; expected one for each of {len(prompts)} prompts."
        )
    first = settings.first if isinstance(settings, ImageSamplerSettings) else 0
    numbers = settings.numbers or [first + number for number in occurrences(prompts)]
    return replace(settings, numbers=tuple(numbers))


def batches(
    settings: ImageSamplerSettings, prompts: Sequence[Prompt], size: int
) -> list[tuple[Sequence[Prompt], ImageSamplerSettings]]:
    """Return batches of up to ``size`` prompts, each with its settings, which number its images."""
    settings = with_numbers(settings, prompts)
    return [
        (prompts[start : start + size], replace(settings, numbers=settings.numbers[start : start + size]))
        for start in range(0, len(prompts), size)
    ]


def _protocol_error(output: str, sampler: str, deviation: str, expected: str) -> CheckError:
    return CheckError(
        f"the {output} sampler '{sampler}' {deviation}; expected {expected}.\n"
        f"Choose another sampler, or fix this: docs/reference/hooks.md has the protocol of {output} samplers."
    )


def _described(value: Any) -> str:
    return f"an array {value.shape} of {value.dtype}" if isinstance(value, np.ndarray) else f"{value!r:.60}"
