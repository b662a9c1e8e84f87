"""Runs one recipe in all combinations of what divides it, and compares their metrics with those of one process.

    cargo build --bin ppo
    python3 benchmarks/invariance.py                  # all combinations
    python3 benchmarks/invariance.py --dozen          # a few that cover every pair of settings

One process samples and records the rollouts. Then every combination of workers, ZeRO stage, Adam offload, activation
checkpointing and tier learns from those rollouts, and every metric of every step, clocks' and `perf/` apart, must be
the same:

    |found - expected| <= bound * max(1, |expected|),  bound 1e-9 in float64

Then the same in float32, bound 1e-5, for the few of `--dozen` and at most 5 steps. Combinations that cannot exist are
printed as skipped, with the reason. One JSON object per combination; the last line is the summary. Exit code 1 if a
bound is broken or a run failed, 2 if nothing could be compared. `--output FOLDER` keeps the rollouts and every run's
folder and output (`.log`).

With 4 workers tier medium has one worker for each role, and large two for the actor alone: ZeRO has nothing, or little,
to divide there. `--workers 1 2 4 8` is longer and divides more. The recipe's batch is made small by SIZES below; `--set
table.key=value` lays other values over it, as in `ppo --set`.

Python 3.10 or later, no packages.
"""

import argparse
import concurrent.futures
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
FACTORS = {
    "placement.workers": [1, 2, 4],
    "train.zero_stage": [0, 1, 2, 3],
    "train.adam_offload": [False, True],
    "train.activation_checkpointing": [False, True],
    "placement.tier": ["small", "medium", "large"],
}
ONE_PROCESS = {key: values[0] for key, values in FACTORS.items()}
BOUNDS = {"float64": 1e-9, "float32": 1e-5}
# Rounding grows from step to step, in float32 soon past any bound that would still find a mistake.
MOST_STEPS_FLOAT32 = 5
# 4 workers get 4 rows of a mini-batch each, about 30 tokens long: 2 to 4 micro-batches.
SIZES = [
    "rollout.batch_size=32",
    "ppo.mini_batch_size=16",
    "rollout.max_new_tokens=24",
    "train.tokens_per_micro_batch=64",
]
# `eval={}` takes the prompts away: rollouts are replayed, evaluations would be sampled.
ALWAYS = ["checkpoint.every_steps=off", "eval={}"]


