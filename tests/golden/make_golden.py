#!/usr/bin/env python3
"""Writes the golden cases of PPO's maths: an independent reference in float64.

Every function below is the textbook formula on single numbers, token by token, row by row. It shares no code
and no vectorised form with the Rust side. Gradients come from torch's autograd on those single numbers, and
each is checked here against central differences. The learning rates are checked against transformers.

    python make_golden.py            write the files beside this script
    python make_golden.py --check    fail if they differ from what would be written

Needs torch (2.x) and transformers. The format is described in README.md.
"""

import json
import math
import random
import sys
from pathlib import Path

import torch

torch.set_default_dtype(torch.float64)
HERE = Path(__file__).parent


# ---------------------------------------------------------------- formulas, one number at a time


def clip(x, low, high):
    return torch.clamp(x, low, high)


def kl_of_token(logprob, ref_logprob, estimator):
    r = logprob - ref_logprob
    if estimator == "k1":
        k = r
    elif estimator == "k2":
        k = r * r / 2
    else:
        # exp overflows where the clamp below hides it; its gradient must be hidden too.
        k = torch.exp(-torch.clamp(r, -20, 20)) - 1 + r
    return clip(k, -10.0, 10.0)


def kl_estimate(logprobs, ref_logprobs, response_mask, kl_estimator):
    kl = zeros_like(response_mask)
    for b, t in sampled(response_mask):
        kl[b][t] = kl_of_token(logprobs[b][t], ref_logprobs[b][t], kl_estimator)
    return {"kl": kl}


def kl_loss(logprobs, ref_logprobs, response_mask, kl_estimator, kl_coef):
    total = torch.tensor(0.0)
    for b, t in sampled(response_mask):
        total = total + kl_coef * kl_of_token(logprobs[b][t], ref_logprobs[b][t], kl_estimator)
    return {"loss": total}


def entropy_loss(entropy, response_mask, entropy_coef):
    total = torch.tensor(0.0)
    for b, t in sampled(response_mask):
        total = total - entropy_coef * entropy[b][t]
    return {"loss": total}


def token_rewards(kl, scores, response_mask, kl_coef):
    rewards = zeros_like(response_mask)
    for b, row in enumerate(response_mask):
        last = None
        for t, is_sampled in enumerate(row):
            if is_sampled:
                rewards[b][t] = -max(kl_coef, 0.0) * kl[b][t]
                last = t
        if last is not None:
            rewards[b][last] = rewards[b][last] + scores[b]
    return {"rewards": rewards}


def gae(rewards, values, response_mask, gamma, gae_lambda):
    """The definition A_t = sum_k (gamma lambda)^k delta_(t+k), not the recursion."""
    advantages, returns = zeros_like(response_mask), zeros_like(response_mask)
    for b, row in enumerate(response_mask):

        def at(series, t):
            return series[b][t] if t < len(row) and row[t] else torch.tensor(0.0)

        for t, is_sampled in enumerate(row):
            if not is_sampled:
                continue
            total = torch.tensor(0.0)
            for k in range(t, len(row)):
                delta = at(rewards, k) + gamma * at(values, k + 1) - at(values, k)
                total = total + (gamma * gae_lambda) ** (k - t) * delta
            advantages[b][t] = total
            returns[b][t] = total + values[b][t]
    return {"advantages": advantages, "returns": returns}


def whiten(advantages, response_mask, mean_only):
    seen = [advantages[b][t] for b, t in sampled(response_mask)]
    white = zeros_like(response_mask)
    if seen:
        mean = sum(seen) / len(seen)
        variance = sum((a - mean) ** 2 for a in seen) / len(seen)
        scale = 1.0 if mean_only else 1.0 / math.sqrt(max(variance, 1e-8))
        for b, t in sampled(response_mask):
            white[b][t] = (advantages[b][t] - mean) * scale
    return {"advantages": white}


