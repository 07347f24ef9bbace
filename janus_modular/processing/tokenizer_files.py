"""Reading and writing tokenizers: a folder, a ``tokenizer.json``, or "bytes".

The files are those that every tool knows: tokenizer.json, tokenizer_config.json,
special_tokens_map.json and chat_template.jinja.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from janus_modular.atomic_writes import write_text
from janus_modular.config.schema import SpecialTokens
from janus_modular.errors import ConfigError
from janus_modular.foreign import foreign_errors, name_in_errors, read_json, read_text
from janus_modular.processing.text_tokenizer import TextTokenizer

PUBLISHED = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "pad": "<｜▁pad▁｜>",
}
"""Special tokens of Janus' own tokenizer, where its configuration does not name them."""

MAX_GAP = 100_000
"""Ids must be below twice the number of tokens plus this number."""

MAX_GROWTH = 1_000
"""Most characters that a tokenizer's normalizer or decoder may put in place of a single character."""

BYTES_SPECIAL = [
    *PUBLISHED.values(),
    "<begin_of_image>",
    "<end_of_image>",
    "<image_placeholder>",
    "<|User|>",
    "<|Assistant|>",
]


def load_tokenizer(
    source: str | Path, tokens: SpecialTokens | None = None, *, published: bool = False
) -> TextTokenizer:
    """Return the tokenizer of a folder, of a ``tokenizer.json``, or of "bytes".

    With ``published`` (the janus templates) the vocabulary must hold all special tokens but the placeholder.
    Otherwise missing image tokens are added (`TextTokenizer.added`; the backbone's embedding must grow to
    ``vocab_size``), and a missing pad is EOS.

    Raises:
        ConfigError: the tokenizer is missing or damaged, or lacks a special token.
    """
    with name_in_errors(source), foreign_errors(f"the tokenizer {source}", ConfigError):
        return _load(source, tokens, published=published)


def _load(source: str | Path, tokens: SpecialTokens | None, *, published: bool) -> TextTokenizer:
    tokens = tokens or SpecialTokens()
    core, folder, config = _read(source)
    names = {name: getattr(tokens, name) or _configured(config, name) for name in PUBLISHED}
    if published or source == "bytes":
        names = {name: string or PUBLISHED[name] for name, string in names.items()}
    names["pad"] = names["pad"] or names["eos"]
    names |= {name: getattr(tokens, name) for name in ("begin_image", "end_image", "placeholder")}
    known = core.get_vocab(with_added_tokens=True)
    missing = {name: s for name, s in names.items() if s is not None and s not in known}
    may_add = {"placeholder"} if published else {"begin_image", "end_image", "placeholder", "pad"}
    if source == "bytes":
        may_add = set(names)
    if names["eos"] is None:
        raise ConfigError(
            f"the tokenizer {source} does not say which token ends a text. Name it: processor.tokens.eos=..."
        )
    if absent := {name: s for name, s in missing.items() if name not in may_add}:
        raise ConfigError(
            f"the tokenizer {source} lacks {', '.join(f'{s!r} ({name})' for name, s in absent.items())}. "
            "Its own tokens are named by processor.tokens.NAME=...; "
            "for a tokenizer that is not Janus', set processor.template to chat or plain."
        )
    added = list(dict.fromkeys(missing.values()))
    listed = {token.content for token in core.get_added_tokens_decoder().values()}
    core.add_special_tokens(
        [
            AddedToken(s, special=True, normalized=False)
            for s in dict.fromkeys(names.values())
            if s is not None and s not in listed
        ]
    )
    bos = None if names["bos"] is None else core.token_to_id(names["bos"])
    adds_bos = config.get("add_bos_token")
    if adds_bos is None:
        adds_bos = source == "bytes" or core.encode("").ids[:1] == [bos]
    return TextTokenizer(
        core,
        names,
        config=config,
        chat_template=_chat_template(folder, config),
        adds_bos=bool(adds_bos) and bos is not None,
        added=added,
    )


