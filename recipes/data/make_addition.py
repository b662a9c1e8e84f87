"""Writes addition.jsonl and addition-held-out.jsonl: sums of two numbers up to 10, each sum in one file only."""

import json
import pathlib
import random

MAX_OPERAND = 10
NUM_HELD_OUT = 25

sums = [(a, b) for a in range(MAX_OPERAND + 1) for b in range(MAX_OPERAND + 1)]
random.Random(1).shuffle(sums)
folder = pathlib.Path(__file__).parent
for name, part in [("addition-held-out", sums[:NUM_HELD_OUT]), ("addition", sums[NUM_HELD_OUT:])]:
    with open(folder / f"{name}.jsonl", "w") as file:
        for a, b in part:
            row = {"prompt": f"Question: What is {a} + {b}?\nAnswer:", "answer": str(a + b)}
            file.write(json.dumps(row) + "\n")
