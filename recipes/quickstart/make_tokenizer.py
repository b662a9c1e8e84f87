"""Writes start/tokenizer.json and start/tokenizer_config.json: byte-level BPE learned from text/sft-train.jsonl.

Run `make_text.py` first, then this with Python 3.9 or later. The method and the file format are those of the `tokenizers`
library; ties between equally frequent pairs are broken by their spelling, so that every run writes the same bytes.
"""

import collections
import json
import pathlib
import re

VOCAB_SIZE = 1024
SPECIAL_TOKENS = ["<eos>", "<pad>"]
# What the ByteLevel pre-tokenizer splits at, for text that is ASCII.
WORD = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
HERE = pathlib.Path(__file__).parent


def main():
    rows = [json.loads(line) for line in open(HERE / "text/sft-train.jsonl", encoding="ascii")]
    letters = byte_letters()
    counts = collections.Counter(word for row in rows for word in WORD.findall(row["prompt"] + row["completion"]))
    words = {tuple(letters[byte] for byte in word.encode()): count for word, count in counts.items()}
    tokens = SPECIAL_TOKENS + sorted(letters.values())
    merges = learn_merges(words, VOCAB_SIZE - len(tokens))
    tokens += ["".join(pair) for pair in merges]
    assert len(set(tokens)) == VOCAB_SIZE
    write("tokenizer.json", definition(tokens, merges))
    write("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
    })


def byte_letters():
    """The printable letter that stands for each byte in GPT-2's byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def learn_merges(words, count):
    """`count` times the most frequent pair of neighbours in `words` (letters -> frequency), merged."""
    merges = []
    while len(merges) < count:
        pairs = collections.Counter()
        for word, frequency in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += frequency
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {merged(word, best): frequency for word, frequency in words.items()}
    return merges


def merged(word, pair):
    parts, i = [], 0
    while i < len(word):
        width = 2 if word[i : i + 2] == pair else 1
        parts.append("".join(word[i : i + width]))
        i += width
    return tuple(parts)


def definition(tokens, merges):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }


def write(name, value):
    path = HERE / "start" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
