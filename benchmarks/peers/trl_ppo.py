"""One PPO step of SmolLM2-135M in TRL, phase by phase: the work of ppo-step-smollm2-135m-cpu.toml.

    pip install "torch==2.11.0" "trl==0.24.0" "transformers==4.57.1" accelerate datasets   # the last TRL with a PPO trainer
    python benchmarks/peers/trl_ppo.py downloads/smollm2-135m-instruct

TRL's rewards come from a model and not from a rule, so its scoring is reference, value and reward model; the policy's
log-probs are those of generation. Echelon's is policy, reference and critic: three passes as well. Prints JSON lines.
"""
import json
import os
import resource
import sys
import time

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import PPOConfig, PPOTrainer
from trl.trainer import ppo_trainer

folder = sys.argv[1]
prompts = os.path.join(os.path.dirname(__file__), "..", "prompts-32-tokens.jsonl")
steps = 4
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token


def policy():
    return AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)


def scorer():
    return AutoModelForSequenceClassification.from_pretrained(folder, torch_dtype=torch.float32, num_labels=1)


with open(prompts) as file:
    rows = [tokenizer(json.loads(line)["prompt"])["input_ids"][:32] for line in file]
dataset = Dataset.from_dict({"input_ids": rows * steps})
marks = []
generate, forward = ppo_trainer.batch_generation, ppo_trainer.forward


def timed_generation(*args, **kwargs):
    marks.append(("generation", time.perf_counter()))
    result = generate(*args, **kwargs)
    marks.append(("scoring", time.perf_counter()))
    return result


def timed_forward(*args, **kwargs):
    if torch.is_grad_enabled() and marks[-1][0] == "scoring":
        marks.append(("training", time.perf_counter()))
    return forward(*args, **kwargs)


ppo_trainer.batch_generation, ppo_trainer.forward = timed_generation, timed_forward
config = PPOConfig(
    output_dir="/tmp/trl-ppo", report_to="none", use_cpu=True, bf16=False, seed=1, learning_rate=1e-6,
    total_episodes=16 * steps, per_device_train_batch_size=16, gradient_accumulation_steps=1, num_mini_batches=1,
    num_ppo_epochs=1, response_length=48, temperature=1.0, num_sample_generations=0, save_strategy="no",
    local_rollout_forward_batch_size=16,
)
trainer = PPOTrainer(
    args=config, processing_class=tokenizer, model=policy(), ref_model=policy(), reward_model=scorer(),
    value_model=scorer(), train_dataset=dataset, eval_dataset=dataset.select(range(16)),
)
trainer.train()
marks.append(("end", time.perf_counter()))
step = {}
for (name, begin), (_, end) in zip(marks, marks[1:]):
    step[name] = round(end - begin, 2)
    if name == "training":
        print(json.dumps(step))
        step = {}
print(json.dumps({"peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)}))
