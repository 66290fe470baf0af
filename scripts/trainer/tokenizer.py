"""Byte-level tokens: the 256 bytes, an end-of-document token and a padding token. No download is needed."""

from collections import OrderedDict

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