def policy_loss(logprobs, old_logprobs, advantages, response_mask, policy_clip, policy_clip_high, dual_clip):
    high = policy_clip if policy_clip_high is None else policy_clip_high
    loss = torch.tensor(0.0)
    num_clipped, ppo_kl_sum, approx_kl_sum, ratio_sum = 0, 0.0, 0.0, 0.0
    for b, t in sampled(response_mask):
        r = logprobs[b][t] - old_logprobs[b][t]
        bounded = clip(r, -20.0, 20.0)
        ratio = torch.exp(bounded)
        a = advantages[b][t]
        free, held = ratio * a, clip(ratio, 1 - policy_clip, 1 + high) * a
        objective = torch.minimum(free, held)
        if dual_clip is not None and a < 0:
            objective = torch.maximum(objective, dual_clip * a)
        loss = loss - objective
        num_clipped += int(held < free)
        ppo_kl_sum -= float(r.detach())
        approx_kl_sum += float(ratio.detach()) - 1 - float(bounded.detach())
        ratio_sum += float(ratio.detach())
    return {
        "loss": loss,
        "num_clipped": num_clipped,
        "ppo_kl_sum": ppo_kl_sum,
        "approx_kl_sum": approx_kl_sum,
        "ratio_sum": ratio_sum,
    }


def value_loss(values, old_values, returns, response_mask, value_clip):
    loss, num_clipped = torch.tensor(0.0), 0
    for b, t in sampled(response_mask):
        v, old, target = values[b][t], old_values[b][t], returns[b][t]
        error = (v - target) ** 2
        if value_clip is not None:
            held_error = (clip(v, old - value_clip, old + value_clip) - target) ** 2
            num_clipped += int(held_error > error)
            error = torch.maximum(error, held_error)
        loss = loss + error / 2
    return {"loss": loss, "num_clipped": num_clipped}


def explained_variance(values, returns, response_mask):
    pairs = [(float(values[b][t]), float(returns[b][t])) for b, t in sampled(response_mask)]

    def variance(xs):
        mean = sum(xs) / len(xs)
        return sum((x - mean) ** 2 for x in xs) / len(xs)

    return {"explained_variance": 1 - variance([r - v for v, r in pairs]) / variance([r for _, r in pairs])}


def clip_scores(scores, clip_range):
    return {"scores": [min(max(s, torch.tensor(clip_range[0])), torch.tensor(clip_range[1])) for s in scores]}


def normalize_scores(scores, mean, std):
    return {"scores": [(s - mean) / std for s in scores]}


def missing_eos_penalty(scores, truncated, missing_eos_penalty):
    return {"scores": [s - missing_eos_penalty if cut else s for s, cut in zip(scores, truncated)]}


def adaptive_kl(kl, num_responses, kl_coef, kl_target, kl_horizon):
    coefs = []
    for current, n in zip(kl, num_responses):
        error = min(max(float(current) / kl_target - 1, -0.2), 0.2)
        kl_coef = kl_coef * (1 + error * n / kl_horizon)
        coefs.append(kl_coef)
    return {"kl_coef": coefs}


def lr_schedule(steps, schedule, lr, warmup_steps, total_steps, min_lr_ratio):
    rates = []
    for step in steps:
        if step < warmup_steps:
            factor = step / warmup_steps
        elif schedule == "constant":
            factor = 1.0
        elif schedule == "linear":
            factor = max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
        else:
            wave = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))
            factor = min_lr_ratio + (1 - min_lr_ratio) * wave
        rates.append(lr * factor)
    return {"lr": rates}


def bradley_terry(chosen, rejected):
    loss, num_correct = torch.tensor(0.0), 0
    for c, r in zip(chosen, rejected):
        loss = loss + torch.log1p(torch.exp(-(c - r)))
        num_correct += int(c > r)
    return {"loss": loss, "num_correct": num_correct}


# ---------------------------------------------------------------- plumbing


def sampled(mask):
    return [(b, t) for b, row in enumerate(mask) for t, is_sampled in enumerate(row) if is_sampled]


def zeros_like(mask):
    return [[torch.tensor(0.0) for _ in row] for row in mask]


def map_numbers(x, f):
    return [map_numbers(item, f) for item in x] if isinstance(x, list) else f(x)


def flat(x):
    return [leaf for item in x for leaf in flat(item)] if isinstance(x, list) else [x]


def to_tensor(x):
    return x if isinstance(x, (bool, int)) else torch.tensor(float(x))


