"""A tiny tokenizer and an instruction dataset, made by MindSpeed-LLM's own program:

python llm_instructions.py preprocess_data.py PREFIX [its further flags]
"""

import json
import random
import runpy
import sys
import warnings

WORDS = [f"w{number}" for number in range(200)]
NAMED = "<unk> <pad> <|im_start|> <|im_end|> <|endoftext|> system user assistant You are a helpful".split()


def make_tokenizer(folder):
    """One that knows WORDS, separated by spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate([*NAMED, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(unk_token="<unk>", pad_token="<pad>", eos_token="<|im_end|>", bos_token="<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


def write_examples(path):
    drawn = random.Random(0)

    def words(count):
        return " ".join(drawn.choices(WORDS, k=count))

    examples = [{"instruction": words(12), "input": "", "output": words(drawn.randrange(8, 40))} for _ in range(64)]
    with open(path, "w", encoding="utf-8") as file:
        json.dump(examples, file)


def main():
    script, prefix, *further = sys.argv[1:]
    warnings.simplefilter("ignore")
    import unneeded

    unneeded.install()
    make_tokenizer(f"{prefix}-tokenizer")
    write_examples(f"{prefix}.json")
    flags = f"--input {prefix}.json --output-prefix {prefix} --tokenizer-name-or-path {prefix}-tokenizer --workers 1"
    flags += " --tokenizer-type PretrainedFromHF --handler-name AlpacaStyleInstructionHandler --prompt-type qwen"
    sys.argv = [script, *flags.split(), "--log-interval", "1000", *further]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