def main():
    options = read_options()
    if not options.output:
        with tempfile.TemporaryDirectory(prefix="invariance-") as folder:
            return Program(options, pathlib.Path(folder)).run()
    folder = pathlib.Path(options.output).resolve()
    if folder.exists() and any(folder.iterdir()):
        stop(f"{folder} is not empty: give --output another folder or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    return Program(options, folder).run()


def read_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ppo", default=ROOT / "target/debug/ppo", help="the program (default: target/debug/ppo)")
    parser.add_argument("--recipe", default=ROOT / "recipes/quickstart.toml", help="default: recipes/quickstart.toml")
    parser.add_argument("--steps", type=int, default=20, help="steps of each run (default: 20)")
    parser.add_argument("--dozen", action="store_true", help="only combinations that cover every pair of settings")
    parser.add_argument("--workers", type=int, nargs="+", default=FACTORS["placement.workers"], help="default: 1 2 4")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--output", help="new folder for all runs (default: a temporary one, removed at the end)")
    parser.add_argument("--set", action="append", default=[], metavar="table.key=value", help="as in `ppo --set`")
    options = parser.parse_args()
    if not (os.path.isfile(options.ppo) and os.access(options.ppo, os.X_OK)):
        stop(f"no program {options.ppo}: `cargo build --bin ppo` makes it, --ppo names another")
    if not os.path.isfile(options.recipe):
        stop(f"no recipe {options.recipe}: --recipe names one, such as recipes/quickstart.toml")
    if min(options.steps, options.jobs, *options.workers) < 1:
        stop("--steps, --jobs and --workers are at least 1")
    return options


def stop(message):
    print(f"invariance.py: {message}", file=sys.stderr)
    sys.exit(2)


class Program:
    def __init__(self, options, folder):
        self.options = options
        self.folder = folder
        self.pool = concurrent.futures.ThreadPoolExecutor(options.jobs)
        self.num_skipped = 0
        self.results = []

    def run(self):
        begun = time.monotonic()
        possible = self.possible()
        few = pairwise(possible)
        steps = {"float64": self.options.steps, "float32": min(self.options.steps, MOST_STEPS_FLOAT32)}
        self.compare("float64", steps["float64"], few if self.options.dozen else possible)
        self.compare("float32", steps["float32"], few)
        broken = [result for result in self.results if not result["holds"]]
        say({
            "combinations": {dtype: len(self.of(dtype)) for dtype in BOUNDS},
            "skipped": self.num_skipped,
            "broken": len(broken),
            "worst": {dtype: worst_of(self.of(dtype)) for dtype in BOUNDS},
            "bound": BOUNDS,
            "steps": steps,
            "seconds": round(time.monotonic() - begun, 1),
            "machine": machine(),
        })
        return 1 if broken else 0

    def of(self, dtype):
        return [result for result in self.results if result["train.dtype"] == dtype]

    def possible(self):
        """The combinations that can exist; the others are printed."""
        # A recipe that is wrong is refused in every combination: that must not look like a pass.
        reason = self.refusal(ONE_PROCESS)
        if reason:
            stop(f"{self.options.recipe} is refused in one process: {reason}")
        factors = FACTORS | {"placement.workers": self.options.workers}
        combinations = [dict(zip(factors, values)) for values in itertools.product(*factors.values())]
        possible = []
        for combination, reason in zip(combinations, self.pool.map(self.refusal, combinations)):
            if reason is None:
                possible.append(combination)
            else:
                self.num_skipped += 1
                say({**combination, "skipped": reason})
        return possible

    def refusal(self, combination):
        """Why a combination cannot exist, or None."""
        if combination["placement.workers"] == 1 and combination["train.zero_stage"] > 0:
            return "one worker has nobody to divide with: only ZeRO 0 is run"
        arguments = self.arguments(sets(combination) + ["train.dtype=float64"])
        plan = subprocess.run([*arguments, "--plan"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if plan.returncode == 0:
            return None
        said = plan.stderr.strip() or plan.stdout.strip() or "it said nothing"
        if plan.returncode != 2:
            stop(f"`{' '.join(arguments)} --plan` ended with {plan.returncode}: {said}")
        return said.splitlines()[0].removeprefix("error: ")

    def compare(self, dtype, steps, combinations):
        """Records the rollouts in one process, then runs the combinations on them."""
        rollouts = self.folder / f"rollouts-{dtype}"
        common = [f"train.dtype={dtype}", f"train.steps={steps}"]
        one = self.folder / f"{dtype}-one-process"
        try:
            self.train(one, sets(ONE_PROCESS) + common + [f"rollout.record={rollouts}"])
        except Failed as error:
            stop(f"the run in one process {error}")
        expected = metrics(one)

        def result_of(combination):
            run = self.folder / "-".join([dtype, *(str(value).lower() for value in combination.values())])
            begun = time.monotonic()
            try:
                self.train(run, sets(combination) + common + [f"rollout.replay={rollouts}"])
                difference, metric, step = worst(metrics(run), expected)
            except Failed as error:
                outcome = {"holds": False, "failed": str(error)}
            else:
                holds = difference <= BOUNDS[dtype]
                outcome = {"holds": holds, "worst": difference, "metric": metric, "step": step}
            return {"train.dtype": dtype, **combination, **outcome, "seconds": round(time.monotonic() - begun, 1)}

        for result in self.pool.map(result_of, combinations):
            self.results.append(result)
            say(result)

    def train(self, run, settings):
        log = run.with_name(run.name + ".log")
        arguments = [*self.arguments(settings), "--output-dir", run]
        # Processes that share the cores are slower with several threads each.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with open(log, "w") as output:
            ended = subprocess.run(
                arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
        if ended.returncode != 0:
            last = " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:])
            raise Failed(f"ended with {ended.returncode}: {last}")

    def arguments(self, settings):
        settings = [*SIZES, *ALWAYS, *self.options.set, *settings]
        return [str(self.options.ppo), str(self.options.recipe), *(word for s in settings for word in ("--set", s))]


def sets(combination):
    # JSON's numbers, truth values and strings are TOML's too.
    return [f"{key}={json.dumps(value)}" for key, value in combination.items()]


def pairwise(combinations):
    """Some of the combinations in which every pair of values occurs that occurs in any."""
    missing = set().union(*map(pairs, combinations))
    chosen = []
    while missing:
        best = max(combinations, key=lambda combination: len(pairs(combination) & missing))  # the first of equals
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def pairs(combination):
    return set(itertools.combinations(combination.items(), 2))


def metrics(run):
    """The metrics of each step that must not depend on the clock."""
    with open(run / "metrics.jsonl") as file:
        steps = [json.loads(line) for line in file]
    is_clock = lambda name: name.startswith("perf/") or "timing" in name
    return [{name: value for name, value in step.items() if not is_clock(name)} for step in steps]


class Failed(Exception):
    """A run did not end well, or differs in what no number says: a step or metric is missing, a value is not finite."""


def worst(found, expected):
    """The largest difference, relative where the metric is above 1, with the metric and its step."""
    if len(found) != len(expected):
        raise Failed(f"{len(found)} steps in place of {len(expected)}")
    largest = (0.0, None, None)
    for step, (ours, theirs) in enumerate(zip(found, expected), 1):
        for name in sorted(ours.keys() | theirs.keys()):
            value, wanted = ours.get(name, "absent"), theirs.get(name, "absent")
            if value == wanted:
                continue
            if not (is_finite(value) and is_finite(wanted)):
                raise Failed(f"{name} of step {step}: {value} against {wanted}")
            difference = abs(value - wanted) / max(1.0, abs(wanted))
            if difference > largest[0]:
                largest = (difference, name, step)
    return largest


def is_finite(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def worst_of(results):
    return max((result["worst"] for result in results if "worst" in result), default=None)


def machine():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return {"cpu": names[0] if names else "unknown", "threads": len(os.sched_getaffinity(0))}


def say(row):
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