def to_json(x):
    x = float(x) if isinstance(x, torch.Tensor) else x
    return {math.inf: "inf", -math.inf: "-inf"}.get(x, "nan" if x != x else x)


def evaluate(function, inputs, parameters):
    return globals()[function](**{k: map_numbers(v, to_tensor) for k, v in inputs.items()}, **parameters)


def gradient_of(function, inputs, parameters, name):
    """d(sum of the first output)/d(inputs[name]), by autograd."""
    tensors = {k: map_numbers(v, to_tensor) for k, v in inputs.items()}
    for leaf in flat(tensors[name]):
        leaf.requires_grad_(True)
    first = next(iter(globals()[function](**tensors, **parameters).values()))
    total = sum(flat(first))
    if total.requires_grad:
        total.backward()
    return map_numbers(tensors[name], lambda leaf: 0.0 if leaf.grad is None else float(leaf.grad))


def check_by_differences(case, name, gradient):
    """Central differences agree with autograd wherever the function has no kink within the step."""
    step = 1e-6

    def total(values):
        outputs = evaluate(case["function"], {**case["inputs"], name: values}, case["parameters"])
        return float(sum(flat(next(iter(outputs.values())))))

    leaves = flat(case["inputs"][name])
    for i, (leaf, slope) in enumerate(zip(leaves, flat(gradient))):
        if not math.isfinite(leaf):
            assert slope == 0.0
            continue

        def moved(by):
            position = iter(range(len(leaves)))
            return map_numbers(case["inputs"][name], lambda x: x + by if next(position) == i else x)

        difference = (total(moved(step)) - total(moved(-step))) / (2 * step)
        scale = max(1.0, abs(slope), abs(total(case["inputs"][name])) * 1e-4)
        assert abs(difference - slope) < 1e-3 * scale, (case["name"], name, i, difference, slope)


def case(name, function, inputs, parameters=None, gradient=()):
    made = {"name": name, "function": function, "inputs": inputs, "parameters": parameters or {}}
    outputs = evaluate(function, inputs, made["parameters"])
    gradients = {}
    for wanted in gradient:
        gradients[wanted] = gradient_of(function, inputs, made["parameters"], wanted)
        check_by_differences(made, wanted, gradients[wanted])
    made["inputs"] = map_tables(inputs)
    made["expected"] = map_tables(outputs)
    if gradients:
        made["expected_gradient"] = map_tables(gradients)
    return made


def map_tables(tables):
    return {name: map_numbers(table, to_json) for name, table in tables.items()}


# ---------------------------------------------------------------- cases

T, F = True, False
MASKS = {
    # prompt, response, right padding
    "plain": [[F, F, T, T, T, T], [F, T, T, T, F, F], [F, F, F, T, T, F]],
    # several turns: text that the policy did not write lies between its own
    "holes": [[F, T, T, F, F, T, T], [F, T, F, T, F, T, F], [F, F, T, F, F, F, T]],
    # one token; an empty response; a full row
    "one token, empty row": [[F, F, T, F], [F, F, F, F], [T, T, T, T]],
    "single token in all": [[F, T, F]],
    "no token at all": [[F, F], [F, F]],
}
PADDING = [float("nan"), float("inf"), float("-inf"), 1e30, -7.5]


def table(rng, mask, scale=1.0, shift=0.0, garbage=True):
    """Normal numbers where the mask is true, garbage elsewhere: an implementation may never read it."""
    return [
        [round(rng.gauss(shift, scale), 4) if s or not garbage else rng.choice(PADDING) for s in row] for row in mask
    ]