def compare_vocabularies(source: str | Path, reference: str | Path) -> list[str]:
    """Return the tokens of ``reference`` that have another id in a tokenizer, or are missing there.

    A special token of the reference may be missing, since reserved tokens are renamed.
    """
    core, expected = _read(source)[0], _read(reference)[0]
    ids = core.get_vocab(with_added_tokens=True)
    special = {token.content for token in expected.get_added_tokens_decoder().values() if token.special}
    vocabulary = sorted(expected.get_vocab(with_added_tokens=True).items(), key=lambda pair: pair[1])
    return [
        f"{token!r} is {ids.get(token, 'missing')}, expected {id}"
        for token, id in vocabulary
        if ids.get(token) != id and not (token in special and token not in ids)
    ]


def save_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """Write the files of a tokenizer, which transformers reads too."""
    named = {f"{name}_token": tokenizer.names[name] for name in PUBLISHED if tokenizer.names[name]}
    stale = ("chat_template", "added_tokens_decoder")  # the first has a file, the second is in tokenizer.json
    config = {key: value for key, value in tokenizer.config.items() if key not in stale}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config, **named}
    names = (tokenizer.names[name] for name in ("begin_image", "end_image", "placeholder"))
    images = [name for name in names if name is not None]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", tokenizer.core.to_str(pretty=True))
    write_text(folder / "tokenizer_config.json", _json({**config, "add_bos_token": tokenizer.adds_bos}))
    write_text(folder / "special_tokens_map.json", _json({**named, "additional_special_tokens": images}))
    if tokenizer.chat_template:
        write_text(folder / "chat_template.jinja", tokenizer.chat_template)


