"""Writes permutations.json: orders of rows as docs of tasks/src/data/shuffle.rs define them, computed in Python's
unbounded integers. Run: python permutations.py"""

import json
import pathlib

MASK = 2**64 - 1


def mix(state):
    """SplitMix64's next state and output."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return state, z ^ (z >> 31)


def permutation(length, *key):
    state = 0
    for word in key:
        state = mix(state ^ word)[1]
    order = list(range(length))
    for last in range(length - 1, 0, -1):
        bound = last + 1
        while True:
            state, word = mix(state)
            if word * bound % 2**64 >= 2**64 % bound:
                break
        chosen = word * bound // 2**64
        order[last], order[chosen] = order[chosen], order[last]
    return order


KEYS = [(0, 1, 0, 0), (1, 1, 0, 0), (2, 9, 0, 3), (10, 1, 0, 0), (10, 1, 0, 1), (10, 1, 1, 0), (33, 2**64 - 1, 5, 2**40)]
cases = [
    {"len": n, "seed": seed, "stream": stream, "epoch": epoch, "order": permutation(n, seed, stream, epoch)}
    for n, seed, stream, epoch in KEYS
]
path = pathlib.Path(__file__).with_suffix(".json")
path.write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