def kl_cases(rng):
    for estimator in ["k1", "k2", "k3"]:
        for name, mask in MASKS.items():
            inputs = {"logprobs": table(rng, mask, 1, -2), "ref_logprobs": table(rng, mask, 1, -2), "response_mask": mask}
            yield case(f"{estimator}, {name}", "kl_estimate", inputs, {"kl_estimator": estimator}, ["logprobs"])
        extreme = [-800.0, -25.0, -10.5, -9.5, -4.6, -2.0, 0.0, 2.0, 4.4, 9.5, 10.5, 25.0, 800.0]
        inputs = {"logprobs": [extreme], "ref_logprobs": [[0.0] * len(extreme)], "response_mask": [[T] * len(extreme)]}
        yield case(f"{estimator}, extreme log-ratios", "kl_estimate", inputs, {"kl_estimator": estimator}, ["logprobs"])
        mask = MASKS["holes"]
        inputs = {"logprobs": table(rng, mask, 1, -2), "ref_logprobs": table(rng, mask, 1, -2), "response_mask": mask}
        parameters = {"kl_estimator": estimator, "kl_coef": 0.05}
        yield case(f"{estimator} as a loss", "kl_loss", inputs, parameters, ["logprobs"])
    yield case(
        "adaptive coefficient: above, below, far off, on target",
        "adaptive_kl",
        {"kl": [0.12, 0.05, 3.0, 0.0, 0.1, 0.101], "num_responses": [256, 256, 1024, 64, 64, 512]},
        {"kl_coef": 0.01, "kl_target": 0.1, "kl_horizon": 10000.0},
    )


def reward_cases(rng):
    scores = [-1000.0, -10.0, -0.3, 0.0, 4.25, 10.0, 12.0]
    yield case("OpenRLHF's range", "clip_scores", {"scores": scores}, {"clip_range": [-10.0, 10.0]})
    yield case("asymmetric range", "clip_scores", {"scores": scores}, {"clip_range": [-0.5, 5.0]})
    yield case("statistics of a reward model", "normalize_scores", {"scores": scores}, {"mean": -1.375, "std": 2.25})
    truncated = [T, F, T, T, F, F, T]
    inputs = {"scores": scores, "truncated": truncated}
    yield case("subtracted when truncated", "missing_eos_penalty", inputs, {"missing_eos_penalty": 1.5})
    for name, mask in MASKS.items():
        for kl_coef in [0.0, 0.05]:
            inputs = {"kl": table(rng, mask), "scores": [round(rng.gauss(0, 3), 4) for _ in mask], "response_mask": mask}
            yield case(f"{name}, kl_coef {kl_coef}", "token_rewards", inputs, {"kl_coef": kl_coef})


def advantage_cases(rng):
    for name, mask in MASKS.items():
        for gamma, gae_lambda in [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.99, 0.0)]:
            inputs = {"rewards": table(rng, mask), "values": table(rng, mask), "response_mask": mask}
            parameters = {"gamma": gamma, "gae_lambda": gae_lambda}
            yield case(f"{name}, gamma {gamma}, lambda {gae_lambda}", "gae", inputs, parameters)
        for mean_only in [False, True]:
            inputs = {"advantages": table(rng, mask, 3, 1), "response_mask": mask}
            yield case(f"{name}, mean only: {mean_only}", "whiten", inputs, {"mean_only": mean_only})
    inputs = {"advantages": [[0.25, 0.25, 0.25]], "response_mask": [[T, T, T]]}
    yield case("equal advantages", "whiten", inputs, {"mean_only": False})
    inputs = {"advantages": [[0.25, 0.25001, 0.25]], "response_mask": [[T, T, T]]}
    yield case("variance below its floor", "whiten", inputs, {"mean_only": False})
    for name in ["plain", "holes", "one token, empty row"]:
        mask = MASKS[name]
        inputs = {"values": table(rng, mask), "returns": table(rng, mask), "response_mask": mask}
        yield case(name, "explained_variance", inputs)


def policy_inputs(rng, mask):
    return {
        "logprobs": table(rng, mask, 0.4, -2),
        "old_logprobs": table(rng, mask, 0.4, -2),
        "advantages": table(rng, mask),
        "response_mask": mask,
    }


