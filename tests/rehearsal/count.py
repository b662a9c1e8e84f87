#!/usr/bin/env python3
"""Launches, host waits and uploads of each decoding step, layer, micro-batch and optimizer step, as a Markdown table.

    count.py [--programs FOLDER] [--lines N]

Nothing in the programs is instrumented: each figure is the difference between two rehearsed runs of the quickstart's
tiny models, divided by how many more of the unit the longer one had. FOLDER has the built programs (target/debug); with
N each unit's N lines of source follow that have most of each kind.
"""

import argparse
import collections
import json
import os
import re
import struct
import subprocess
import tempfile

import sites

ROOT = sites.ROOT
MODEL = os.path.join(ROOT, "recipes/quickstart/language-model")
KINDS = {"launches": "launches", "waits": "host waits for the device", "uploads": "copies host to device"}
PROMPT = "The cake in the school canteen was"
BACKWARD_PASSES = "launches: aten::embedding_dense_backward"  # one in each


def main():
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="count.") as folder:
        runs = Runs(arguments.programs, folder, bool(arguments.lines))
        units = measure(runs)
    print("| unit | launches | host waits | uploads |\n|---|---|---|---|")
    for name, unit in units.items():
        print(f"| {name} | " + " | ".join(shown(unit.totals[kind]) for kind in KINDS) + " |")
    if arguments.lines:
        print_lines(units, runs.find_sources(), arguments.lines)


def print_lines(units, sources, most):
    for name, unit in units.items():
        print(f"\n{name}")
        rows = [(count, kind, operator, frames) for (kind, operator, frames), count in unit.sites.items()]
        for kind in KINDS:
            lines = collections.Counter()
            for (_, where), count in sites.by_line(rows, sources, kind).items():
                lines[where] += count
            for where, count in lines.most_common(most):
                if count > 0.005:
                    print(f"{count:9.2f} {kind:8s} {where}")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", default=os.path.join(ROOT, "target/debug"))
    parser.add_argument("--lines", type=int, default=0)
    return parser.parse_args()


def shown(number):
    return f"{number:.1f}".removesuffix(".0")


# --- the measurements -------------------------------------------------------------------------------------------------


def measure(runs):
    layers, sequences, rows = 3, 4, 16
    generate = lambda layers=layers, tokens=4, sequences=sequences: runs.generate(layers, tokens, sequences)
    sft = lambda layers=layers, steps=2, batch_size=rows, parts=1: runs.sft(layers, steps, batch_size, parts)
    longer = 8
    decoding = lambda **settings: (generate(tokens=4 + longer, **settings) - generate(tokens=4, **settings)) / longer
    # Beside its sequences a micro-batch costs what cutting the same rows into more of them adds.
    cut = lambda **settings: (sft(parts=4, **settings) - sft(**settings)).per_backward_pass()
    row = (sft(batch_size=2 * rows) - sft()) / (2 * rows)
    micro_batch = cut() + row * rows
    step = (sft(steps=4) - sft(steps=2)) / 2
    return {
        f"decoding step ({layers} layers, {sequences} sequences)": decoding(),
        "each layer of the step": (decoding() - decoding(layers=1)) / (layers - 1),
        "each sequence of the step": (decoding(sequences=2 * sequences) - decoding()) / sequences,
        f"micro-batch, forward and backward ({layers} layers, {rows} sequences)": micro_batch,
        "each layer of the micro-batch, beside its sequences": (cut() - cut(layers=1)) / (layers - 1),
        "each sequence of the micro-batch": row,
        "optimizer step beside its micro-batches": step - micro_batch,
        "PPO's optimizer step, actor and critic, a micro-batch each": runs.ppo(8) - runs.ppo(16),
    }


class Counts:
    """What a run did, or what is between two: totals, and counts by kind, operator and stack."""

    def __init__(self, totals, sites):
        self.totals, self.sites = collections.Counter(totals), collections.Counter(sites)

    def plus(self, other, factor):
        sum_of = lambda mine, theirs: {key: mine[key] + factor * theirs[key] for key in {*mine, *theirs}}
        return Counts(sum_of(self.totals, other.totals), sum_of(self.sites, other.sites))

    def __sub__(self, other):
        return self.plus(other, -1)

    def __add__(self, other):
        return self.plus(other, 1)

    def __mul__(self, factor):
        return Counts({}, {}).plus(self, factor)

    def __truediv__(self, divisor):
        return self * (1 / divisor)

    def per_backward_pass(self):
        return self / self.totals["backward passes"]


# --- the runs ---------------------------------------------------------------------------------------------------------


