"""Training samples and prompts are rendered equally, whatever a chat template does.

The templates are written for this file; each has the structure of a known family.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from janus_modular.errors import ConfigError, PromptError
from janus_modular.processing.processor import Processor
from janus_modular.processing.prompt_check import check_prompts
from janus_modular.sequence import ImageInput, ImageTarget, Message, Sample, Text
from janus_modular.training.run_setup import batch_builder

IMAGE = Image.new("RGB", (9, 7))
SPECIAL = ["<|end|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|system|>"]

THINK_BLOCK = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set words = m.content %}{% set thought = '' %}
{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
{%- elif '</think>' in words %}
{%- set thought = words.split('</think>')[0] %}
{%- set thought = thought.rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set words = words.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|assistant|>\\n' }}
{%- if loop.index0 > ns.last %}{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
{{- words + '<|end|>\\n' }}
{%- else %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
"""As Qwen3's: the last turn has a block of reasoning, an empty one without any."""

PREFILLED = """\
{{- bos_token }}{% for m in messages %}
{%- if m.role == 'assistant' %}{{- '<|assistant|>' + m.content.split('</think>')[-1] + '<|end|>' }}
{%- else %}{{- '<|' + m.role + '|>' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}
{%- if thinking | default(true) %}{{- '<think>\\n' }}{% endif %}{% endif %}"""
"""As DeepSeek R1's: reasoning is opened by the prompt, and never written."""

BRACKETS = """\
{{- bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + '<|end|>' }}
{%- else %}{{- raise_exception('no system') }}{% endif %}{% endfor %}"""
"""As Mistral's: a space before the answer, no generation prompt, no system text."""

RENAMED = """\
{{- bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<|user|>' + role + '\\n' + m.content | trim + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|user|>model\\n' }}{% endif %}"""
"""As Gemma's: the assistant has another name."""

PARTS_IN_ORDER = """\
{% for m in messages %}{{ '<|' + m.role + '|>' }}{% for part in m['content'] %}
{%- if part['type'] == 'text' %}{{ part['text'] }}
{%- elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}
{%- endfor %}{{ '<|end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
"""As Idefics3's: content is a list of parts."""

PARTS_OF_USERS = """\
{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}
{%- elif m.role == 'user' %}{{ '<|user|>' }}
{%- for part in m.content | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}
{%- for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}
{{- '<|end|>' }}
{%- else %}{{ '<|assistant|>' }}{% generation %}{{ m.content[0]['text'] + '<|end|>' }}{% endgeneration %}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
"""As LLaVA-NeXT's: the system text is a text, all else a list of parts."""

FAMILIES = {
    "think-block": THINK_BLOCK,
    "brackets": BRACKETS,
    "renamed": RENAMED,
    "parts-in-order": PARTS_IN_ORDER,
    "parts-of-users": PARTS_OF_USERS,
}