def loss_cases(rng):
    clips = {
        "symmetric": (0.2, None, None),
        "asymmetric": (0.2, 0.28, None),
        "dual": (0.2, None, 1.3),
        "asymmetric and dual": (0.1, 0.3, 3.0),
    }
    for clip_name, (low, high, dual) in clips.items():
        parameters = {"policy_clip": low, "policy_clip_high": high, "dual_clip": dual}
        for name, mask in MASKS.items():
            yield case(f"{clip_name}, {name}", "policy_loss", policy_inputs(rng, mask), parameters, ["logprobs"])
        ratios = [-50.0, -19.5, -3.0, -0.25, -0.15, 0.0, 0.15, 0.25, 0.5, 3.0, 12.0, 50.0]
        for sign in [1.0, -1.0]:
            inputs = {
                "logprobs": [ratios],
                "old_logprobs": [[0.0] * len(ratios)],
                "advantages": [[sign * (0.5 + 0.1 * i) for i in range(len(ratios))]],
                "response_mask": [[T] * len(ratios)],
            }
            name = f"{clip_name}, extreme log-ratios, advantages {'above' if sign > 0 else 'below'} zero"
            yield case(name, "policy_loss", inputs, parameters, ["logprobs"])
    for name, mask in MASKS.items():
        for value_clip in [None, 0.5, 0.2]:
            inputs = {k: table(rng, mask) for k in ["values", "old_values", "returns"]} | {"response_mask": mask}
            yield case(f"{name}, value_clip {value_clip}", "value_loss", inputs, {"value_clip": value_clip}, ["values"])
        inputs = {"entropy": table(rng, mask, 0.3, 2), "response_mask": mask}
        yield case(name, "entropy_loss", inputs, {"entropy_coef": 0.01}, ["entropy"])


def reward_model_cases(rng):
    chosen = [round(rng.gauss(0.5, 1), 4) for _ in range(8)]
    rejected = [round(rng.gauss(0, 1), 4) for _ in range(8)]
    yield case("random pairs", "bradley_terry", {"chosen": chosen, "rejected": rejected}, {}, ["chosen", "rejected"])
    inputs = {"chosen": [0.0, 40.0, -40.0, 2.5], "rejected": [0.0, -40.0, 40.0, 2.5]}
    yield case("ties and wide margins", "bradley_terry", inputs, {}, ["chosen", "rejected"])


def schedule_cases(_rng):
    for schedule in ["constant", "linear", "cosine_with_min_lr"]:
        for warmup_steps, total_steps in [(0, 10), (3, 40), (10, 10)]:
            steps = list(range(total_steps + 1))
            parameters = {
                "schedule": schedule,
                "lr": 1.0,
                "warmup_steps": warmup_steps,
                "total_steps": total_steps,
                "min_lr_ratio": 0.1,
            }
            made = case(f"{schedule}, {warmup_steps} of {total_steps}", "lr_schedule", {"steps": steps}, parameters)
            check_against_transformers(made)
            yield made


def check_against_transformers(made):
    import transformers

    p = made["parameters"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=p["lr"])
    warm, total = p["warmup_steps"], p["total_steps"]
    scheduler = {
        "constant": lambda: transformers.get_constant_schedule_with_warmup(optimizer, warm),
        "linear": lambda: transformers.get_linear_schedule_with_warmup(optimizer, warm, total),
        "cosine_with_min_lr": lambda: transformers.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warm, total, min_lr_rate=p["min_lr_ratio"]
        ),
    }[p["schedule"]]()
    for step, lr in zip(made["inputs"]["steps"], made["expected"]["lr"]):
        assert abs(scheduler.get_last_lr()[0] - lr) < 1e-12, (made["name"], step, scheduler.get_last_lr(), lr)
        optimizer.step()
        scheduler.step()


FILES = {
    "kl.json": (kl_cases, 1),
    "reward_shaping.json": (reward_cases, 2),
    "advantages.json": (advantage_cases, 3),
    "losses.json": (loss_cases, 4),
    "reward_model.json": (reward_model_cases, 5),
    "schedules.json": (schedule_cases, 6),
}


def document(cases):
    lines = ",\n".join(json.dumps(made, allow_nan=False) for made in cases)
    return f'{{"format": "echelon-golden-1", "cases": [\n{lines}\n]}}\n'


def main():
    for name, (cases, seed) in FILES.items():
        text = document(list(cases(random.Random(seed))))
        if "--check" in sys.argv[1:]:
            assert (HERE / name).read_text() == text, f"{name} is not what this script writes"
        else:
            (HERE / name).write_text(text)
            print(f"{name}: {text.count(chr(10)) - 2} cases")


if __name__ == "__main__":
    main()