def byte_tokenizer(special: list[str]) -> Tokenizer:
    """Return a tokenizer without training: ids 0 to 255 are bytes, the ``special`` tokens follow in order."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    return tokenizer


def vocabulary_problem(folder: Path) -> str:
    """Return what is wrong with a folder's sentencepiece or tiktoken file; "" if nothing is known to be.

    transformers reports that tiktoken is not installed, whatever else is the reason.
    """
    for file in sorted(folder.glob("*.model")):
        content = file.read_bytes()
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", content):
            continue  # tiktoken's
        if not _is_sentencepiece(content):
            return (
                f"{file.name} ({len(content)} bytes) is neither a sentencepiece nor a tiktoken vocabulary, or"
                " it is damaged: fetch it again"
            )
        if find_spec("sentencepiece") is None:
            return (
                f"reading {file.name} needs the package 'sentencepiece', which is not installed:"
                " pip install sentencepiece"
            )
    return ""


def _is_sentencepiece(content: bytes) -> bool:
    """Return True if bytes are a protocol buffer of fields with lengths, the first of them a piece."""
    position = 0
    while position < len(content):
        tag, position = content[position], position + 1
        length = shift = 0
        while position < len(content):
            byte, position = content[position], position + 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        position += length
        if tag & 7 != 2:  # the type of fields with a length
            return False
    return content[:1] == b"\n" and position == len(content)


def _read(source: str | Path) -> tuple[Tokenizer, Path | None, dict[str, Any]]:
    """Return the tokenizer, its folder, and its configuration."""
    if source == "bytes":
        return byte_tokenizer(BYTES_SPECIAL), None, {}
    path = Path(source)
    folder, file = (path, path / "tokenizer.json") if path.is_dir() else (None, path)
    if not file.is_file():
        have = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if folder else "nothing"
        raise ConfigError(
            f"no tokenizer.json at {source} (found: {have or 'an empty folder'}). Expected a folder with "
            "one, the file itself, or 'bytes'. A tokenizer.model is converted by transformers: "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    text = read_text(file, ConfigError)
    with foreign_errors(file, ConfigError, "Expected a tokenizer.json; fetch it again."):
        tree = json.loads(text)
        _check_growth(tree, file)
        core = Tokenizer.from_str(text)
        _check_ids(core, tree.get("added_tokens") or [], file)
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json") if folder else ():
        if (path / name).is_file():
            read = read_json(path / name, ConfigError)
            config |= {key: value for key, value in read.items() if value is not None}
    for id, token in config.get("added_tokens_decoder", {}).items():
        if core.token_to_id(token["content"]) is None:
            core.add_tokens([AddedToken(**token)])
            _check_ids(core, [{**token, "id": int(id)}], path / "tokenizer_config.json")
    return core, folder, config


def _byte_characters() -> list[str]:
    """Return the character of each byte in byte-level vocabularies (as in GPT-2's).

    Bytes that print in Latin-1 are themselves; all others take the characters from U+0100 on.
    """
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(spare)) for byte in range(256)]


def _check_growth(tree: dict[str, Any], file: Path) -> None:
    """Check that no chain of replacements makes gigabytes of a short text, which would end the process.

    Raises:
        ConfigError: a character could become more than `MAX_GROWTH` characters.
    """
    for component in ("normalizer", "decoder"):
        growth, steps = 1, [tree.get(component)]
        for step in steps:  # a sequence adds its own steps to the list
            if isinstance(step, dict):
                steps += [inner for key in ("normalizers", "decoders") for inner in step.get(key) or ()]
                texts = [step.get(key) for key in ("content", "prepend")]
                growth *= max([1, *(len(text) for text in texts if isinstance(text, str))])
        if growth > MAX_GROWTH:
            raise ConfigError(
                f"{file}: its {component} may replace a character by {growth:,} characters; expected at most"
                f" {MAX_GROWTH:,}. Fetch it again."
            )


def _check_ids(core: Tokenizer, added: list[dict[str, Any]], file: Path) -> None:
    """Check that a tokenizer's ids are those in its file, that each has one token, and that none is huge.

    The library renumbers added tokens, and accepts any id of 32 bits, though the embedding and the library's
    own lists, which have as many rows, would not fit into memory.

    Raises:
        ConfigError: an id differs from that in the file, has two tokens, or is huge.
    """
    vocabulary = core.get_vocab(with_added_tokens=True)
    ids = vocabulary.values()
    if ids and max(ids) >= 2 * len(ids) + MAX_GAP:
        raise ConfigError(
            f"{file} has {len(ids):,} tokens, and ids up to {max(ids):,}: expected ids without large gaps."
            " Renumber the ids without gaps."
        )
    if len(set(ids)) < len(ids):
        owners: dict[int, str] = {}
        for token, id in vocabulary.items():
            if owners.setdefault(id, token) != token:
                raise ConfigError(
                    f"{file} gives the id {id} to {owners[id]!r} and to {token!r}: expected one token an id."
                    " Fetch it again."
                )
    for entry in added:
        if core.token_to_id(entry["content"]) != entry["id"]:
            raise ConfigError(
                f"{file} gives the added token {entry['content']!r} the id {entry['id']}, which would become"
                f" {core.token_to_id(entry['content'])}: expected ids that follow those of the vocabulary."
            )


def _configured(config: dict[str, Any], name: str) -> str | None:
    """Return the configuration's bos, eos or pad token: a string, or the ``content`` of an object."""
    token = config.get(f"{name}_token")
    string = token["content"] if isinstance(token, dict) else token
    if not isinstance(string, str | None):
        raise ConfigError(f"its configuration has {name}_token: {string!r:.60}; expected a string.")
    return string


def _chat_template(folder: Path | None, config: dict[str, Any]) -> str | None:
    if folder and (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja", ConfigError)
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str | None):
        raise ConfigError(f"its chat_template is a {type(template).__name__}; expected a jinja program.")
    return template


def _json(x: Any) -> str:
    return json.dumps(x, ensure_ascii=False, indent=2) + "\n"
