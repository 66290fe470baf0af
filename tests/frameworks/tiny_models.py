"""Models of two layers with random weights, a tokenizer trained on a few lines, and conversations to learn."""

import json
import random
from pathlib import Path

LINES = (
    "A ring passes keys and values from rank to rank.",
    "Ulysses trades heads for tokens, and back again.",
    "Every rank of a group holds a part of the sequence.",
    "Two halves of one attention merge by their log-sum-exp.",
    "The longest document decides who waits for whom.",
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    initializer_range=0.2,  # losses that move within a few steps
)


def make_tokenizer(folder):
    """A byte-level tokenizer with Qwen's special tokens."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(LINES, vocab_size=400, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(folder, kind):
    """Configuration, weights in float32 and tokenizer of a tiny ``qwen2`` or ``qwen3``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(folder)
    vocabulary = -(-len(tokenizer) // 64) * 64
    special = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    head = {"head_dim": 8} if kind == "qwen3" else {}
    config = AutoConfig.for_model(kind, vocab_size=vocabulary, dtype="float32", **SIZES, **head, **special)
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return vocabulary


def make_conversations(path, number):
    """A file of ``number`` conversations, of lengths that no number of ranks divides."""
    drawn = random.Random(3)
    with Path(path).open("w", encoding="utf-8") as file:
        for index in range(number):
            answer = " ".join(drawn.choice(LINES).split(" ", 4)[index % 3] for _ in range(3 + 5 * (index % 4)))
            said = [{"role": "user", "content": f"{index}?"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": said}) + "\n")
