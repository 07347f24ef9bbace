"""Calls of `janus_modular.Janus` about images as the model draws them: replies with images, codes, scores."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from janus_modular import arguments, samplers
from janus_modular.errors import PromptError
from janus_modular.graph_specs import graph_of_role
from janus_modular.image_sizes import chosen_size, open_session
from janus_modular.interleaved import MAX_IMAGES, Reply, Replying, ReplyStream
from janus_modular.plugins import Plugins
from janus_modular.processing.image_io import ImageSource
from janus_modular.processing.image_transforms import generation_pixels
from janus_modular.processing.processor import Processor
from janus_modular.protocols import Runtime, SharedSession
from janus_modular.sequence import Message

if TYPE_CHECKING:
    from janus_modular.model.model import JanusModel


class ImageCalls:
    """The methods of `janus_modular.Janus` that reply with images, encode them, and score encoded images."""

    runtime: Runtime
    processor: Processor
    plugins: Plugins

    @property
    def model(self) -> JanusModel:
        """The model in torch; ConfigError for a bundle."""
        raise NotImplementedError

    @overload
    def converse(
        self,
        question: str | Many[Message],
        images: ImageSource | Many[ImageSource] = ...,
        *,
        stream: Literal[False] = ...,
        max_images: int = ...,
        drawing: Mapping[str, Any] = ...,
        progress: Callable[[int, int], None] | bool | None = ...,
        stop: Many[str] = ...,
        **settings: Any,
    ) -> Reply: ...
    @overload
    def converse(
        self,
        question: str | Many[Message],
        images: ImageSource | Many[ImageSource] = ...,
        *,
        stream: Literal[True],
        max_images: int = ...,
        drawing: Mapping[str, Any] = ...,
        progress: Callable[[int, int], None] | bool | None = ...,
        stop: Many[str] = ...,
        **settings: Any,
    ) -> ReplyStream: ...
    def converse(
        self,
        question: str | Many[Message],
        images: ImageSource | Many[ImageSource] = (),
        *,
        stream: bool = False,
        max_images: int = MAX_IMAGES,
        drawing: Mapping[str, Any] | None = None,
        progress: Callable[[int, int], None] | bool | None = None,
        stop: Many[str] = (),
        **settings: Any,
    ) -> Reply | ReplyStream:
        """Answer like `chat`, with images where the model itself begins them.

        ``settings`` are the text sampler's, ``drawing`` the image sampler's (``{"guidance": 3}``). At most
        ``max_images`` are drawn; ``max_tokens`` counts the text tokens alone. ``progress`` is that of `draw`,
        for each image.

        Return a `Reply`; or, with ``stream``, a `ReplyStream`, an iterator over texts as they come and images
        once they are drawn. ``reply.message`` is the turn for the next call's conversation.

        Raises:
            PromptError: the model never begins an image itself (see ``learn_image_ends`` of training), or
                cannot go on behind a drawing; a setting is unknown or out of its range; or the prompt fills
                the context.
            CheckError: a sampler breaks its protocol.
        """
        if "numbers" in settings or "numbers" in (drawing or {}):
            raise PromptError("numbers: found numbers of rows; expected none: a reply numbers its own parts.")
        if max_images != 0:  # none: text alone
            max_images = arguments.count(max_images, "max_images")
        of_text, of_images = self.runtime.text_sampler, self.runtime.image_sampler
        replying = Replying(
            self.runtime,
            self.processor,
            samplers.with_settings(self.plugins, "text_samplers", of_text, settings),
            samplers.with_settings(self.plugins, "image_samplers", of_images, dict(drawing or {})),
            stop=arguments.stop_strings(stop),
            max_images=max_images,
            progress=arguments.callback(progress, "progress"),
        )
        prompt = self.processor.chat_prompt(arguments.conversation(question, images))
        replies = replying.stream(prompt)
        if not stream:
            deque(replies, maxlen=0)  # runs to the end
        return replies if stream else replies.reply

    def encode_images(
        self, images: ImageSource | Many[ImageSource], *, size: int | tuple[int, int] | None = None
    ) -> list[NDArray[Any]]:
        """Return images in the form in which the model draws them: codes (P,) or (P, S), of Janus' path.

        An image is scaled to cover ``size``, as `draw` takes it, and cropped, as in training. Its first codes
        are a ``prefix`` of `draw`.

        Raises:
            ImageError: an image cannot be read.
            PromptError: the model encodes no images, or runs from a bundle without the graph.
        """
        opened, drawing = arguments.opened_images(images), self.processor.drawing
        image_size = chosen_size(self.runtime, self.processor, size)
        session = open_session(self.runtime, 1, image_size)
        signatures = session.signatures if isinstance(session, SharedSession) else {}
        name = graph_of_role(signatures, "encode")
        if name is None or drawing is None:
            raise PromptError(
                "images: found images to encode; expected none: the model has no graph of the role 'encode'."
                " A bundle for answers alone has none; export all modes."
            )
        height, width = (
            (image_size.height, image_size.width) if image_size else (drawing.height, drawing.width)
        )
        pixels = [generation_pixels(image, height=height, width=width) for image in opened]
        return [session.to_host(session.run(name, image[None]))[0] for image in pixels]

    def log_probabilities(
        self, prompt: str, encoded: Many[NDArray[Any]], *, guidance: float = 1.0, temperature: float = 1.0
    ) -> NDArray[np.float32]:
        """Return the log-probabilities (N, P), natural logarithms, of the codes of N images of a prompt.

        ``encoded`` are codes (P,) or (P, S) per image, as `draw` returns them (`Drawings.encoded`). With the
        guidance and temperature of `draw`, these are the probabilities with which it sampled the codes.
        `janus_modular.image_log_probabilities` returns a tensor with gradients, for a loss.

        Raises:
            ConfigError: a bundle is open, or the generation path computes no log-probabilities.
            PromptError: the prompt does not fit into the context, or codes are not the model's.
        """
        from janus_modular.model.scoring import image_log_probabilities

        [text] = arguments.drawing_prompts(prompt)
        prompts, pad = [self.processor.draw_prompt(text)] * len(encoded), self.processor.pad_id
        settings = {"guidance": guidance, "temperature": temperature}
        scores = image_log_probabilities(self.model, prompts, encoded, pad_id=pad, **settings)
        return scores.detach().float().cpu().numpy()
