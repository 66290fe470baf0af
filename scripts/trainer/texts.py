"""Read documents from .txt and .jsonl files and folders, and convert them to tokens.

Byte-level tokens are the 256 bytes, an end-of-document token and a padding token.
"""

import importlib.util
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ENDINGS = (".txt", ".jsonl")
EOD, PAD = 256, 257
VOCAB_SIZE = 258


class ByteTokenizer:
    """The tokenizer that Megatron's datasets need; ``vocab_size`` may be larger for data tokenized elsewhere."""

    pad = PAD

    def __init__(self, vocab_size=VOCAB_SIZE, eod=EOD):
        self.vocab_size, self.eod = vocab_size, eod
        # Megatron names its index caches after this.
        self.unique_identifiers = OrderedDict({"class": "ByteTokenizer", "vocab_size": str(vocab_size)})

    def tokenize(self, text):
        return list(text.encode("utf-8"))


@dataclass(frozen=True)
class Encoder:
    """Converts text to tokens.

    Args:
        encode: text -> tokens, without an end-of-document token.
        eod: the end-of-document token. vocab_size: largest token + 1.
    """

    name: str
    encode: Callable[[str], list[int]]
    eod: int
    vocab_size: int


def bytes_encoder() -> Encoder:
    return Encoder("bytes", ByteTokenizer().tokenize, EOD, VOCAB_SIZE)


def files_of(inputs: list[str]) -> list[Path]:
    """The named files, and the .txt and .jsonl files of named folders, sorted by path.

    Raises:
        ValueError: a path does not exist, is another kind of file, or is a folder without such files.
    """
    found: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            within = sorted(each for each in path.rglob("*") if each.suffix in ENDINGS and each.is_file())
            if not within:
                raise ValueError(f"--input {name} is a folder without {' or '.join(ENDINGS)} files; name another one.")
            found += within
        elif not path.is_file():
            raise ValueError(f"--input {name} does not exist; give a file of text, of JSON lines, or a folder of them.")
        elif path.suffix not in ENDINGS:
            raise ValueError(f"--input {name} is neither .txt nor .jsonl; rename it according to its content.")
        else:
            found.append(path)
    return found


def texts_of(files: list[Path], json_key: str) -> Iterator[str]:
    """The text of every .txt file, and of every line of a .jsonl file.

    Raises:
        ValueError: a file is not UTF-8, or a line is not a JSON object with text under the key.
    """
    for path in files:
        yield from _lines(path, json_key) if path.suffix == ".jsonl" else iter((_text(path),))


def documents(texts: Iterable[str], by_paragraphs: bool) -> Iterator[str]:
    """Every non-empty text, or every non-empty paragraph of the texts."""
    for text in texts:
        parts = text.split("\n\n") if by_paragraphs else [text]
        yield from (part for part in parts if part.strip())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--input {path} is not UTF-8 text (byte {error.start}); convert it with iconv.") from None


def _lines(path: Path, key: str) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"--input {path}, line {number} is not JSON ({error}); correct or remove that line."
                ) from None
            if not isinstance(record, dict) or not isinstance(record.get(key), str):
                there = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(
                    f"--input {path}, line {number} has no text under --json-key {key}; it has {there or 'nothing'}."
                )
            yield record[key]


def encoder_of(folder: str) -> Encoder:
    """A Hugging Face tokenizer on disk; nothing is downloaded.

    Raises:
        ValueError: the folder contains none, or neither tokenizers nor transformers is installed.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"--tokenizer {folder} is not a folder; give one with a tokenizer.json, such as a model's.")
    if (path / "tokenizer.json").is_file() and importlib.util.find_spec("tokenizers"):
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(path / "tokenizer.json"))
        size = fast.get_vocab_size()
        name = _end_name(path)
        end = fast.token_to_id(name) if name else None
        return _with_end(folder, lambda text: fast.encode(text, add_special_tokens=False).ids, end, size)
    if importlib.util.find_spec("transformers"):
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return _with_end(folder, lambda text: slow.encode(text, add_special_tokens=False), slow.eos_token_id, len(slow))
    raise ValueError(
        f"--tokenizer {folder} needs a package that reads it: pip install tokenizers (with a tokenizer.json) or "
        "transformers; without --tokenizer tokens are bytes."
    )


def _end_name(path: Path) -> str | None:
    """The end-of-text token in tokenizer_config.json, or None."""
    config = path / "tokenizer_config.json"
    found = json.loads(config.read_text(encoding="utf-8")).get("eos_token") if config.is_file() else None
    return found.get("content") if isinstance(found, dict) else found


def _with_end(folder: str, encode: Callable[[str], list[int]], end: int | None, size: int) -> Encoder:
    """An Encoder; a tokenizer without an end token gets a new one after its vocabulary."""
    return Encoder(folder, encode, size if end is None else end, max(size, (end or 0) + 1) + (end is None))