def tokenizer(template: str, *special: str) -> PreTrainedTokenizerFast:
    """Return one with a token for each byte and the special tokens of this file."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([*SPECIAL, *special])
    fast = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|bos|>", eos_token="<|end|>")
    fast.chat_template = template
    return fast


@pytest.fixture
def processor_of(make: Callable[..., Processor], tmp_path: Path) -> Callable[..., Processor]:
    def processor_of(template: str, *special: str, **options: Any) -> Processor:
        tokenizer(template, *special).save_pretrained(tmp_path)
        return make("chat", tmp_path, **options)

    return processor_of


def user(text: str) -> Message:
    return Message("user", [Text(text)])


def assistant(text: str, *, reasoning: str | None = None, learned: bool = True) -> Message:
    thought = None if reasoning is None else Text(reasoning, learned)
    return Message("assistant", [Text(text, learned)], thought)


def drawing() -> Message:
    return Message("assistant", [ImageTarget(IMAGE)])


SYSTEM = Message("system", [Text("Be brief.")])
HISTORIES = {
    "one turn": [user("a cat")],
    "two turns": [user("Hi"), assistant("Yes?", learned=False), user("a cat")],
    "three turns": [user("Hi"), assistant("Yes?", learned=False)] * 2 + [user("a")],
}


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
@pytest.mark.parametrize("system", [False, True], ids=["no system", "system"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_prefixes_of_training_sequences(
    processor_of: Callable[..., Processor], family: str, system: bool, history: list[Message]
) -> None:
    processor = processor_of(FAMILIES[family])
    conversation = [SYSTEM, *history] if system else history
    if system and family == "brackets":
        with pytest.raises(PromptError, match="no system"):
            processor.draw_prompt(conversation)
        return
    drawn = processor.sequence(Sample([*conversation, drawing()])).tokens.tolist()
    expected_prompt = processor.draw_prompt(conversation).tokens.tolist()
    assert drawn[: len(expected_prompt)] == expected_prompt
    assert drawn[len(expected_prompt)] == processor.tokenizer.special_id("placeholder")
    answered = processor.sequence(Sample([*conversation, assistant("Fine.")])).tokens.tolist()
    expected_prompt = processor.chat_prompt(conversation).tokens.tolist()
    assert answered[: len(expected_prompt)] == expected_prompt
    check_prompts(processor)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_equal_transformers(processor_of: Callable[..., Processor], family: str) -> None:
    theirs, processor = tokenizer(FAMILIES[family]), processor_of(FAMILIES[family])
    messages = [*HISTORIES["two turns"], assistant("Fine.")]

    def content(message: Message) -> Any:
        text = "".join(segment.text for segment in message.content)
        return [{"type": "text", "text": text}] if family.startswith("parts") else text

    turns = [{"role": message.role, "content": content(message)} for message in messages]
    expected = theirs.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert processor.sequence(Sample(messages)).tokens.tolist() == expected
    expected = theirs.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
    assert processor.chat_prompt(messages[:-1]).tokens.tolist() == expected


def test_drawing_prompt_has_the_reasoning_block_of_training(
    processor_of: Callable[..., Processor], words: Callable[..., str]
) -> None:
    processor = processor_of(THINK_BLOCK)
    text = words(processor, processor.draw_prompt("a cat").tokens)
    assert text.endswith("<|assistant|>\n<think>\n\n</think>\n\n<begin_of_image>")
    goes_on = processor.draw_prompt([user("a cat"), assistant("Here: ", learned=False)])
    assert words(processor, goes_on.tokens).endswith("</think>\n\nHere: <begin_of_image>")


REASONED = {
    "reasoning_content": assistant("Four.", reasoning="two and two"),
    "tags": assistant("<think>\ntwo and two\n</think>\n\nFour."),
}


@pytest.mark.parametrize("answer", REASONED.values(), ids=REASONED)
def test_supervised_reasoning_equals_transformers(
    processor_of: Callable[..., Processor], learned: Callable[..., str], answer: Message
) -> None:
    theirs, processor = tokenizer(THINK_BLOCK), processor_of(THINK_BLOCK)
    messages = [user("2 + 2?"), answer]
    turns = [{"role": m.role, "content": "".join(s.text for s in m.content)} for m in messages]
    if answer.reasoning_content:
        turns[1]["reasoning_content"] = answer.reasoning_content.text
    sequence = processor.sequence(Sample(messages))
    assert sequence.tokens.tolist() == theirs.apply_chat_template(turns, return_dict=False)
    assert learned(processor, sequence) == "<think>\ntwo and two\n</think>\n\nFour.<|end|>"
    read = [user("2 + 2?"), assistant("Four.", reasoning="two and two", learned=False), user("And?")]
    expected = theirs.apply_chat_template(
        [*turns, {"role": "user", "content": "And?"}], add_generation_prompt=True, return_dict=False
    )
    assert processor.chat_prompt(read).tokens.tolist() == expected


def test_omitted_reasoning_is_an_error(processor_of: Callable[..., Processor]) -> None:
    processor = processor_of(THINK_BLOCK)
    later = [user("And?"), assistant("Five.")]
    with pytest.raises(PromptError, match="leaves out supervised reasoning of message 1"):
        processor.sequence(Sample([user("2 + 2?"), REASONED["reasoning_content"], *later]))
    with pytest.raises(PromptError, match="leaves out supervised reasoning of message 1"):
        processor.sequence(Sample([user("2 + 2?"), REASONED["tags"], *later]))
    read = [user("2 + 2?"), assistant("Four.", reasoning="two", learned=False), user("And?")]
    with pytest.raises(PromptError, match="never writes reasoning_content, which message 1 has"):
        processor_of(RENAMED).chat_prompt(read)


def test_tags_in_user_messages_stay_text(processor_of: Callable[..., Processor]) -> None:
    """Tags are looked for in what the assistant says; special tokens in words stay words for all."""
    processor = processor_of(THINK_BLOCK, "<think>", "</think>")
    end = processor.tokenizer.special_id("eos")
    turns = [
        user("<think>x</think> <|end|>"),
        assistant("<think>\nhm <|end|>\n</think>\n\nHi", learned=False),
    ]
    prompt = processor.chat_prompt([*turns, user("And?")])
    assert (prompt.tokens == end).sum() == 3  # one a turn
    assert not (prompt.tokens == processor.tokenizer.id_of("<think>")).any()


CLOSED = """\
{%- for m in messages %}{% set words = m.content %}
{%- if m.role == 'assistant' and not loop.last and '</think>' in words %}
{%- set words = words.split('</think>')[-1] %}{% endif %}
{{- '<|' + m.role + '|>' + words + '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"""
"""As LFM2's: reasoning is taken out of earlier turns, and stays in the last as it is."""


@pytest.mark.parametrize("special", [("<think>", "</think>"), ()], ids=["tokens", "letters"])
@pytest.mark.parametrize("template", [CLOSED, THINK_BLOCK])
def test_tags_in_answers_equal_transformers(
    processor_of: Callable[..., Processor], template: str, special: tuple[str, ...]
) -> None:
    theirs, processor = tokenizer(template, *special), processor_of(template, *special)
    messages = [user("2 + 2?"), assistant("<think>\ntwo and two\n</think>\n\nFour, by </b>.")]
    turns = [{"role": m.role, "content": "".join(s.text for s in m.content)} for m in messages]
    sequence = processor.sequence(Sample(messages))
    assert sequence.tokens.tolist() == theirs.apply_chat_template(turns, return_dict=False)
    turns = [{"role": "user", "content": "Is <think> a tag?"}]
    prompt = processor.chat_prompt([user("Is <think> a tag?")]).tokens.tolist()
    assert (prompt == theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)) == (
        not special  # what users write stays letters
    )


def test_reasoning_tags_do_not_stop_answers(processor_of: Callable[..., Processor]) -> None:
    processor = processor_of(THINK_BLOCK, "<think>", "</think>")
    assert processor.stop.ids == (processor.tokenizer.id_of("<|end|>"),)


def test_template_whose_prompts_are_no_prefixes_is_an_error_at_the_start(
    processor_of: Callable[..., Processor],
) -> None:
    processor = processor_of(PREFILLED)
    with pytest.raises(ConfigError) as refusal:
        check_prompts(processor)
    text = str(refusal.value)
    assert "trained: '<|bos|><|user|>a<|assistant|>'" in text
    assert r"prompt:  '<|bos|><|user|>a<|assistant|><think>\n'" in text
    assert "set processor.template_variables (it reads thinking)" in text
    assert "last turn" not in text  # which is already what it was tried on
    config = SimpleNamespace(length=None)
    model = SimpleNamespace(backbone=SimpleNamespace(context=100), generation=None)
    with pytest.raises(ConfigError, match="in training than in the prompt"):
        batch_builder(config, {}, model, processor)
    with pytest.raises(PromptError, match="in training than in the prompt"):
        processor.sequence(Sample([user("Hi"), assistant("Yes.")]))
    check_prompts(processor_of(PREFILLED, template_variables={"thinking": False}))
    processor.chat_prompt([user("Hi")])  # who only asks gets the template's own prompt


@pytest.mark.parametrize(
    ("end", "warns"),
    [
        ("{{ '<|end|>' }}", False),
        ("{{ '\\n<|end|>\\n' }}", False),
        ("{% if not loop.last %}{{ '<|end|>' }}{% endif %}", True),
        ("{{ '\\n\\n' }}", True),
        ("{{ '</s>' }}", True),  # letters here, no token
    ],
)
def test_warns_if_no_end_of_answers_is_learned(
    processor_of: Callable[..., Processor], caplog: pytest.LogCaptureFixture, end: str, warns: bool
) -> None:
    turns = f"{{% for m in messages %}}{{{{ '<|' + m.role + '|>' + m.content }}}}{end}{{% endfor %}}"
    check_prompts(processor_of(turns))
    assert ("no token that ends an answer is learned" in caplog.text) == warns
    assert ("writes no <|end|> behind the last answer" in caplog.text) == warns


def test_checks_the_prompt_of_an_image_before_the_last_turn(
    processor_of: Callable[..., Processor],
) -> None:
    messages = [user("a cat"), drawing(), user("And?"), assistant("That was a cat.")]
    with pytest.raises(PromptError, match=r"before the image to draw of message 1 in training(?s:.)*think"):
        processor_of(THINK_BLOCK).sequence(Sample(messages))
    assert processor_of(RENAMED).sequence(Sample(messages)).generation_mask.sum() == 3
    with pytest.raises(PromptError, match="before the answer of message 1 in training"):
        processor_of(THINK_BLOCK, template_variables={"enable_thinking": False}).sequence(
            Sample([user("Hi"), assistant("Yes?"), user("Why?"), assistant("So.")])
        )


@pytest.mark.parametrize("template", ["janus", "janus-pro"])
def test_system_text_depends_on_the_first_answer_alone(
    make: Callable[..., Processor], words: Callable[..., str], template: str
) -> None:
    """Answers have one, drawings have none, and what goes on from either keeps what it has."""
    processor = make(template)
    both = [user("Draw"), Message("assistant", [Text("Here:", True), ImageTarget(IMAGE)])]
    conversations = [
        both,
        [user("a"), assistant("b"), *both],
        [user("a"), drawing(), user("b"), assistant("c")],
    ]
    for conversation, has_system in zip(conversations, (True, True, False), strict=True):
        trained = processor.sequence(Sample(conversation)).tokens.tolist()
        assert ("You are a helpful" in words(processor, trained)) == has_system
        for i, message in enumerate(conversation):
            for k, segment in enumerate(message.content if message.role == "assistant" else ()):
                before = [*conversation[:i], *([Message("assistant", message.content[:k])] if k else [])]
                draws = isinstance(segment, ImageTarget)
                expected_prompt = (processor.draw_prompt if draws else processor.chat_prompt)(
                    before
                ).tokens.tolist()
                assert trained[: len(expected_prompt)] == expected_prompt


def test_template_variables_reach_training_prompts_and_checkpoints(
    processor_of: Callable[..., Processor], words: Callable[..., str], tmp_path: Path
) -> None:
    processor = processor_of(THINK_BLOCK, template_variables={"enable_thinking": False})
    processor.save(tmp_path / "saved")
    for each in (processor, Processor.load(tmp_path / "saved")):
        prompt = words(each, each.chat_prompt([user("Hi")]).tokens)
        assert prompt.endswith("<|assistant|>\n<think>\n\n</think>\n\n")
        assert each.to_dict()["template_variables"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    "name", ["enable_thinkin", "messages", "add_generation_prompt", "bos_token", "thought"]
)
def test_unused_template_variable_is_an_error(processor_of: Callable[..., Processor], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"never reads {name}\. It reads enable_thinking"):
        processor_of(THINK_BLOCK, template_variables={name: True})


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), [float("inf")], b"x", object()])
def test_template_variables_must_be_json(processor_of: Callable[..., Processor], value: object) -> None:
    with pytest.raises(ConfigError, match=r"template_variables: .*Expected texts, finite numbers"):
        processor_of(THINK_BLOCK, template_variables={"enable_thinking": value})


