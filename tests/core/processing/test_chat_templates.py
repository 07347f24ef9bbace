"""Any model's own chat template: the ids that transformers gives, and the answer's words as labels."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from janus_modular.errors import ConfigError, PromptError
from janus_modular.processing.processor import Processor
from janus_modular.processing.prompt_check import check_prompts
from janus_modular.processing.text_tokenizer import TextSpan, TextTokenizer
from janus_modular.sequence import IGNORE_INDEX, ImageInput, ImageTarget, Message, Sample, Text

CORPUS = [
    "You are a helpful assistant. The quick brown fox jumps over the lazy dog, and says hello there.",
    "What is in the image? A red panda reading a book; 2 + 2 = 4.\n\nAnother line\tof text.",
    "<|im_start|>user\nHello<|im_end|> 你好，世界。一只在雪地里的柴犬 é è ü 🦊 assistant system user model\n",
] * 4

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{- bos_token }}{% for message in messages %}{% if message.role == 'tool' %}"
    "{{ raise_exception('unknown role ' ~ message.role) }}{% endif %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
LINES = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def byte_level(special: list[AddedToken | str]) -> Tokenizer:
    """As GPT-2, Llama 3, Qwen and SmolLM2 have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(special)
    return tokenizer


def sentencepiece(scheme: str, special: list[AddedToken | str]) -> Tokenizer:
    """As Llama 2, Mistral and T5 have it: spaces are letters, and one may be put before the text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained = [*(f"<0x{byte:02X}>" for byte in range(256))]
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    spans = ["<unk>", "<s>", "</s>", *trained]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=spans, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    parsed = json.loads(tokenizer.to_str()) | {"added_tokens": []}  # bytes are no special tokens
    tokenizer = Tokenizer.from_str(json.dumps(parsed))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *special])
    return tokenizer


def rstripping(*strings: str) -> list[AddedToken]:
    return [AddedToken(s, special=True, normalized=False, rstrip=True) for s in strings]


FAMILIES: dict[str, tuple[Callable[[], Tokenizer], str, str | None, str]] = {
    # name: tokenizer, chat template, bos, eos
    "chatml": (
        lambda: byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        CHATML,
        "<|endoftext|>",
        "<|im_end|>",
    ),
    "headers": (
        lambda: byte_level(["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
        HEADERS,
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "brackets-first": (lambda: sentencepiece("first", []), BRACKETS, "<s>", "</s>"),
    "brackets-always": (lambda: sentencepiece("always", []), BRACKETS, "<s>", "</s>"),
    "brackets-prepend": (lambda: sentencepiece("prepend", []), BRACKETS, "<s>", "</s>"),
    "lines-rstrip": (
        lambda: sentencepiece("prepend", rstripping("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")),
        LINES,
        "<s>",
        "</s>",
    ),
    "chatml-first": (
        lambda: sentencepiece("first", ["<|im_start|>", "<|im_end|>"]),
        CHATML,
        "<s>",
        "<|im_end|>",
    ),
    "no-bos": (
        lambda: byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
        CHATML,
        None,
        "<|im_end|>",
    ),
}


CONVERSATIONS = {
    "one turn": ["Hello there", "Hi."],
    "spaces": ["  two spaces \n", "\n\nlines \t"],
    "two turns": ["What is in the image?", "A red panda", "And this: 你好 🦊?", "é  è\n\n  ü."],
    "starts with a line break": ["\nA", "\nB"],
}


def transformers_tokenizer(name: str) -> PreTrainedTokenizerFast:
    build, template, bos, eos = FAMILIES[name]
    fast = PreTrainedTokenizerFast(tokenizer_object=build(), bos_token=bos, eos_token=eos)
    fast.chat_template = template
    return fast


def turns(texts: list[str]) -> list[Message]:
    return [Message(("user", "assistant")[i % 2], [Text(text)]) for i, text in enumerate(texts)]


def as_dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": "".join(s.text for s in m.content)} for m in messages]


@pytest.fixture(scope="module", params=FAMILIES)
def fast(request: pytest.FixtureRequest) -> tuple[str, PreTrainedTokenizerFast]:
    return request.param, transformers_tokenizer(request.param)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_ids_are_those_of_transformers(
    fast: tuple[str, PreTrainedTokenizerFast],
    conversation: str,
    make: Callable[..., Processor],
    learned: Callable[..., str],
    tmp_path: Path,
) -> None:
    name, theirs = fast
    theirs.save_pretrained(tmp_path)
    processor = make("chat", tmp_path)
    messages = turns(CONVERSATIONS[conversation])
    expected = theirs.apply_chat_template(as_dicts(messages), tokenize=True, return_dict=False)
    expected_prompts = [
        theirs.apply_chat_template(
            as_dicts(messages[:k]), tokenize=True, return_dict=False, add_generation_prompt=True
        )
        for k in range(1, len(messages), 2)
    ]
    assert processor.chat_prompt(messages[:1]).tokens.tolist() == expected_prompts[0]
    if any(expected[: len(prompt)] != prompt for prompt in expected_prompts):
        # The beginning of an answer joins the line break before it: the prompt has other tokens.
        with pytest.raises(PromptError, match="spans the end of the prompt and the beginning of the answer"):
            processor.sequence(Sample(messages))
        return
    sequence = processor.sequence(Sample(messages))
    assert sequence.tokens.tolist() == expected
    # What is learned first continues the prompt: what the model would be asked to say.
    first = int((sequence.labels != IGNORE_INDEX).argmax())
    assert sequence.tokens[: first + 1].tolist() == expected_prompts[0]
    learned_text = learned(processor, sequence)
    end = FAMILIES[name][3] if name != "lines-rstrip" else "<|end|>"
    assert learned_text.count(end) == len(messages) // 2
    for text in CONVERSATIONS[conversation][1::2]:
        assert text.strip() in learned_text
    for text in CONVERSATIONS[conversation][::2]:
        assert text.strip() not in learned_text
    assert "assistant" not in learned_text
    assert "INST" not in learned_text


def test_chatml_supervises_answers_and_their_end_token(
    make: Callable[..., Processor], tmp_path: Path
) -> None:
    theirs = transformers_tokenizer("chatml")
    theirs.save_pretrained(tmp_path)
    sequence = make("chat", tmp_path).sequence(Sample(turns(["Hello there", "A red panda"])))
    answer = [*theirs("A red panda", add_special_tokens=False).input_ids, theirs.eos_token_id]
    assert sequence.labels[sequence.labels != IGNORE_INDEX].tolist() == answer
    line_break = theirs("\n", add_special_tokens=False).input_ids
    assert sequence.tokens[-len(answer) - 1 :].tolist() == [*answer, *line_break]


@pytest.mark.parametrize("name", FAMILIES)
def test_special_token_strings_in_text_stay_text(
    name: str, make: Callable[..., Processor], tmp_path: Path
) -> None:
    theirs = transformers_tokenizer(name)
    theirs.save_pretrained(tmp_path)
    processor = make("chat", tmp_path)
    special = processor.tokenizer.special

    def count(texts: list[str]) -> int:
        tokens = processor.sequence(Sample(turns(texts))).tokens
        return int(np.isin(tokens, [id for s, id in special.items() if s != "<unk>"]).sum())

    plain = count(["a", "b"])
    for string in special:
        if string == "<unk>":
            continue
        attack = f"a {string}{string}b\n{string} {string}"
        assert count([attack, attack]) == plain
        prompt = processor.chat_prompt(turns([f"{string}{string}"]))
        text = processor.tokenizer.core.decode(prompt.tokens.tolist(), skip_special_tokens=False)
        assert f"{string}{string}" in text  # nothing was lost


def test_encodes_special_token_strings_that_are_in_the_vocabulary() -> None:
    spans = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "▁<>/sab")]
    core = Tokenizer(models.Unigram(spans, unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer = TextTokenizer(core, {"bos": "<s>", "eos": "</s>"})
    spans = [TextSpan("<s>", True), TextSpan("a</s>b<s>"), TextSpan("</s>", True)]
    ids = tokenizer.encode(spans).ids.tolist()
    assert [i for i, id in enumerate(ids) if id in (1, 2)] == [0, len(ids) - 1]
    assert len(ids) >= 2 + len("a</s>b<s>")


def test_images_in_a_foreign_template(
    make: Callable[..., Processor], image: Callable[..., object], words: Callable[..., str], tmp_path: Path
) -> None:
    transformers_tokenizer("chatml").save_pretrained(tmp_path)
    processor = make("chat", tmp_path)
    tokenizer = processor.tokenizer
    assert tokenizer.added == ("<begin_of_image>", "<end_of_image>", "<image_placeholder>")
    assert processor.suppress_tokens == tokenizer.added
    assert sorted(processor.suppressed_ids) == list(range(tokenizer.vocab_size - 3, tokenizer.vocab_size))
    read = processor.chat_prompt([Message("user", [ImageInput(image()), Text("\nWhat?")])])
    assert words(processor, read.tokens).endswith(
        "user\n<begin_of_image>"
        + "<image_placeholder>" * 4
        + "<end_of_image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    drawn = processor.sequence(
        Sample([Message("user", [Text("A fox")]), Message("assistant", [ImageTarget(image())])])
    )
    prompt = processor.draw_prompt("A fox")
    assert drawn.tokens[: len(prompt)].tolist() == prompt.tokens.tolist()
    assert drawn.generation_mask.nonzero()[0].tolist() == [len(prompt), len(prompt) + 1, len(prompt) + 2]


def test_stop_ids(make: Callable[..., Processor], tmp_path: Path) -> None:
    for name, end in {"chatml": "<|im_end|>", "headers": "<|eot_id|>", "lines-rstrip": "<|end|>"}.items():
        transformers_tokenizer(name).save_pretrained(tmp_path / name)
        processor = make("chat", tmp_path / name)
        assert set(processor.stop.ids) == {
            processor.tokenizer.id_of(end),
            processor.tokenizer.id_of(FAMILIES[name][3]),
        }
        assert processor.stop.strings == ()


def with_template(template: str, make: Callable[..., Processor], folder: Path) -> Processor:
    theirs = transformers_tokenizer("chatml")
    theirs.chat_template = template
    theirs.save_pretrained(folder)
    return make("chat", folder)


def test_template_that_removes_reasoning(
    make: Callable[..., Processor], words: Callable[..., str], tmp_path: Path
) -> None:
    template = CHATML.replace("message['content']", "message['content'].split('</think>')[-1].lstrip()")
    processor = with_template(template, make, tmp_path)
    messages = turns(["Hello", "<think>hm <|im_end|></think> Hi", "And <|im_start|>?"])
    prompt = processor.chat_prompt(messages)
    assert "Hello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>" in words(processor, prompt.tokens)
    assert (prompt.tokens == processor.tokenizer.id_of("<|im_start|>")).sum() == 5
    with pytest.raises(PromptError, match="changes the content of messages"):
        with_template(
            CHATML.replace("message['content']", "message['content'].replace('H', 'hH')"), make, tmp_path
        ).chat_prompt(turns(["Hello"]))


def test_templates_that_drop_content(make: Callable[..., Processor], tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="drops, repeats or reorders"):
        with_template("{{ messages[0]['content'] }}", make, tmp_path).chat_prompt(turns(["a", "b", "c"]))


def test_templates_that_refuse(make: Callable[..., Processor], tmp_path: Path) -> None:
    transformers_tokenizer("headers").save_pretrained(tmp_path / "headers")
    with pytest.raises(PromptError, match=r"unknown role tool.*roles were user, tool"):
        make("chat", tmp_path / "headers").sequence(
            Sample([Message("user", [Text("a")]), Message("tool", [Text("b", True)])])
        )
    with pytest.raises(ConfigError, match="not valid jinja: line 1"):
        with_template("{% if %}", make, tmp_path / "broken").chat_prompt(turns(["a"]))
    with pytest.raises(PromptError, match="refuses"):  # the sandbox
        with_template("{{ messages.__class__.__mro__ }}", make, tmp_path / "escape").chat_prompt(turns(["a"]))


def test_templates_get_the_usual_helpers(make: Callable[..., Processor], tmp_path: Path) -> None:
    template = (
        "{%- for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}{% generation %}"
        "{{ m['content'] }}{% endgeneration %}{{ {'é': '<'} | tojson }}{{ strftime_now('%Y')[:1] }}"
        "{{ eos_token }}{{ bos_token }}{% endfor %}{% if tools %}x{% endif %}"
    )
    theirs = transformers_tokenizer("chatml")
    theirs.chat_template = template
    theirs.save_pretrained(tmp_path)
    messages = turns(["a", "b"])
    expected = theirs.apply_chat_template(as_dicts(messages), tokenize=True, return_dict=False)
    assert make("chat", tmp_path).sequence(Sample(messages)).tokens.tolist() == expected


def test_missing_chat_template_is_an_error(make: Callable[..., Processor], reference: Path) -> None:
    with pytest.raises(ConfigError, match="has none"):
        make("chat", reference)
    with pytest.raises(ConfigError, match=r"no template 'janus_pro'.*janus-pro"):
        make("janus_pro")


SPACED = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_a_template_whose_prompt_ends_within_a_token_is_an_error(
    make: Callable[..., Processor], tmp_path: Path
) -> None:
    """The text of such a prompt is a prefix of the text in training, its tokens are none."""
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level(["<|im_end|>"]), eos_token="<|im_end|>")
    theirs.chat_template = SPACED
    theirs.save_pretrained(tmp_path)
    messages = turns(["Hello", "book"])
    trained = theirs.apply_chat_template(as_dicts(messages), return_dict=False)
    prompt = theirs.apply_chat_template(as_dicts(messages[:1]), add_generation_prompt=True, return_dict=False)
    assert trained[: len(prompt)] != prompt
    processor = make("chat", tmp_path)
    with pytest.raises(ConfigError, match="has other tokens than the same text in training"):
        check_prompts(processor)
    with pytest.raises(PromptError, match="spans the end of the prompt"):
        processor.sequence(Sample(messages))
    assert processor.chat_prompt(messages[:1]).tokens.tolist() == prompt  # without training, it is used
