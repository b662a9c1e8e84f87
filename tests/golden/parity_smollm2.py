"""Greedy tokens of `generate` against transformers on SmolLM2-135M-Instruct, in float32 on the CPU.

    python tests/golden/parity_smollm2.py MODEL_FOLDER [--generate target/debug/generate] [--prompts 32] [--tokens 64]

MODEL_FOLDER is the model's Hugging Face folder. Needs torch and transformers. Both sides widen the same weights to
float32 and ignore the end-of-sequence token, so that every prompt gives all of its tokens. They must be identical,
except from a position where the reference's two largest logits lie within 1e-4 of each other: rounding decides there.
The log-probs of the common tokens must agree to 1e-4 as well. Exit code 0 when they do.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import torch
import transformers

TOLERANCE = 1e-4

TOPICS = ["the sea", "a goose", "winter", "bread", "the moon", "an old bridge", "music", "trains"]
REQUESTS = [
    "Write a short story about {}.",
    "Explain {} to a child in three sentences.",
    "List five facts about {}.",
    "What would the world be like without {}?",
]


def prompts(tokenizer, count):
    """Token ids of `count` chat prompts of different lengths."""
    texts = [request.format(topic) for topic in TOPICS for request in REQUESTS]
    texts += [f"What is {17 * i} + {23 * i + 5}?" for i in range(1, max(1, count - len(texts) + 1))]
    chats = [[{"role": "user", "content": text}] for text in texts[:count]]
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]


@torch.no_grad()
def reference(model, prompt, count):
    """Greedy ids, their log-probs, and the gap between the two largest logits, token by token."""
    ids, logprobs, gaps, cache = [], [], [], None
    fed = torch.tensor([prompt])
    for _ in range(count):
        out = model(fed, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1]
        top = logits.topk(2)
        ids.append(int(top.indices[0]))
        logprobs.append(float(logits.log_softmax(-1)[ids[-1]]))
        gaps.append(float(top.values[0] - top.values[1]))
        fed = torch.tensor([[ids[-1]]])
    return ids, logprobs, gaps


def ours(arguments, rows):
    """What the generate program writes for the prompts, all of them batched together."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = pathlib.Path(folder, "prompts.jsonl"), pathlib.Path(folder, "responses.jsonl")
        source.write_text("".join(json.dumps({"prompt_token_ids": row}) + "\n" for row in rows))
        command = [arguments.generate, "--model", arguments.model, "--prompts", source, "--output", output]
        command += ["--max-new-tokens", str(arguments.tokens), "--temperature", "0", "--ignore-eos", "--dtype", "float32"]
        subprocess.run(command, check=True)
        return [json.loads(line) for line in output.read_text().splitlines()]


def compare(row, ids, logprobs, gaps):
    """Where the two part (None: nowhere), whether rounding explains it, and the worst log-prob difference before."""
    parted = next((i for i, (a, b) in enumerate(zip(row["token_ids"], ids)) if a != b), None)
    worst = max((abs(a - b) for a, b in list(zip(row["logprobs"], logprobs))[:parted]), default=0.0)
    return parted, parted is None or gaps[parted] <= TOLERANCE, worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--generate", default="target/debug/generate")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()

    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    rows = prompts(tokenizer, arguments.prompts)
    responses = ours(arguments, rows)

    identical, at_ties, wrong, worst, smallest_gap = 0, 0, 0, 0.0, float("inf")
    for index, (prompt, row) in enumerate(zip(rows, responses)):
        ids, logprobs, gaps = reference(model, prompt, arguments.tokens)
        parted, explained, difference = compare(row, ids, logprobs, gaps)
        worst, smallest_gap = max(worst, difference), min([smallest_gap, *gaps])
        identical += parted is None
        at_ties += parted is not None and explained
        wrong += not explained
        if parted is not None:
            print(f"prompt {index}: parts at token {parted}, the reference's top two logits differ by {gaps[parted]:.2e}")
    print(
        f"{len(rows)} prompts x {arguments.tokens} tokens: {identical} identical, {at_ties} part at a tie, {wrong} wrong; "
        f"log-probs differ by {worst:.2e} at most; smallest gap between the top two logits {smallest_gap:.2e}"
    )
    sys.exit(0 if wrong == 0 and worst <= TOLERANCE and len(responses) == len(rows) else 1)


if __name__ == "__main__":
    main()
