"""Write text as a Megatron indexed dataset, PREFIX.bin and PREFIX.idx: your own text, or Python's help topics.

    python scripts/prepare_data.py --input my.jsonl --output data/my              one document per line, under "text"
    python scripts/prepare_data.py --input a.txt b.txt folder --output data/my    one document per file
    python scripts/prepare_data.py --input my.jsonl --output data/my --tokenizer MODEL_FOLDER
    python scripts/prepare_data.py --output data/topics                           for a first try

Tokens are bytes, or come from a Hugging Face tokenizer on disk; every document ends with an end-of-document token.
Nothing is downloaded.
"""

import trainer.quiet  # noqa: F401  before Megatron warns
import mindspeed_cp.megatron_adaptor  # noqa: F401  before anything of Megatron

import argparse
import json
import os
import pydoc_data.topics
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path

from trainer.texts import ENDINGS, Encoder, bytes_encoder, documents, encoder_of, files_of, texts_of


def write_documents(texts: Iterable[str], prefix: str, encoder: Encoder | None = None) -> tuple[int, int]:
    """Write one document per text to ``prefix``.bin and ``prefix``.idx, and its last token to ``prefix``.json.

    Returns:
        (documents, tokens).

    An existing dataset of that name is not changed until the new one is complete.

    Raises:
        ValueError: there is no document, or ``texts`` raises it.
    """
    encoder = encoder or bytes_encoder()
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    part = f"{prefix}.part{os.getpid()}"
    builder = IndexedDatasetBuilder(get_bin_path(part), dtype=DType.optimal_dtype(encoder.vocab_size))
    num_documents = num_tokens = 0
    try:
        for text in texts:
            tokens = torch.tensor([*encoder.encode(text), encoder.eod], dtype=torch.int64)
            builder.add_document(tokens, [len(tokens)])
            num_documents, num_tokens = num_documents + 1, num_tokens + len(tokens)
        if not num_documents:
            raise ValueError("--input holds no text: every document is empty; give another file.")
        builder.finalize(get_idx_path(part))
        os.replace(get_bin_path(part), get_bin_path(prefix))
        os.replace(get_idx_path(part), get_idx_path(prefix))
    finally:
        for path in (get_bin_path(part), get_idx_path(part)):
            Path(path).unlink(missing_ok=True)
    about = {"tokenizer": encoder.name, "eod": encoder.eod, "vocab_size": encoder.vocab_size}
    Path(prefix + ".json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    return num_documents, num_tokens


def python_topics() -> list[str]:
    """The demonstration's text, sorted so that every machine with this Python writes the same bytes."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


def prepare(args: argparse.Namespace) -> None:
    """Write the dataset that the flags describe; raises ValueError if a file, a flag or the text is invalid."""
    if Path(args.output).suffix in (*ENDINGS, ".bin", ".idx"):
        raise ValueError(
            f"--output {args.output} is a prefix of two files, without an ending; use --output "
            f"{Path(args.output).with_suffix('')}, and --input for your text."
        )
    encoder = encoder_of(args.tokenizer) if args.tokenizer else bytes_encoder()
    texts = texts_of(files_of(args.input), args.json_key) if args.input else python_topics()
    found = documents(texts, args.documents == "paragraphs")
    num_documents, num_tokens = write_documents(found, args.output, encoder)
    of = "" if args.input else ", the help topics of Python (--input takes your own text)"
    print(f"{args.output}.bin, {args.output}.idx: {num_documents:,} documents, {num_tokens:,} tokens{of}")
    vocab = f" --vocab-size {encoder.vocab_size}" if args.tokenizer else ""
    print(f"train on it with: --data-path {args.output}{vocab}; --split 90,10,0 validates on a tenth of the documents")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", metavar="FILE", help=".txt and .jsonl files, or folders of them")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="of the text in a .jsonl (default: text)")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="a Hugging Face tokenizer on disk (default: bytes)")
    parser.add_argument("--output", default="data/topics", help="prefix of the files (default: data/topics)")
    parser.add_argument(
        "--documents",
        choices=["topics", "paragraphs"],
        default="topics",
        help="what is one document: a file, a line of a .jsonl or a topic of Python's, or a paragraph of it "
        "(default: topics)",
    )
    try:
        prepare(parser.parse_args(argv))
    except ValueError as error:
        print(f"prepare_data.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
