"""`Janus`: loads a model, chats with it and draws. Imports no torch; a runtime may need it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from numpy.typing import NDArray
from PIL import Image

from janus_modular import arguments, samplers
from janus_modular.answers import Answer, AnswerBatch, AnswerRow, AnswerStream, Drawings, usage_of
from janus_modular.bundles import find_bundle, open_bundle
from janus_modular.errors import CheckpointError, ConfigError, PromptError
from janus_modular.foreign import is_hub_id, path_exists, printable
from janus_modular.image_calls import ImageCalls
from janus_modular.image_sizes import chosen_size, open_session
from janus_modular.plugins import Plugins, default_plugins
from janus_modular.processing.image_io import ImageSource, to_image
from janus_modular.processing.processor import Processor
from janus_modular.protocols import Runtime, VariantRuntime
from janus_modular.renamed import explain_renamed
from janus_modular.samplers import ChoosesSamplers
from janus_modular.sequence import Message
from janus_modular.serving.async_calls import AsyncCalls

if TYPE_CHECKING:
    import torch

    from janus_modular.checkpoints import ModelAssembly
    from janus_modular.model.model import JanusModel

Question = str | Many[Message]  # a text, or a conversation whose messages may contain images
Images = ImageSource | Many[ImageSource]  # an input image, or several


@explain_renamed
class Janus(AsyncCalls, ChoosesSamplers, ImageCalls):
    """A model that chats and draws. Make one with `from_pretrained` or `from_components`."""

    def __init__(
        self,
        runtime: Runtime,
        processor: Processor,
        plugins: Plugins | None = None,
        *,
        assembly: ModelAssembly | None = None,
    ) -> None:
        """Use an opened runtime; ``assembly`` is the model that it runs, if it runs a model in torch."""
        self.runtime = runtime
        self.processor = processor
        self.plugins = plugins or default_plugins()
        self._assembly = assembly

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str = "auto",
        runtime: str | Mapping[str, Any] | None = None,
        variant: str | None = None,
        plugins: Plugins | None = None,
        allow_failed: bool = False,
    ) -> Janus:
        """Load a checkpoint of any known format, or an exported bundle, from a folder or a hub id.

        ``device``: auto, cpu, cuda, mps, or a device of the bundle's runtime.
        ``dtype``, for a checkpoint: auto, float32 (fp32), bfloat16 (bf16), float16 (fp16), or torch's dtype.
        auto is float32 on a CPU, elsewhere the dtype of the stored weights.
        ``variant``, for a bundle: fp32, cpu-int4, ...; by default the bundle's first.
        ``runtime``, for a bundle: a registered name, or ``{"name": "onnx", "threads": 2}``.
        ``allow_failed`` also opens a variant that failed `verify`, or whose manifest was edited.
        """
        path = arguments.folder_path(path, "path")
        device = str(device)
        dtype = arguments.option(
            arguments.dtype_name(dtype), "dtype", str, expected="auto, float32, bfloat16 or float16"
        )
        arguments.option(variant, "variant", str, type(None), expected="a variant's name, as a text")
        arguments.option(runtime, "runtime", str, Mapping, type(None), expected="a name or {'name': ...}")
        if folder := find_bundle(path):
            if dtype != "auto":
                raise ConfigError(
                    f"{path} is a bundle, whose variants have a dtype: use variant= instead of dtype="
                )
            opened = open_bundle(
                folder,
                runtime=runtime,
                variant=variant,
                device=device,
                plugins=plugins,
                allow_failed=allow_failed,
            )
            return cls(*opened)
        if runtime is not None or variant is not None:
            raise ConfigError(
                f"{path} is a checkpoint: it runs in torch, and has no variants. runtime and variant are"
                " for bundles; make one with: janus-modular export MODEL BUNDLE"
            )
        try:
            from janus_modular.checkpoints import ModelAssembly
            from janus_modular.model.device import choose_device
        except ModuleNotFoundError as error:  # torch is of no use for what does not exist
            if path_exists(path) or is_hub_id(str(path)):
                raise
            raise CheckpointError(
                f"there is no file or folder '{printable(path)}'. Give the path of a bundle or a checkpoint,"
                " or a hub id (owner/name)."
            ) from error

        on = choose_device(device)
        return cls.of(ModelAssembly.from_checkpoint(path, device=on, dtype=dtype, plugins=plugins), plugins)

    @classmethod
    def from_components(
        cls,
        *,
        encoder: str | Mapping[str, Any],
        backbone: str | Mapping[str, Any],
        tokenizer: str | Mapping[str, Any] = "llamagen",
        encoder_adaptor: str | Mapping[str, Any] = "mlp",
        code_adaptor: str | Mapping[str, Any] = "mlp",
        head: str | Mapping[str, Any] = "mlp",
        size: int | tuple[int, int] = 384,
        processor: Mapping[str, Any] | None = None,
        plugins: Plugins | None = None,
    ) -> Janus:
        """Build a model from components; components without ``pretrained`` have random weights.

        A component is a registered name, or ``{"name": ..., **options}``. ``size`` of generated images, in
        pixels: (height, width), or an integer for both. ``processor``: as in a config (tokenizer, ...).
        """
        from janus_modular.checkpoints import ModelAssembly
        from janus_modular.config import load, resolve
        from janus_modular.config.schema import ModelConfig, raw_model

        plugins, size = plugins or default_plugins(), (size, size) if isinstance(size, int) else size
        raw = raw_model(
            encoder=encoder,
            backbone=backbone,
            tokenizer=tokenizer,
            encoder_adaptor=encoder_adaptor,
            code_adaptor=code_adaptor,
            head=head,
            size=size,
            processor=processor or {},
        )
        config = resolve(load(raw), ModelConfig, plugins)
        return cls.of(ModelAssembly.from_config(config, plugins), plugins)

    @classmethod
    def compose(cls, **_: Any) -> Janus:
        """Raise ConfigError: the method has another name now."""
        raise ConfigError("Janus.compose is called from_components now, with the same arguments.")

    @classmethod
    def of(cls, assembly: ModelAssembly, plugins: Plugins | None = None) -> Janus:
        """Return a `Janus` that runs this model in torch, after training for instance."""
        from janus_modular.checkpoints import ModelAssembly
        from janus_modular.model.session import TorchRuntime

        arguments.option(assembly, "assembly", ModelAssembly, expected="a ModelAssembly(model, processor)")
        model, processor = assembly.model.eval(), assembly.processor
        runtime = TorchRuntime(model, pad=processor.pad_id, suppressed_ids=processor.suppressed_ids)
        plugins = (plugins or default_plugins()).as_recorded(assembly.provenance.plugins)
        return cls(runtime, processor, plugins, assembly=assembly)

    @property
    def assembly(self) -> ModelAssembly:
        """The model in torch, its processor and its provenance; ConfigError if a bundle is open."""
        if self._assembly is None:
            raise ConfigError("this is a bundle: it has graphs, and no model in torch. Load the checkpoint")
        return self._assembly

    @property
    def model(self) -> JanusModel:
        """The model in torch; ConfigError if a bundle is open."""
        return self.assembly.model

    def __repr__(self) -> str:
        """Return parameters, device and dtype of the model, or runtime and variant of the bundle."""
        if self._assembly is None:
            variant = f", variant {self.runtime.variant}" if isinstance(self.runtime, VariantRuntime) else ""
            return f"Janus({type(self.runtime).__name__}{variant})"
        parameters = [*self.model.parameters()]
        dtype = str(next(self.model.backbone.parameters()).dtype).removeprefix("torch.")  # type: ignore[attr-defined]
        millions = sum(parameter.numel() for parameter in parameters) / 1e6
        return f"Janus({millions:,.3f} M parameters, torch on {parameters[0].device}, {dtype})"

    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Janus:
        """Move the model to a device, and convert its weights to a dtype, in place; return this object.

        Converting to half precision and back to float32 does not restore the rounded weights.

        Raises:
            ConfigError: a bundle is open, or the device is not available.
            CheckpointError: the dtype is none of float32, bfloat16 and float16.
        """
        name = None if device is None else str(device)
        self.assembly.move(device=name, dtype=None if dtype is None else arguments.dtype_name(dtype))
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a checkpoint in the native format: weights, config, tokenizer, model card."""
        from janus_modular.checkpoints import save

        save(self.assembly, arguments.folder_path(folder, "folder"), plugins=self.plugins)

    @overload
    def chat(
        self,
        question: Question,
        images: Images = ...,
        *,
        stream: Literal[False] = ...,
        max_tokens: int | None = ...,
        temperature: float | None = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        seed: int | None = ...,
        stop: Many[str] = ...,
        **settings: Any,
    ) -> Answer: ...
    @overload
    def chat(
        self, question: Question, images: Images = ..., *, stream: Literal[True], **settings: Any
    ) -> AnswerStream: ...
    def chat(
        self,
        question: Question,
        images: Images = (),
        *,
        stream: bool = False,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Many[str] = (),
        **settings: Any,
    ) -> Answer | AnswerStream:
        """Return the answer to a question: an `Answer`, a ``str`` with ``finish_reason`` and ``usage``.

        With ``stream``, return an `AnswerStream` instead, which yields the text in parts as it is generated.
        ``images`` are put before the text; for a conversation, put them into its messages instead. An image
        is a path, the bytes of a file, a PIL image, or an array (H, W, 3).
        ``stop``: strings at which the answer ends, without them.
        All other keywords are settings of the text sampler; None selects the default. The built-in sampler
        has max_tokens 512, temperature 0 (greedy), top_k 0 and top_p 1 (both: no limit), seed 0.

        Raises:
            PromptError: a setting is unknown or out of its range, or the prompt fills the context.
            CheckError: the text sampler violates its protocol.
        """
        named = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        chosen = samplers.chosen(settings, **named, seed=seed)
        answers = AnswerStream(self.answers([(question, images)], stop=stop, **chosen))
        if not stream:
            deque(answers, maxlen=0)  # runs to the end
        return answers if stream else answers.answer

    def chat_batch(self, questions: Many[tuple[Question, Images]], **settings: Any) -> list[Answer]:
        """Return the answers to several (question, images), computed in one batch, each as by `chat`.

        Repeated questions have different noise, so that their sampled answers differ.
        """
        batch = self.answers(questions, **settings)
        for _ in batch:
            pass
        return batch.answers

    def answers(
        self, questions: Many[tuple[Question, Images]], *, stop: Many[str] = (), **settings: Any
    ) -> AnswerBatch:
        """Return an iterator over (index of the question, next part of its answer).

        Arguments as for `chat_batch` and `chat`; answers do not depend on each other.
        """
        pairs = arguments.questions(questions)
        stop = arguments.stop_strings(stop)
        if not pairs:
            return AnswerBatch([], iter(()))
        sampler, sampler_settings = self._text_sampler(settings)
        prompts = [self.processor.chat_prompt(arguments.conversation(*pair)) for pair in pairs]
        for row, prompt in enumerate(prompts):
            if len(prompt) >= self.runtime.context:
                which = f" of question {row}" if len(prompts) > 1 else ""
                raise PromptError(
                    f"the prompt{which} has {len(prompt)} positions, the context {self.runtime.context}:"
                    " shorten it"
                )
        rows = [
            AnswerRow(
                self.processor.stream(stop),
                sampler_settings,
                prompt=prompt,
                context=self.runtime.context,
                begin_image=self.processor.tokenizer.special_id("begin_image"),
            )
            for prompt in prompts
        ]
        sampler_settings = replace(sampler_settings, max_tokens=max(row.max_tokens for row in rows))
        sampler_settings = samplers.with_numbers(sampler_settings, prompts)
        max_seq_len = max(len(prompt) + row.max_tokens for prompt, row in zip(prompts, rows, strict=True))
        steps = sampler(self.runtime.open(max_seq_len), prompts, sampler_settings)
        return AnswerBatch(rows, samplers.stream_texts(self.runtime.text_sampler, steps, rows))

    def draw(
        self,
        prompt: str | Many[str] | Many[Message],
        n: int = 1,
        *,
        images: Images = (),
        image_form: arguments.ImageForm = "input",
        size: int | tuple[int, int] | None = None,
        batch_size: int = 8,
        progress: Callable[[int, int], None] | bool | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        image_guidance: float | None = None,
        seed: int | None = None,
        **settings: Any,
    ) -> Drawings:
        """Return ``n`` images of each prompt, in order: `Drawings`, a list of PIL images.

        ``prompt``: a text, several, or one conversation of messages, whose images are part of it. ``images``
        come before each text, as in `chat`: what is to be changed, say. ``image_form`` "input" gives them to
        the understanding encoder, "encoded" as codes, and "both" in both forms, as Janus-4o was trained.
        ``size`` in pixels, (height, width) or one number for both: another than the model's own.

        Its ``encoded`` are the codes of the images, ``usage`` their tokens, and ``settings`` all settings.
        ``batch_size``: images drawn at once; changes only memory and speed.
        ``progress``: True shows a progress bar; a function is called with (steps done, steps in all).
        ``guidance``, ``temperature``, ``seed`` and ``settings`` are settings of the image sampler; None
        selects the default. The sampler of Janus has guidance 5, temperature 1, image_guidance 0 (Janus-4o's
        third row), seed 0, prefix (codes that images begin with) and first 0: image i of a prompt has noise
        from (seed, first + i).

        Raises:
            PromptError: ``n`` or ``batch_size`` is less than 1, a setting is unknown or out of its range, the
                model takes no images as it draws them, or does not draw the size.
            ImageError: an image cannot be read.
            CheckError: the image sampler violates its protocol.
        """
        n, batch_size = arguments.count(n, "n"), arguments.count(batch_size, "batch_size")
        progress = arguments.callback(progress, "progress")
        conversations = arguments.drawing_conversations(prompt, images, image_form)
        named = {"guidance": guidance, "temperature": temperature, "image_guidance": image_guidance}
        chosen = samplers.chosen(settings, **named, seed=seed)
        sampler, sampler_settings = self._image_sampler(chosen)
        num_tokens = self.processor.drawing.num_tokens if self.processor.drawing else 0
        if image_size := chosen_size(self.runtime, self.processor, size):
            num_tokens = image_size.positions
        prompts = [
            prompt
            for messages in conversations
            for prompt in [self.processor.draw_prompt(messages, positions=num_tokens)] * n
        ]
        batches = samplers.batches(sampler_settings, prompts, batch_size)
        drawings, encoded = list[Image.Image](), list[NDArray[Any]]()
        with samplers.progress_bar(progress) as report:
            for index, (batch, batch_settings) in enumerate(batches):
                session = open_session(self.runtime, max(map(len, batch)) + num_tokens, image_size)

                def on_progress(done: int, total: int, index: int = index) -> None:
                    report(index * total + done, len(batches) * total)

                steps = sampler(session, batch, batch_settings)
                drawn = samplers.draw_images(self.runtime.image_sampler, steps, len(batch), on_progress)
                drawings += map(to_image, drawn.images)
                encoded.extend([] if drawn.encoded is None else drawn.encoded)
        usage = [usage_of(prompt, image_tokens=num_tokens) for prompt in prompts]
        return Drawings(drawings, usage, asdict(sampler_settings), encoded or None)
