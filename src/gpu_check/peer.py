"""transformers at the work of gpu-check's step `peer`: a job a line in, its seconds a line out.

    python peer.py CONFIG.json cuda bfloat16

Random weights in the shape of CONFIG.json. Jobs: {"work": "decode", "batch": 16, "prompt": 128, "new": 64},
{"work": "prefill", "batch": 16, "prompt": 512}, {"work": "train", "rows": 8, "length": 1024}.
"""
import json
import sys
import time

import torch
import transformers

config, device, dtype = sys.argv[1:4]
config = transformers.AutoConfig.for_model(**json.load(open(config)))
torch.manual_seed(1)
with torch.device(device):
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(getattr(torch, dtype))
model.generation_config.eos_token_id = None


def token_ids(rows, length):
    at, row = torch.arange(length), torch.arange(rows)[:, None]
    return ((at * 7919 + row * 104729 + 2) % config.vocab_size).to(device)


def wait():
    if device != "cpu":
        torch.cuda.synchronize()


def generate(batch, prompt, new):
    ids = token_ids(batch, prompt)
    with torch.inference_mode():
        made = model.eval().generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0
        )
    assert made.shape == (batch, prompt + new), made.shape


def train(rows, length):
    ids = token_ids(rows, length)
    logits = model.train()(input_ids=ids, use_cache=False).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()


def work(job):
    match job.pop("work"):
        case "decode":
            generate(**job)
        case "prefill":
            generate(**job, new=1)
        case "train":
            train(**job)


print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}), flush=True)
for line in sys.stdin:
    wait()
    begun = time.perf_counter()
    work(json.loads(line))
    wait()
    print(json.dumps({"seconds": time.perf_counter() - begun}), flush=True)
