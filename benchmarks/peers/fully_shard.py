"""One training step of a policy in PyTorch: the work of models/examples/train_step.rs, which runs this beside itself.

    pip install "torch==2.11.0" "transformers==4.57.1"
    python benchmarks/peers/fully_shard.py MODEL_FOLDER fully_shard|ddp|one STEPS

16 rows of 32 prompt and 48 response tokens, PPO's clipped loss over the response tokens, clipping by the global norm, AdamW,
all in f32; two ranks of one thread each over Gloo, or one process of two threads. Logits are made for response tokens
alone. Prints one JSON line; seconds are those of the steps after the first.
"""
import json
import os
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

ROWS, PROMPT, RESPONSE = 16, 32, 48


def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def train(rank, folder, mode, steps, meeting, results):
    ranks = 1 if mode == "one" else 2
    torch.set_num_threads(2 // ranks)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    if mode == "ddp":
        model = DistributedDataParallel(model)
    elif mode == "fully_shard":
        mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    vocabulary = model.module.config.vocab_size if mode == "ddp" else model.config.vocab_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    places = torch.arange(ROWS * (PROMPT + RESPONSE)).view(ROWS, -1)
    tokens = (places * 7919 % (vocabulary - 3) + 3)[rank::ranks]
    advantages = (torch.arange(ROWS * RESPONSE, dtype=torch.float32).sin().view(ROWS, -1))[rank::ranks]
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    seconds, report = [], {}
    for _ in range(steps + 1):
        dist.barrier()
        begun = time.perf_counter()
        logits = model(input_ids=tokens, logits_to_keep=RESPONSE + 1).logits[:, :-1]
        log_p = logits.log_softmax(-1)
        logprobs = log_p.gather(-1, tokens[:, PROMPT:, None]).squeeze(-1)
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(-1)
        ratio = (logprobs - logprobs.detach()).exp()
        objective = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        # The gradients are averaged over ranks, so the sum over all tokens is divided by a rank's number of them.
        loss = -objective.sum() / (ROWS * RESPONSE / ranks)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begun)
        if not report:
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            total = torch.tensor([logprobs.sum().item(), entropy.sum().item()], dtype=torch.float64)
            dist.all_reduce(total)
            report = {"grad_norm": norm.item(), "logprobs": total[0].item(), "entropy": total[1].item()}
    results.put((rank, sorted(seconds[1:])[len(seconds[1:]) // 2], status("VmHWM"), report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    folder, mode, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    ranks = 1 if mode == "one" else 2
    with tempfile.TemporaryDirectory() as here:
        arguments = (folder, mode, steps, os.path.join(here, "meeting"), results)
        workers = [context.Process(target=train, args=(rank, *arguments)) for rank in range(ranks)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            sys.exit(f"a rank ended with {[worker.exitcode for worker in workers]}")
    found = sorted(results.get() for _ in workers)
    print(json.dumps({
        "program": f"torch {mode}", "ranks": ranks, "seconds": max(row[1] for row in found),
        "peak_bytes_per_rank": [row[2] for row in found], **found[0][3],
    }))