def test_built_in_templates_have_no_variables(make: Callable[..., Processor]) -> None:
    for template, source in (("janus-pro", None), ("plain", "bytes")):
        with pytest.raises(
            ConfigError, match=f"'{template}' never reads enable_thinking. It reads no variables"
        ):
            make(template, *filter(None, [source]), template_variables={"enable_thinking": True})


@pytest.mark.parametrize("family", ["parts-in-order", "parts-of-users"])
def test_images_keep_their_positions_in_lists_of_parts(
    processor_of: Callable[..., Processor], words: Callable[..., str], family: str
) -> None:
    processor = processor_of(FAMILIES[family])
    prompt = processor.chat_prompt([Message("user", [Text("Is "), ImageInput(IMAGE), Text(" red?")])])
    shown = words(processor, prompt.tokens)
    image = f"<begin_of_image>{'<image_placeholder>' * 4}<end_of_image>"
    assert f"<|user|>Is {image} red?<|end|>" in shown


@pytest.mark.parametrize(
    "shortened", ["m.content | truncate(12, true)", "m.content[:3]", "m.content | first"]
)
def test_a_template_that_shortens_texts_is_refused_and_gets_no_lists(
    processor_of: Callable[..., Processor], shortened: str
) -> None:
    """Jinja would write a list of parts as Python does: [{'type': 'text', ...}]."""
    template = f"{{% for m in messages %}}[{{{{ m.role }}}}]{{{{ {shortened} }}}}[/]{{% endfor %}}"
    with pytest.raises(PromptError, match=r"^((?!type).)*$"):
        processor_of(template).chat_prompt([user("hello, how are you today?")])
