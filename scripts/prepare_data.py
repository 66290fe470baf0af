"""Write real text as a Megatron indexed dataset: the help topics of Python's standard library, one document a topic.

    python scripts/prepare_data.py --output data/topics
    python scripts/prepare_data.py --output data/paragraphs --documents paragraphs

Tokens are bytes; every document ends with an end-of-document token. Nothing is downloaded.
"""

import trainer.quiet  # noqa: F401  before Megatron warns
import mindspeed_cp.megatron_adaptor  # noqa: F401  before anything of Megatron

import argparse
import pydoc_data.topics
from pathlib import Path

import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path

from trainer.tokenizer import EOD, VOCAB_SIZE, ByteTokenizer


def write_documents(texts, prefix):
    """Write one document per text to ``prefix``.bin and ``prefix``.idx; returns the number of tokens."""
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=DType.optimal_dtype(VOCAB_SIZE))
    tokenizer, num_tokens = ByteTokenizer(), 0
    for text in texts:
        tokens = torch.tensor([*tokenizer.tokenize(text), EOD], dtype=torch.int64)
        builder.add_document(tokens, [len(tokens)])
        num_tokens += len(tokens)
    builder.finalize(get_idx_path(prefix))
    return num_tokens


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="data/topics", help="prefix of the two files (default: data/topics)")
    parser.add_argument(
        "--documents",
        choices=["topics", "paragraphs"],
        default="topics",
        help="what is one document: a topic of some thousand tokens, or a paragraph (default: topics)",
    )
    args = parser.parse_args(argv)
    # Sorted, so that every machine with this Python writes the same bytes.
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    if args.documents == "paragraphs":
        texts = [paragraph for text in texts for paragraph in text.split("\n\n") if paragraph.strip()]
    num_tokens = write_documents(texts, args.output)
    print(
        f"{args.output}.bin, {args.output}.idx: {len(texts)} documents, {num_tokens} tokens "
        "(--split 90,10,0 trains on nine tenths of the documents and validates on one)"
    )


if __name__ == "__main__":
    main()