class Runs:
    """Rehearsed runs, each done once."""

    def __init__(self, programs, folder, wants_lines):
        self.programs, self.folder, self.wants_lines = programs, folder, wants_lines
        self.known, self.rows = {}, collections.defaultdict(list)

    def generate(self, layers, tokens, sequences):
        prompts = self.write(f"prompts-{sequences}.jsonl", [{"prompt": PROMPT}] * sequences)
        output = os.path.join(self.folder, "responses.jsonl")
        return self.run(
            "generate", "--model", self.model(layers), "--prompts", prompts, "--output", output, "--ignore-eos",
            "--max-new-tokens", str(tokens), "--dtype", "float32", "--device", "cuda",
        )

    def sft(self, layers, steps, batch_size, parts):
        row = {"prompt": PROMPT, "completion": " lovely. I would take it again."}
        settings = {
            "model.model": self.model(layers), "data.train": self.write(f"rows-{batch_size}.jsonl", [row] * batch_size),
            "train.steps": steps, "train.batch_size": batch_size, "train.max_tokens": TOKENS_OF_A_ROW,
            "train.tokens_per_micro_batch": TOKENS_OF_A_ROW * batch_size // parts,
            "train.dtype": "float32", "placement.device": "cuda",
        }
        recipe = self.write_text("sft.toml", 'name = "count"\nseed = 1\n[model]\n[data]\n')
        return self.run("sft", recipe, *as_flags(settings))

    def ppo(self, mini_batch_size):
        # Without the evaluation, whose responses depend on what was learned.
        with open(os.path.join(ROOT, "recipes/quickstart.toml")) as file:
            recipe = self.write_text("quickstart.toml", file.read().split("[eval]")[0])
        if not os.path.exists(os.path.join(self.folder, "quickstart")):
            os.symlink(os.path.join(ROOT, "recipes/quickstart"), os.path.join(self.folder, "quickstart"))
        settings = {
            "train.steps": 1, "rollout.batch_size": 16, "rollout.max_new_tokens": 8,
            "ppo.mini_batch_size": mini_batch_size, "train.dtype": "float32", "placement.device": "cuda",
        }
        return self.run("ppo", recipe, *as_flags(settings))

    def run(self, program, *arguments):
        key = (program, *arguments)
        if key not in self.known:
            self.known[key] = self.rehearse(program, arguments)
        return self.known[key]

    def rehearse(self, program, arguments):
        report = os.path.join(self.folder, "report")
        program = os.path.join(self.programs, program)
        if program.endswith(("sft", "ppo")):
            arguments = (*arguments, "--output-dir", tempfile.mkdtemp(dir=self.folder))
        environment = {**os.environ, "REHEARSAL_ALL_NAMES": "1", "REHEARSAL_REPORT": report}
        command = [os.path.join(ROOT, "tests/rehearsal/rehearse"), program, *arguments]
        if self.wants_lines:
            command[1:1] = ["-r", report]
        elif os.path.exists(report):
            os.remove(report)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            told = done.stdout[-2000:] + done.stderr[-2000:]
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{told}")
        rows = sites.read(report + ".sites") if self.wants_lines else []
        self.rows[program] += rows
        return Counts(self.totals(report), {(kind, name, frames): count for count, kind, name, frames in rows})

    def find_sources(self):
        """Of all frames of all runs: reading a program's debug information takes long."""
        found = {}
        for program, rows in self.rows.items():
            found.update(sites.find_sources(rows, program))
        return found

    def totals(self, report):
        with open(report) as file:
            text = file.read()
        counts = lambda name: re.findall(rf"^ *(\d+) +{re.escape(name)}(?: \(|$)", text, re.MULTILINE)
        sum_of = lambda name: sum(int(count) for count in counts(name))
        return {**{kind: sum_of(name) for kind, name in KINDS.items()}, "backward passes": sum_of(BACKWARD_PASSES)}

    def write(self, name, rows):
        return self.write_text(name, "".join(json.dumps(row) + "\n" for row in rows))

    def write_text(self, name, text):
        path = os.path.join(self.folder, name)
        with open(path, "w") as file:
            file.write(text)
        return path

    def model(self, layers):
        """The quickstart's language model with its first layers only."""
        path = os.path.join(self.folder, f"model-{layers}")
        if not os.path.exists(path):
            copy_model(path, layers)
        return path


TOKENS_OF_A_ROW = 32  # more than a row has: micro-batches of whole rows


def as_flags(settings):
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def copy_model(path, layers):
    os.mkdir(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.symlink(os.path.join(MODEL, name), os.path.join(path, name))
    with open(os.path.join(MODEL, "config.json")) as file:
        config = json.load(file)
    with open(os.path.join(path, "config.json"), "w") as file:
        json.dump({**config, "num_hidden_layers": layers}, file)
    with open(os.path.join(MODEL, "model.safetensors"), "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header, data = json.loads(file.read(length)), file.read()
    kept, parts, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, tensor in header.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if name == "__metadata__" or (layer and int(layer[1]) >= layers):
            continue
        begin, end = tensor["data_offsets"]
        kept[name] = {**tensor, "data_offsets": [at, at + end - begin]}
        parts.append(data[begin:end])
        at += end - begin
    text = json.dumps(kept).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(path, "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(parts))


if __name__ == "__main__":
    main()
