"""Records what the programs do, and compares the programs of a later commit with that record.

    witness.py record BIN OUT      # BIN: folder with the programs, OUT: new folder for the record
    witness.py compare BIN OUT     # the same with other programs; a line for each case, exit code 1 if anything differs

--only NAME[,NAME...]   these cases, and those that they follow; `ppo` stands for all `ppo/...`
--list                  the cases, with what each is
--keep FOLDER           keep what the programs made (a new folder)
--jobs N                programs at a time (default 2; a run of several workers counts as two)

Record and compare on one machine: other processors round otherwise. Python 3.10 or later, no packages; README.md beside
this file says what is compared, and how closely.
"""

import argparse
import array
import json
import math
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ROW = "tests/witness/"
F64, F32 = 1e-9, 1e-5
LONGEST_S = 400
SHOWN = 6


# ---------------------------------------------------------------- cases

CASES = {}


class Case:
    def __init__(self, name, about, work, statistics, bits, slots, after, keep_checkpoints):
        self.name, self.about, self.work = name, about, work
        self.statistics, self.bits, self.slots, self.after = statistics, bits, slots, after
        self.keep_checkpoints = keep_checkpoints


def case(name, about, statistics=F64, bits=True, slots=1, after=(), keep_checkpoints=False):
    """`statistics`: bound of metrics. `bits`: weights, samples and scores are equal bit for bit, else within the bound."""

    def add(work):
        CASES[name] = Case(name, about, work, statistics, bits, slots, after, keep_checkpoints)
        return work

    return add


class Failed(Exception):
    pass


class Desk:
    """What a case works with: its folder, the programs, the folders of other cases."""

    def __init__(self, session, case):
        self.session, self.case = session, case
        self.folder = session.made / case.name
        self.said = self.folder / "said"
        self.said.mkdir(parents=True)
        self.complaints = []

    def of(self, name):
        """The folder of a case that this one follows."""
        return self.session.made / name

    def recorded(self, name):
        """The same, of the programs of before."""
        return (self.session.record or self.session.made) / name

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text) if isinstance(text, bytes) else path.write_text(text)
        return path

    def start(self, program, arguments, env=None, **streams):
        arguments = [str(self.session.programs / program), *map(str, arguments)]
        with self.session.lock:
            if self.session.stopped:
                raise Failed("interrupted")
            child = subprocess.Popen(
                arguments, cwd=ROOT, env=self.session.environment | (env or {}), stdin=subprocess.DEVNULL,
                start_new_session=True, **streams,
            )  # fmt: skip
            self.session.children.append(child)
        return child

    def call(self, name, program, *arguments, ok=None, env=None):
        """Runs a program to its end and keeps what it said; `ok` is the exit code that it must have."""
        child = self.start(program, arguments, env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = ended(child)
        self.keep_said(name, program, arguments, child.returncode, out, err)
        if ok is not None and child.returncode != ok:
            last = " | ".join((out + err).decode(errors="replace").strip().splitlines()[-4:])
            raise Failed(f"{name}: {program} ended with {child.returncode} in place of {ok}: {last}")
        return child.returncode

    def keep_said(self, name, program, arguments, code, out, err):
        shown = " ".join(map(str, arguments))
        text = f"$ {program} {shown}\nexit code {code}\n--- stdout\n{out.decode(errors='replace')}"
        text += f"--- stderr\n{err.decode(errors='replace')}"
        path = self.said / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(self, run, program, recipe, *sets, more=(), ok=0, env=None, named=None):
        """A run in the folder `run` of this case; the folder."""
        folder = self.folder / run
        arguments = self.arguments(folder, recipe, sets, more)
        self.call(named or run.replace("/", "-"), program, *arguments, ok=ok, env=env)
        return folder

    def arguments(self, folder, recipe, sets, more=()):
        words = [word for setting in sets for word in ("--set", setting)]
        return [recipe, "--output-dir", folder, *words, *more]

    def expect_same_metrics(self, found, wanted, bound, steps=None):
        """What must be the same within one generation of programs: two layouts of one calculation."""
        found, wanted = metrics(found), metrics(wanted)[:steps]
        lines = []
        if len(found) != len(wanted):
            lines.append(f"{len(found)} steps in place of {len(wanted)}")
        for step, (a, b) in enumerate(zip(found, wanted), 1):
            names = [n for n in {**b, **a} if not is_clock(n) and not n.startswith(("perf/", "eval/"))]
            lines += [
                f"{name} of step {step}: {b.get(name)} -> {a.get(name)}"
                for name in names
                if not close(a.get(name), b.get(name), bound)
            ]
        if lines:
            self.complaints.append(f"{self.case.name}: the layouts differ: " + "; ".join(lines[:3]))

    def expect(self, holds, what):
        if not holds:
            self.complaints.append(f"{self.case.name}: {what}")


def ended(child):
    try:
        return child.communicate(timeout=LONGEST_S)
    except BaseException as error:
        kill(child)
        child.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise Failed(f"{child.args[0]} did not end within {LONGEST_S} s: {child.args}") from None
        raise


def kill(child):
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def metrics(run):
    with open(run / "metrics.jsonl") as file:
        return [json.loads(line) for line in file]


QUICKSTART = "recipes/quickstart.toml"
# A batch that is small and divides: 8 rows of a mini-batch, some 20 tokens each, in several micro-batches. Without warm-up
# the learning rate of a step does not depend on how many follow.
SMALLER = [
    "rollout.batch_size=16", "ppo.mini_batch_size=8", "rollout.max_new_tokens=16", "train.tokens_per_micro_batch=64",
    "actor.optimizer.warmup_ratio=0", "critic.optimizer.warmup_ratio=0",
]  # fmt: skip
LANGUAGE_MODEL, REWARD_MODEL = "recipes/quickstart/language-model", "recipes/quickstart/reward-model"


@case("quickstart", "12 steps of the quickstart in float32, as it is", statistics=F32)
def quickstart(desk):
    desk.run("run", "ppo", QUICKSTART, "train.steps=12")


@case("quickstart-layouts", "2 steps with each layout of weights, on two threads, and in bfloat16", statistics=F32)
def quickstart_layouts(desk):
    for layout in ["mkl", "onednn"]:
        env = {"ECHELON_WEIGHT_LAYOUT": layout}
        desk.run(layout, "ppo", QUICKSTART, *SMALLER, "train.steps=2", "eval={}", env=env)
    desk.run("threads", "ppo", QUICKSTART, *SMALLER, "train.steps=2", "eval={}", env={"OMP_NUM_THREADS": "2"})
    desk.run("bfloat16", "ppo", QUICKSTART, *SMALLER, "train.steps=2", "eval={}", "train.dtype=bfloat16")


DOUBLE = [*SMALLER, "train.dtype=float64", "checkpoint.every_steps=off", "eval={}"]


@case("rollouts", "20 float64 steps that record their rollouts; replayed by one process")
def rollouts(desk):
    kept = desk.folder / "kept/rollouts"
    run = desk.run("recorded", "ppo", QUICKSTART, *DOUBLE, "train.steps=20", f"rollout.record={kept}")
    again = desk.run("replayed", "ppo", QUICKSTART, *DOUBLE, "train.steps=20", f"rollout.replay={kept}")
    desk.expect_same_metrics(again, run, F64)


@case("rollouts-of-before", "8 steps that replay the files which the recorded programs wrote", after=["rollouts"])
def rollouts_of_before(desk):
    kept = desk.recorded("rollouts") / "kept/rollouts"
    run = desk.run("run", "ppo", QUICKSTART, *DOUBLE, "train.steps=8", f"rollout.replay={kept}")
    desk.expect_same_metrics(run, desk.recorded("rollouts") / "recorded", F64, steps=8)


def replay_over(name, steps, *sets):
    about = f"{steps} float64 steps of the recorded rollouts, {', '.join(sets)}"

    @case(f"ranks/{name}", about, bits=False, slots=2, after=["rollouts"])
    def replay(desk):
        kept = desk.of("rollouts") / "kept/rollouts"
        run = desk.run("run", "ppo", QUICKSTART, *DOUBLE, f"train.steps={steps}", f"rollout.replay={kept}", *sets)
        desk.expect_same_metrics(run, desk.of("rollouts") / "recorded", F64, steps=steps)


TWO = "placement.workers=2"
replay_over("small-0", 20, TWO, "placement.tier=small", "train.zero_stage=0")
replay_over("small-3", 20, TWO, "placement.tier=small", "train.zero_stage=3")
# Four groups of roles, each on a worker of its own; of two groups ZeRO has as little to divide.
FOUR = "placement.workers=4"
replay_over("medium-0", 6, FOUR, "placement.tier=medium", "train.zero_stage=0")
replay_over("medium-3", 6, FOUR, "placement.tier=medium", "train.zero_stage=3")
replay_over(
    "small-2", 6, TWO, "placement.tier=small", "train.zero_stage=2", "train.adam_offload=true",
    "train.activation_checkpointing=true",
)  # fmt: skip
replay_over("large-1", 4, FOUR, "placement.tier=large", "train.zero_stage=1")


@case("ranks/medium-two", "tier medium on two workers: no reference, a rule for a reward", F64, False, 2, ["rollouts"])
def ranks_medium_two(desk):
    kept = desk.of("rollouts") / "kept/rollouts"
    sets = [*DOUBLE, "train.steps=6", f"rollout.replay={kept}", "ppo.kl_coef=0", 'reward={rule="length", target_tokens=6}']
    one = desk.run("one", "ppo", QUICKSTART, *sets)
    for stage in [0, 3]:
        more = [TWO, "placement.tier=medium", f"train.zero_stage={stage}"]
        desk.expect_same_metrics(desk.run(f"zero-{stage}", "ppo", QUICKSTART, *sets, *more), one, F64)


@case("ranks/sampled", "3 float32 steps of two workers that sample, and their evaluation", F32, False, 2)
def ranks_sampled(desk):
    desk.run("run", "ppo", QUICKSTART, *SMALLER, "train.steps=3", TWO, "eval.max_samples=32", "checkpoint.every_steps=2")


@case("ranks/by-hand", "two workers that others started: `worker --join`", F64, False, 2)
def ranks_by_hand(desk):
    folder, secret = desk.folder / "run", desk.folder / "credentials"
    sets = ["train.steps=2", TWO, "placement.listen=127.0.0.1:0", f"placement.credentials={secret}"]
    arguments = desk.arguments(folder, ROW + "small.toml", sets)
    out, err = desk.folder / "kept/out", desk.folder / "kept/err"
    out.parent.mkdir()
    children = []
    try:
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            driver = desk.start("ppo", arguments, stdout=stdout, stderr=stderr)
        children.append(driver)
        address = None
        while not (address and secret.exists()):
            if driver.poll() is not None:
                raise Failed(f"the driver ended before workers joined: {err.read_text()}")
            time.sleep(0.02)
            found = re.search(r"--join (\S+)", out.read_text(errors="replace"))
            address = found and found[1].rstrip(";,")
        for rank in [1, 0]:
            env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            joining = ["--join", address, "--credentials", secret, "--join-timeout-s", "60"]
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            children.append(desk.start("worker", joining, env, **streams))
        for name, child in zip(["worker-1", "worker-0"], children[1:]):
            said = ended(child)
            desk.keep_said(name, "worker", [], child.returncode, *said)
        driver.wait(LONGEST_S)
    finally:
        for child in children:
            kill(child)
            child.wait()
    desk.keep_said("driver", "ppo", arguments, driver.returncode, out.read_bytes(), err.read_bytes())
    if driver.returncode != 0:
        raise Failed(f"the driver ended with {driver.returncode}: {err.read_text()}")
    desk.expect(not secret.exists(), "the credentials are still there")


# PPO's variants: recipe and what is laid over it.
SMALL = ROW + "small.toml"
VARIANTS = {
    "plain": (SMALL, []),
    "kl-loss-k3": (SMALL, ["ppo.kl_placement=loss", "ppo.kl_estimator=k3"]),
    "kl-reward-k2": (SMALL, ["ppo.kl_estimator=k2"]),
    "entropy": (SMALL, ["ppo.entropy_coef=0.02"]),
    "critic-warmup": (SMALL, ["ppo.critic_warmup_steps=1"]),
    "kl-target": (SMALL, ["ppo.kl_target=0.05", "ppo.kl_horizon=100", "train.steps=4"]),
    "dual-clip": (SMALL, ["ppo.dual_clip=1.05", "ppo.epochs=4", "actor.optimizer.lr=1e-2"]),
    "clip-high": (SMALL, ["ppo.policy_clip=0.05", "ppo.policy_clip_high=0.28"]),
    "value-clip-off": (SMALL, ["ppo.value_clip=off"]),
    "value-clip-tight": (SMALL, ["ppo.value_clip=0.05", "ppo.gamma=0.97", "ppo.gae_lambda=0.8"]),
    "four-samples": (SMALL, ["rollout.samples_per_prompt=4", "ppo.mini_batch_size=16"]),
    "no-kl": (SMALL, ["ppo.kl_coef=0"]),
    "not-normalised": (SMALL, ["reward.normalize=false", "reward.clip_range=off"]),
    "missing-eos": (SMALL, ["reward.missing_eos_penalty=1.5", "rollout.max_new_tokens=8"]),
    "epochs": (SMALL, ["ppo.epochs=3", "ppo.mini_batch_size=4", "train.tokens_per_micro_batch=1"]),
    "sampling": (
        SMALL,
        ["rollout.temperature=0.7", "rollout.top_p=0.9", "rollout.top_k=20", "rollout.min_p=0.05", 'rollout.stop=[","]'],
    ),
    "optimizer": (
        SMALL,
        ["actor.optimizer.schedule=linear", "critic.optimizer.warmup_ratio=0.5", "actor.optimizer.weight_decay=0.1",
         "train.max_grad_norm=off", "critic.optimizer.betas=[0.8, 0.9]", "train.activation_checkpointing=true"],
    ),
    "offload": (SMALL, ["train.adam_offload=true", "reference.offload=true"]),
    "engine": (SMALL, ["generation.max_sequences=3", "generation.max_batched_tokens=40"]),
    "fresh-critic": (SMALL, [f"critic.model={LANGUAGE_MODEL}"]),
    "best": (SMALL, ["checkpoint.best_metric=eval/reward", "checkpoint.every_steps=1", "checkpoint.keep=1", "eval.every_steps=1", "train.steps=4"]),
    "mixed": (ROW + "mixed.toml", []),
    "rules": (ROW + "rules.toml", []),
}  # fmt: skip


def variant(name, recipe, sets):
    about = ", ".join(sets) or "as the recipe says"

    @case(f"ppo/{name}", f"{recipe.removeprefix(ROW)}: {about}")
    def work(desk):
        desk.run("run", "ppo", recipe, *sets)


for variant_name, (variant_recipe, variant_sets) in VARIANTS.items():
    variant(variant_name, variant_recipe, variant_sets)


@case("ppo/calibrated", "train.calibrate: names of metrics, one float32 step", statistics=F32)
def calibrated(desk):
    desk.run("run", "ppo", SMALL, "train.calibrate=true", "train.steps=2", "train.dtype=float32", "eval={}")


@case("checkpoint", "what is in a checkpoint, to the bit", keep_checkpoints=True)
def checkpoint(desk):
    desk.run("ppo", "ppo", SMALL, "train.steps=2", "eval={}", "ppo.kl_target=0.05")
    for program in ["sft", "reward"]:
        desk.run(program, program, f"{ROW}{program}.toml", "train.steps=3")


@case("checkpoint-of-before", "runs that the recorded programs began, continued", after=["checkpoint"])
def checkpoint_of_before(desk):
    for program, recipe, steps, sets in [
        ("ppo", SMALL, 4, ["eval={}", "ppo.kl_target=0.05"]),
        ("sft", f"{ROW}sft.toml", 6, []),
        ("reward", f"{ROW}reward.toml", 6, []),
    ]:
        run = desk.folder / program
        shutil.copytree(desk.recorded("checkpoint") / program, run)
        desk.session.to_here(run / "recipe.resolved.toml")
        desk.run(program, program, recipe, f"train.steps={steps}", *sets, more=["--resume"])


for supervised_program in ["sft", "reward"]:

    def supervised(program):
        recipe = f"{ROW}{program}.toml"

        @case(f"{program}/one", "float64, held-out rows, best_metric; also with other keys, and in float32")
        def one(desk):
            desk.run("run", program, recipe)
            more = ["train.epochs=2", "train.batch_size=8", "train.activation_checkpointing=true", "data.max_samples=30",
                    "data.eval_fraction=0.2", "model.optimizer.schedule=linear", "train.max_grad_norm=off"]  # fmt: skip
            lines = (ROOT / recipe).read_text().splitlines()
            text = "\n".join(line for line in lines if not line.startswith("eval = "))
            text = text.replace('"../../', f'"{ROOT}/').replace(f'train = "', f'train = "{HERE}/')
            other = desk.write("kept/other.toml", text)
            desk.run("other", program, other, *more, *(["data.completion_only=false"] if program == "sft" else []))
            start = [f"model.model=recipes/quickstart/start", "model.init=random"]
            desk.run("random", program, recipe, "train.steps=2", *start)
            desk.run("auto", program, recipe, "train.dtype=auto", "train.steps=2")

        @case(f"{program}/ranks", "two workers, float64, ZeRO 0, 3, and 1 with offload", F64, False, 2, [f"{program}/one"])
        def ranks(desk):
            for name, sets in [
                ("zero-0", ["train.zero_stage=0"]),
                ("zero-3", ["train.zero_stage=3"]),
                ("zero-1", ["train.zero_stage=1", "train.adam_offload=true"]),
            ]:
                run = desk.run(name, program, recipe, TWO, *sets)
                desk.expect_same_metrics(run, desk.of(f"{program}/one") / "run", F64)

    supervised(supervised_program)


def stopped_and_resumed(desk, program, recipe, sets, after):
    whole = desk.run("whole", program, recipe, *sets)
    folder = desk.folder / "resumed"
    arguments = desk.arguments(folder, recipe, sets)
    child = desk.start(program, arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log, begun = folder / "metrics.jsonl", time.monotonic()
    while child.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= after):
        if time.monotonic() - begun > LONGEST_S:
            break
        time.sleep(0.001)
    child.send_signal(signal.SIGTERM)
    _, err = ended(child)
    # When the signal comes is chance, so the number of the step is.
    message = re.sub(rb"step[ -]\d+", b"step #", err)
    desk.keep_said("stopped", program, arguments, child.returncode, b"", message)
    desk.expect(child.returncode == 143, f"exit code {child.returncode} after SIGTERM: {err.decode()}")
    stopped_at = log.read_bytes().count(b"\n")
    desk.expect(after <= stopped_at < len(metrics(whole)), f"it was to stop in the middle, not after {stopped_at}")
    resumed = desk.start(
        program, desk.arguments(folder, recipe, sets, ["--resume"]), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = ended(resumed)
    text = b"".join(line for line in out.splitlines(True) if not line.startswith((b"step ", b"after step ")))
    text = re.sub(rb"step[ -]\d+", b"step #", text)
    desk.keep_said("resumed", program, ["--resume"], resumed.returncode, text, err)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # as many files as parts, cut where chance has it
    (folder / "report.html").unlink()
    # So is the step that has the names of a start.
    for run in [folder, whole]:
        lines = [{n: v for n, v in step.items() if not n.startswith("perf/") and "timing" not in n} for step in metrics(run)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for difference in compare_runs(folder, whole, desk.session, 0.0, True, leave={"tensorboard", "checkpoints", "report.html"}):
        desk.complaints.append(f"{desk.case.name}: resumed against undisturbed: {difference}")


@case("resume/ppo", "stopped by SIGTERM in the middle, then --resume: as undisturbed")
def resume_ppo(desk):
    sets = ["train.steps=9", "ppo.kl_target=0.05", "checkpoint.every_steps=5", "checkpoint.keep=1", "eval.every_steps=4"]
    stopped_and_resumed(desk, "ppo", SMALL, sets, 3)


@case("resume/sft", "the same for sft")
def resume_sft(desk):
    stopped_and_resumed(desk, "sft", ROW + "sft.toml", ["train.epochs=3", "checkpoint.every_steps=1"], 9)


@case("resume/reward", "the same for reward")
def resume_reward(desk):
    stopped_and_resumed(desk, "reward", ROW + "reward.toml", ["train.epochs=3", "checkpoint.every_steps=1"], 9)


@case("resume/other-ranks", "two steps of one process, then two of two workers, then two of one", F64, False, 2)
def resume_other_ranks(desk):
    desk.run("run", "ppo", SMALL, "train.steps=2", named="one")
    desk.run("run", "ppo", SMALL, "train.steps=4", TWO, "train.zero_stage=3", more=["--resume"], named="two")
    desk.run("run", "ppo", SMALL, "train.steps=6", more=["--resume"], named="three")
    desk.run("run", "ppo", SMALL, "train.steps=6", more=["--resume"], named="finished")


@case("generate", "greedy and sampled, float32 and float64, of the quickstart's model and of the one that sft exported", after=["sft/one"])
def generate(desk):
    exported = desk.of("sft/one") / "run/model"
    for model, folder in [("quickstart", LANGUAGE_MODEL), ("sft", exported)]:
        for name, more in [
            ("greedy", ["--temperature", "0"]),
            ("sampled", ["--seed", "5", "--max-sequences", "3"]),
            ("double", ["--temperature", "0.8", "--dtype", "float64", "--ignore-eos"]),
        ]:
            output = desk.folder / f"{model}-{name}.jsonl"
            arguments = ["--model", folder, "--prompts", ROW + "prompts.jsonl", "--output", output]
            desk.call(f"{model}-{name}", "generate", *arguments, "--max-new-tokens", "24", *more, ok=0)


@case("score", "log-probs of causal models, scores of reward models", after=["sft/one", "reward/one"])
def score(desk):
    models = {
        "quickstart": LANGUAGE_MODEL,
        "quickstart-reward": REWARD_MODEL,
        "sft": desk.of("sft/one") / "run/model",
        "reward": desk.of("reward/one") / "run/model",
    }
    for model, folder in models.items():
        for dtype in ["auto", "float64"]:
            output = desk.folder / f"{model}-{dtype}.jsonl"
            arguments = ["--model", folder, "--input", ROW + "score.jsonl", "--output", output, "--dtype", dtype]
            desk.call(f"{model}-{dtype}", "score", *arguments, ok=0)


# ---------------------------------------------------------------- text


def calls(name, about, slots=1):
    """A case of many short calls. The function gives (name, program, arguments)."""

    def add(listed):
        @case(name, about)
        def work(desk):
            for call_name, program, arguments in listed(desk):
                desk.call(call_name, program, *arguments)

        return listed

    return add


def program_of(recipe):
    words = recipe.stem.split("-")
    return "sft" if "sft" in words else "reward" if "reward" in words else "ppo"


def shipped():
    recipes = [*(ROOT / "recipes").glob("*.toml"), *(ROOT / "recipes/quickstart").glob("*.toml")]
    return [(recipe.stem, program_of(recipe), recipe.relative_to(ROOT)) for recipe in sorted(recipes)]


@calls("text/plans", "`--plan` of every recipe in recipes/")
def plans(_):
    return [(stem, program, [recipe, "--plan"]) for stem, program, recipe in shipped()]


@calls("text/plans-json", "`--plan=json` of every recipe in recipes/")
def plans_json(_):
    return [(stem, program, [recipe, "--plan=json"]) for stem, program, recipe in shipped()]


SETTINGS = {
    ("ppo", QUICKSTART): [
        "placement.workers=2",
        "placement.workers=2 train.zero_stage=0",
        "placement.workers=2 train.zero_stage=3 train.adam_offload=true",
        "placement.workers=2 placement.tier=medium",
        "placement.workers=4 placement.tier=medium train.zero_stage=2",
        "placement.workers=4 placement.tier=large",
        "placement.workers=4 placement.actor={devices=[0,1]} placement.critic={devices=[2]}",
        "placement.workers=2 placement.host_memory_gib=0.05",
        "placement.workers=3 train.activation_checkpointing=true train.dtype=float64",
        "placement.workers=200",
        "train.dtype=bfloat16 ppo.kl_coef=0 ppo.epochs=2",
        "placement.device=cuda placement.gpus_per_node=2",
    ],
    ("ppo", "recipes/ppo-llama-7b-1n8g.toml"): [
        "placement.gpu=A100-40GB",
        "placement.gpu=H200 placement.nodes=2",
        "placement.gpus_per_node=1",
        "placement.gpus_per_node=2 train.adam_offload=true",
        "train.zero_stage=0",
        "train.zero_stage=3 reference.offload=true generation.tensor_parallel_size=2",
        "placement.tier=large",
        "placement.host_memory_gib=64",
        "train.tokens_per_micro_batch=4000000",
        "placement.critic={colocate_with=\"reward\"}",
    ],
    ("ppo", "recipes/ppo-llama-70b-4n8g.toml"): ["placement.nodes=1", "placement.nodes=8 placement.gpu=H200"],
    ("ppo", "recipes/ppo-llama-13b-2n8g.toml"): ["placement.tier=small", "placement.gpu=B100", "generation.kv_cache_bytes=2000000000"],
    ("sft", "recipes/sft-llama-7b-1n8g.toml"): [
        "placement.gpus_per_node=1",
        "placement.gpus_per_node=4 train.zero_stage=2 placement.gpu=A100-80GB",
        "train.adam_offload=true train.activation_checkpointing=false",
        "placement.device=cpu placement.workers=2",
    ],
    ("reward", "recipes/reward-llama-7b-1n8g.toml"): ["train.zero_stage=0 placement.gpu=A100-40GB", "train.zero_stage=3"],
    ("sft", ROW + "sft.toml"): ["placement.workers=2", "placement.workers=5", "train.zero_stage=3 placement.workers=4"],
    ("reward", ROW + "reward.toml"): ["placement.workers=2 train.adam_offload=true", "placement.workers=3"],
    ("ppo", ROW + "mixed.toml"): ["placement.workers=2", "reward.mix.0.weight=3 reward.mix.1.target_tokens=9"],
    ("ppo", ROW + "rules.toml"): ["data.mix.1.weight=0.5"],
}  # fmt: skip


@calls("text/settings", "`--plan` of some recipes with --set: workers, tiers, ZeRO, offload, GPUs, plans that are refused")
def settings(desk):
    for (program, recipe), lines in SETTINGS.items():
        for index, line in enumerate(lines):
            sets = [word for setting in line.split(" ") for word in ("--set", setting)]
            format = "--plan=json" if index % 4 == 3 else "--plan"
            yield f"{pathlib.Path(recipe).stem}-{index}", program, [recipe, format, *sets]
    text = (ROOT / "recipes/ppo-llama-7b-1n8g.toml").read_text().replace('"shapes/', f'"{ROOT}/recipes/shapes/')
    pools = '[[placement.node_pool]]\nnodes = 2\ngpus_per_node = 8\ngpu = "H100-80GB"\n[[placement.node_pool]]\n'
    pools += 'gpus_per_node = 4\ngpu = "L40S"\nhost_memory_gib = 512\n'
    text = text.replace('device = "cuda"\nnodes = 1\ngpus_per_node = 8\n', pools)
    desk.expect("node_pool" in text, "the pools have no place in the recipe")
    yield "pools", "ppo", [desk.write("kept/pools.toml", text), "--plan"]


@calls("text/wrong-recipes", "recipes that are refused: wrong_recipes.txt")
def wrong_recipes(desk):
    text = (HERE / "wrong_recipes.txt").read_text()
    desk.write("kept/prompts.jsonl", '{"prompt": "2+2=", "answer": "4"}\n')
    for part in re.split(r"^=== ", text, flags=re.M)[1:]:
        name, recipe = part.split("\n", 1)
        path = desk.write(f"kept/{name}.toml", recipe)
        header = [line[2:] for line in recipe.splitlines() if line.startswith("# ")]
        program = next((line[9:] for line in header if line.startswith("program: ")), "ppo")
        sets = [word for line in header if line.startswith("--set ") for word in ("--set", line[6:])]
        yield name, program, [path, *sets, "--output-dir", desk.folder / "kept/runs" / name]


@calls("text/wrong-settings", "data, models, limits and run folders that are refused")
def wrong_settings(desk):
    run = desk.folder / "kept/run"
    kept = desk.folder / "kept"
    of_one_folder = {"occupied", "no-whole-checkpoint", "no-whole-checkpoint-sft", "run-is-a-file", "resume-nothing"}

    def of(name, *sets, program="ppo", recipe=SMALL, more=()):
        return name, program, desk.arguments(run if name in of_one_folder else kept / "runs" / name, recipe, sets, more)

    for setting in [
        "rollout.batchsize=4", "train.steps=six", "ppo.gamma=1.5", "ppo.mini_batch_size=3", "data.prompts=nowhere.jsonl",
        "data.max_prompt_tokens=1", "data.prompt_key=question", "actor.model=./nowhere", f"actor.model={REWARD_MODEL}",
        f"reward.model={LANGUAGE_MODEL}", "rollout.max_new_tokens=225", "generation.tensor_parallel_size=2",
        "generation.kv_cache_bytes=1000", "placement.workers=17", "placement.device=cuda", "placement.nodes=2",
        "placement.workers=2 placement.tier=tiny", "train.max_tokens=4", "name=a/b", "checkpoint.best_metric=eval/nothing",
        "rollout.replay=nowhere", "train.tokens_per_micro_batch=9223372036854775807", "data.apply_chat_template=true", "reward.normalise=true",
        "eval.prompts=nowhere.jsonl", "critic.model=owner/absent", "placement.listen=here", "train.dtype=float16",
        "train", "=3", "train.steps=", "reward.mix.0.weight=1", "data.label_key=answer", "reward={rule=\"math\"}",
        "rollout.record=/proc/no/such", "actor.optimizer.lr=-1",
    ]:  # fmt: skip
        yield of(re.sub(r"[^a-z0-9.=_-]+", "_", setting), *setting.split(" "))
    for name, text in {
        "empty": "", "broken": '{"prompt": "fine"}\n{"prompt": \n', "other-key": '{"question": "fine"}\n',
        "number": '{"prompt": 3}\n',
    }.items():  # fmt: skip
        path = desk.write(f"kept/{name}.jsonl", text)
        yield of(f"data-{name}", f"data.prompts={path}")
        yield of(f"rows-{name}", f"data.train={path}", program="sft", recipe=ROW + "sft.toml")
        yield of(f"pairs-{name}", f"data.train={path}", program="reward", recipe=ROW + "reward.toml")
    model = kept / "model"
    shutil.copytree(ROOT / LANGUAGE_MODEL, model)
    with open(model / "model.safetensors", "r+b") as file:
        file.truncate(1_000_000)
    yield of("truncated", f"actor.model={model}")
    yield of("truncated-sft", f"model.model={model}", program="sft", recipe=ROW + "sft.toml")
    for program in ["sft", "reward"]:
        recipe = f"{ROW}{program}.toml"
        for setting in [
            "placement.workers=5", "train.max_tokens=257", "checkpoint.best_metric=eval/nothing", "model.lr=1", "ppo.epochs=1",
            "model.model=./nowhere", "placement.nodes=2", "data.eval=nowhere.jsonl", "train.max_tokens=2", "train.epochs=0",
        ]:  # fmt: skip
            yield of(f"{program}-{setting.replace('/', '_')}", setting, program=program, recipe=recipe)
        yield of(f"{program}-ppo-recipe", program=program)
        yield of(f"ppo-{program}-recipe", recipe=recipe)
    yield of("reward-sft-recipe", program="reward", recipe=ROW + "sft.toml")
    desk.write("kept/run/notes.txt", "mine")
    yield of("occupied")
    desk.write("kept/run/checkpoints/step-4/manifest.json", "{")
    desk.write("kept/run/checkpoints/step-2/actor.safetensors", "")
    yield of("no-whole-checkpoint", more=["--resume"])
    yield of("no-whole-checkpoint-sft", more=["--resume"], program="sft", recipe=ROW + "sft.toml")
    shutil.rmtree(run)
    run.write_text("a file")
    yield of("run-is-a-file")
    run.unlink()
    yield of("resume-nothing", more=["--resume", "--set", "train.steps=1", "--set", "eval={}"])
    yield "no-place", "ppo", [SMALL, "--output-dir", "/proc/no/such"]


@calls("text/arguments", "command lines that are refused, and --help")
def arguments(desk):
    out = desk.folder / "kept/out.jsonl"
    out.parent.mkdir()
    for program in ["ppo", "sft", "reward", "generate", "score", "import", "worker"]:
        yield f"{program}-nothing", program, []
        yield f"{program}-help", program, ["--help"]
        yield f"{program}-unknown", program, ["--stepz=5", "x"]
    for name, words in {
        "set-without-value": [SMALL, "--set"], "two-recipes": [SMALL, "other.toml"], "absent-recipe": ["absent.toml"],
        "recipe-is-a-folder": ["recipes"], "plan-xml": [SMALL, "--plan=xml"], "output-dir-twice": [SMALL, "--output-dir", "a", "--output-dir", "b", "--plan"],
        "plan-and-resume": [SMALL, "--plan", "--resume", "--output-dir", desk.folder / "kept/none"], "no-output-dir": [SMALL, "--output-dir"],
        "resume-value": [SMALL, "--resume=yes", "--plan"],
    }.items():  # fmt: skip
        yield name, "ppo", words
    model = ["--model", LANGUAGE_MODEL]
    prompts, rows = ["--prompts", ROW + "prompts.jsonl"], ["--input", ROW + "score.jsonl"]
    for name, words in {
        "no-prompts": model, "no-output": [*model, *prompts], "temperature": [*model, *prompts, "--output", out, "--temperature", "-1"],
        "tokens": [*model, *prompts, "--output", out, "--max-new-tokens", "many"], "no-tokens": [*model, *prompts, "--output", out, "--max-new-tokens", "0"],
        "context": [*model, *prompts, "--output", out, "--max-new-tokens", "300", "--ignore-eos"], "dtype": [*model, *prompts, "--output", out, "--dtype", "int8"],
        "device": [*model, *prompts, "--output", out, "--device", "cuda"], "twice": [*model, *model, *prompts, "--output", out],
        "reward-model": ["--model", REWARD_MODEL, *prompts, "--output", out], "no-model": ["--model", "./nowhere", *prompts, "--output", out],
        "wrong-rows": [*model, "--prompts", ROW + "score.jsonl", "--output", out], "no-file": [*model, "--prompts", "nowhere.jsonl", "--output", out],
    }.items():  # fmt: skip
        yield f"generate-{name}", "generate", words
    for name, words in {
        "no-input": model, "no-output": [*model, *rows], "wrong-rows": [*model, "--input", ROW + "prompts.jsonl", "--output", out],
        "no-folder": [*model, *rows, "--output", "nowhere/out.jsonl"], "folder": [*model, *rows, "--output", "recipes"],
        "id": [*model, "--input", desk.write("kept/id.jsonl", '{"token_ids": [1, 999999]}\n'), "--output", out],
        "empty": [*model, "--input", desk.write("kept/empty.jsonl", ""), "--output", out],
    }.items():  # fmt: skip
        yield f"score-{name}", "score", words
    yield "import-absent", "import", ["missing.gguf", "--output", desk.folder / "kept/imported"]
    yield "import-no-gguf", "import", [ROW + "score.jsonl", "--output", desk.folder / "kept/imported"]
    yield "import-occupied", "import", ["missing.gguf", "--output", "recipes"]
    for name, words in {
        "address": ["--join", "nowhere"], "timeout": ["--join", "127.0.0.1:1", "--join-timeout-s", "-1"],
        "no-rank": ["--join", "127.0.0.1:1", "--credentials", "nowhere", "--join-timeout-s", "0.5"],
    }.items():  # fmt: skip
        yield f"worker-{name}", "worker", words


@case("text/layout-variable", "ECHELON_WEIGHT_LAYOUT that is none")
def layout_variable(desk):
    run = desk.folder / "kept/run"
    desk.call("layout", "ppo", *desk.arguments(run, SMALL, ["train.dtype=float32"]), env={"ECHELON_WEIGHT_LAYOUT": "fast"})


@case("text/changed", "--resume of a run with another recipe, other rows, another program, and of a finished one")
def changed(desk):
    rows = desk.write("kept/rows.jsonl", (HERE / "rows.jsonl").read_text())
    sets = ["train.steps=2", "eval={}"]
    for run, program, recipe, begun in [
        ("kept/ppo", "ppo", SMALL, sets),
        ("kept/sft", "sft", ROW + "sft.toml", ["train.steps=2", f"data.train={rows}"]),
    ]:
        desk.run(run, program, recipe, *begun)
    resume = ["--resume"]
    for name, more in {
        "kl": ["ppo.kl_coef=0.5"], "several": ["seed=1", "rollout.top_k=5", "train.dtype=float32", "train.max_grad_norm=8.0"],
        "reward": ["reward.normalize=false"], "fewer": ["train.steps=1"], "actor": [f"actor.model={REWARD_MODEL}"],
    }.items():  # fmt: skip
        desk.run("kept/ppo", "ppo", SMALL, *sets, *more, more=resume, ok=None, named=name)
    desk.run("kept/ppo", "sft", ROW + "sft.toml", more=resume, ok=None, named="of-ppo-by-sft")
    desk.run("kept/sft", "ppo", SMALL, more=resume, ok=None, named="of-sft-by-ppo")
    desk.run("kept/ppo", "ppo", SMALL, *sets, ok=None, named="without-resume")
    rows.write_text(rows.read_text().replace("lamp", "lump"))
    desk.run("kept/sft", "sft", ROW + "sft.toml", "train.steps=4", f"data.train={rows}", more=resume, ok=None, named="rows")
    desk.run("kept/sft", "sft", ROW + "sft.toml", f"data.train={rows}", "model.optimizer.lr=0.1", more=resume, ok=None, named="lr")
    desk.run("kept/ppo", "ppo", SMALL, *sets, more=resume, ok=None, named="finished")
    for step in (desk.folder / "kept/ppo/checkpoints").iterdir():
        (step / "manifest.json").write_text("{")
    desk.run("kept/ppo", "ppo", SMALL, *sets, more=resume, ok=None, named="damaged")
    shutil.rmtree(desk.folder / "kept/ppo/checkpoints")
    desk.run("kept/ppo", "ppo", SMALL, *sets, more=resume, ok=None, named="no-checkpoints")


@case("text/failures", "runs that fail: a reward program, losses and weights that are no numbers")
def failures(desk):
    text = (HERE / "small.toml").read_text().replace('"../../', f'"{ROOT}/')
    model = f'model = "{ROOT}/{REWARD_MODEL}"\nnormalize = true\n'
    desk.expect(model in text, "the reward model has no place in the recipe")

    def command(name, line, more=""):
        quoted = json.dumps(line)
        return desk.write(f"kept/{name}.toml", text.replace(model, f"command = {quoted}\n{more}"))

    gives_up = 'n=0; while read -r line; do n=$((n + 1)); if [ $n = 20 ]; then echo "out of judgement" >&2; exit 7; fi; echo "{\\"reward\\": ${#line}}"; done'
    huge = "while read -r line; do echo '{\"reward\": 1e308}'; done"
    nonsense = "while read -r line; do echo what; done"
    desk.run("gives-up", "ppo", command("gives-up", gives_up), "eval={}", ok=1)
    desk.run("huge", "ppo", command("huge", huge, 'clip_range = "off"\n'), "eval={}", ok=1)
    desk.run("nonsense", "ppo", command("nonsense", nonsense), "eval={}", ok=1)
    spoilt = desk.folder / "kept/model"
    shutil.copytree(ROOT / LANGUAGE_MODEL, spoilt)
    with open(spoilt / "model.safetensors", "r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\xff" * 64)
    desk.run("spoilt-ppo", "ppo", SMALL, f"actor.model={spoilt}", "eval={}", ok=1)
    desk.run("spoilt-sft", "sft", ROW + "sft.toml", f"model.model={spoilt}", ok=1)


# ---------------------------------------------------------------- comparing


def is_clock(name):
    return "timing" in name or (name.startswith("perf/") and name != "perf/rollout_logprob_diff_max")


def close(a, b, bound):
    if isinstance(a, bool) or isinstance(b, bool) or not (is_number(a) and is_number(b)):
        return a == b
    if a == b or (math.isnan(a) and math.isnan(b)):
        return True
    return abs(a - b) <= bound * max(1.0, abs(b))


def is_number(value):
    return isinstance(value, (int, float))


class Place:
    """Where a generation of programs worked: its paths are masked in what it wrote."""

    def __init__(self, root, made, programs, record=None):
        names = [(root, "$ROOT"), (made, "$MADE"), (programs, "$BIN")]
        # What was recorded lies there as it lay where it was made.
        names += [(str(record), "$MADE")] if record else []
        self.names = sorted(names, key=lambda pair: -len(pair[0]))

    def masked(self, text):
        for path, name in self.names:
            text = text.replace(path, name)
        text = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:#", text)
        return re.sub(r"\bpid \d+", "pid #", text)


def compare_runs(found, wanted, session, statistics, bits, leave=()):
    """Differences between two folders of one generation."""
    here = session.here
    return list(differences(Tree(found, here), Tree(wanted, here), statistics, bits, leave))


class Tree:
    """The files below a folder by their name, in which what is chance is masked."""

    def __init__(self, folder, place):
        self.folder, self.place, self.files = folder, place, {}
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.is_dir() and any(path.iterdir()):
                continue
            if name == "kept" or name.startswith("kept/"):
                continue
            name = re.sub(r"events\.out\.tfevents\.\d+\.[^/]*", "events.out.tfevents", name)
            while name in self.files:
                name += "+"
            self.files[name] = path

    def text(self, name):
        return self.place.masked(self.files[name].read_text(errors="replace"))


def differences(found, wanted, statistics, bits, leave=()):
    def counts(name):
        return not any(part in leave for part in name.split("/"))

    ours, theirs = set(filter(counts, found.files)), set(filter(counts, wanted.files))
    for name in sorted(theirs - ours):
        yield f"{name}: is missing"
    for name in sorted(ours - theirs):
        yield f"{name}: is new"
    # What a reader sees first, weights last.
    weight = {"metrics.jsonl": 0, "samples.jsonl": 1}
    order = lambda name: (weight.get(name.rsplit("/", 1)[-1], 3 if name.endswith(".safetensors") else 2), name)
    for name in sorted(ours & theirs, key=order):
        if found.files[name].is_dir():
            continue
        near = F32 if name.startswith("auto/") else statistics  # on a CPU `auto` is float32
        for difference in differences_of_file(name, found, wanted, near, bits):
            yield f"{name}: {difference}"


def differences_of_file(name, found, wanted, statistics, bits):
    a, b = found.files[name], wanted.files[name]
    base = name.rsplit("/", 1)[-1]
    bound = 0.0 if bits else statistics
    if name.startswith("said/"):
        yield from said_differences(found.text(name), wanted.text(name), statistics)
    elif base.startswith("events.out.tfevents"):
        yield from event_differences(a, b, max(statistics, 1e-6), found.place, wanted.place)
    elif base == "metrics.jsonl":
        yield from metric_differences(a, b, statistics)
    elif base.endswith(".safetensors"):
        yield from tensor_differences(a, b, bound)
    elif base.endswith(".jsonl"):
        yield from rows_differences(found.text(name), wanted.text(name), bound)
    elif base == "manifest.json" and not bits:
        pass
    elif base.startswith("eval_") or base in ["config.json", "state.json"]:
        # What sft and reward measure there are statistics; what ppo scores there is as exact as samples are.
        x, y = load_json(found.text(name)), load_json(wanted.text(name))
        scores = isinstance(y, dict) and "responses" in y
        yield from value_differences(x, y, bound if scores or base == "state.json" else statistics)
    elif base == "report.html":
        yield from text_differences(numberless(found.text(name)), numberless(wanted.text(name)))
    elif base == "plan.txt":
        yield from text_differences(found.text(name), wanted.text(name))
    elif base.endswith((".toml", ".txt", ".json", ".jinja", ".html")):
        yield from text_differences(found.text(name), wanted.text(name))
    elif a.read_bytes() != b.read_bytes():
        yield "other bytes"


def load_json(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


def metric_differences(a, b, bound):
    ours, theirs = ([json.loads(line) for line in path.read_text().splitlines()] for path in (a, b))
    if len(ours) != len(theirs):
        yield f"{len(theirs)} steps -> {len(ours)}"
    for step, (found, wanted) in enumerate(zip(ours, theirs), 1):
        if list(found) != list(wanted):
            new, gone = [n for n in found if n not in wanted], [n for n in wanted if n not in found]
            yield f"names of step {step}: new {new}, missing {gone}" if new or gone else f"names of step {step}: other order"
        for name, value in wanted.items():
            if not is_clock(name) and name in found and not close(found[name], value, bound):
                yield f"{name} of step {step}: {value} -> {found[name]}"


def rows_differences(found, wanted, bound):
    ours, theirs = found.splitlines(), wanted.splitlines()
    if len(ours) != len(theirs):
        yield f"{len(theirs)} rows -> {len(ours)}"
    for index, (a, b) in enumerate(zip(ours, theirs), 1):
        if a != b:
            before = list(value_differences(load_json(a), load_json(b), bound))
            for difference in before or ([] if bound else [f"the same values, written otherwise: {b} -> {a}"]):
                yield f"row {index}: {difference}"


def value_differences(found, wanted, bound, at=""):
    if isinstance(found, dict) and isinstance(wanted, dict):
        if list(found) != list(wanted):
            yield f"{at} keys: {list(wanted)} -> {list(found)}"
        for key in wanted:
            if key in found:
                yield from value_differences(found[key], wanted[key], bound, f"{at}.{key}" if at else key)
    elif isinstance(found, list) and isinstance(wanted, list):
        if len(found) != len(wanted):
            yield f"{at}: {len(wanted)} values -> {len(found)}"
        for index, (a, b) in enumerate(zip(found, wanted)):
            yield from value_differences(a, b, bound, f"{at}[{index}]")
    elif not close(found, wanted, bound):
        yield f"{at}: {shortened(wanted)} -> {shortened(found)}"


def shortened(value):
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:157] + "..."


NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def numberless(text):
    """Numbers, lists of them and what is drawn of them; the drawings of times have grids of any fineness."""
    text = re.sub(r'\b(d|points)="[^"]*"', r'\1="#"', text)
    text = re.sub(r"<svg.*?</svg>", "<svg/>", text, flags=re.S)
    return re.sub(r"[ \t]+", " ", NUMBER.sub("#", text))


def text_differences(found, wanted):
    ours, theirs = found.splitlines(), wanted.splitlines()
    shown = 0
    for index in range(max(len(ours), len(theirs))):
        a = ours[index] if index < len(ours) else "(no line)"
        b = theirs[index] if index < len(theirs) else "(no line)"
        if a != b and shown < 2:
            shown += 1
            start = max(0, next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b))) - 60)
            yield f"line {index + 1}: {b[start:start + 160]!r} -> {a[start:start + 160]!r}"
    if found != wanted and shown == 0:
        yield "other line ends"


TIMES = [
    (re.compile(r"\b(gen|score|train) \d+(\.\d+)?(e-?\d+)?(?=[ )])"), r"\1 #"),
    (re.compile(r"\S+ tok/s"), "# tok/s"),
    (re.compile(r"\b(\d+h ?)?(\d+m ?)?\d+(\.\d+)?(ms|µs|s)\b"), "#s"),
    (re.compile(r"\beta \S+"), "eta #"),
    (re.compile(r'("seconds"|"tokens_per_second"):[0-9.e-]+'), r"\1:#"),
]


def said_differences(found, wanted, statistics):
    """Times are masked; a number with decimals may differ by its last digit shown."""
    if found == wanted:
        return
    ours, theirs = found.splitlines(), wanted.splitlines()
    if len(ours) != len(theirs):
        yield from text_differences(found, wanted)
        return
    for index, (a, b) in enumerate(zip(ours, theirs), 1):
        if a == b:
            continue
        if re.match(r"(step +\d+/|done: |\{\"prefill_tokens)", b):
            for pattern, masked in TIMES:
                a, b = pattern.sub(masked, a), pattern.sub(masked, b)
        same = NUMBER.split(a) == NUMBER.split(b)
        same = same and all(map(lambda x, y: shown_alike(x, y, statistics), NUMBER.findall(a), NUMBER.findall(b)))
        if not same:
            yield f"line {index}: {b!r} -> {a!r}"


def shown_alike(a, b, bound):
    if a == b:
        return True
    if not any(c in a + b for c in ".e"):
        return False
    mantissa = b.split("e")[0]
    digits = len(mantissa.split(".")[1]) if "." in mantissa else 0
    last = 10.0 ** (-digits + (int(b.split("e")[1]) if "e" in b else 0))
    return abs(float(a) - float(b)) <= max(1.01 * last, bound)


SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1}


def read_tensors(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return header, memoryview(data)[8 + length :]


def numbers_of(dtype, data):
    if dtype == "F64":
        return array.array("d", data.tobytes())
    if dtype == "F32":
        return array.array("f", data.tobytes())
    if dtype == "BF16":
        return array.array("f", b"".join(b"\0\0" + data[i : i + 2].tobytes() for i in range(0, len(data), 2)))
    if dtype == "F16":
        return [x[0] for x in struct.iter_unpack("<e", data)]
    return array.array({"I64": "q", "I32": "i", "I8": "b"}.get(dtype, "B"), data.tobytes())


def tensor_differences(a, b, bound):
    if a.stat().st_size == 0 and b.stat().st_size == 0:
        return
    (ours, our_data), (theirs, their_data) = read_tensors(a), read_tensors(b)
    if ours.get("__metadata__") != theirs.get("__metadata__"):
        yield f"metadata: {theirs.get('__metadata__')} -> {ours.get('__metadata__')}"
    for name in sorted(set(ours) | set(theirs) - {"__metadata__"}):
        if name == "__metadata__":
            continue
        x, y = ours.get(name), theirs.get(name)
        if x is None or y is None:
            yield f"tensor {name}: {'is missing' if x is None else 'is new'}"
            continue
        if (x["dtype"], x["shape"]) != (y["dtype"], y["shape"]):
            yield f"tensor {name}: {y['dtype']} {y['shape']} -> {x['dtype']} {x['shape']}"
            continue
        found, wanted = our_data[slice(*x["data_offsets"])], their_data[slice(*y["data_offsets"])]
        if found == wanted:
            continue
        pairs = list(zip(numbers_of(x["dtype"], found), numbers_of(x["dtype"], wanted)))
        unequal = [i for i, (p, q) in enumerate(pairs) if not close(p, q, bound)]
        if unequal:
            i = unequal[0]
            most = max(abs(pairs[j][0] - pairs[j][1]) for j in unequal)
            yield (
                f"tensor {name}: {len(unequal)} of {len(pairs)} values, by {most:.3g} at most; "
                f"the first at {i}: {pairs[i][1]!r} -> {pairs[i][0]!r}"
            )
        elif bound == 0.0:
            yield f"tensor {name}: equal numbers, other bits"


# TensorBoard's events: records of length, checksum, protobuf, checksum.


def fields(data):
    """The fields of a protobuf message: number and value; messages and strings as bytes."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
        elif kind == 1:
            yield key >> 3, struct.unpack_from("<d", data, at)[0]
            at += 8
        elif kind == 5:
            yield key >> 3, struct.unpack_from("<f", data, at)[0]
            at += 4
        elif kind == 2:
            length = varint()
            yield key >> 3, bytes(data[at : at + length])
            at += length
        else:
            raise ValueError(f"protobuf's wire type {kind}")


def events(path, place):
    """(step, tag, kind, numbers or text) of every value."""
    data, at, found = path.read_bytes(), 0, []
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = list(fields(data[at + 12 : at + 12 + length]))
        at += 16 + length
        step = next((value for number, value in event if number == 2), 0)
        for number, summary in event:
            if number != 5:
                continue
            for _, value in fields(summary):
                parts = list(fields(value))
                tag = next((v.decode() for n, v in parts if n == 1), "")
                for n, v in parts:
                    if n == 2:
                        found.append((step, tag, "scalar", [v]))
                    elif n == 5:
                        histogram = []
                        for m, w in fields(v):
                            packed = isinstance(w, bytes)
                            histogram += array.array("d", w) if packed else [w]
                        found.append((step, tag, "histogram", histogram))
                    elif n != 1:
                        text = v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v)
                        found.append((step, tag, f"field {n}", place.masked(text)))
    return found


def event_differences(a, b, bound, our_place, their_place):
    # The order of a step's entries is nobody's business.
    ours, theirs = (sorted(events(*where), key=lambda entry: entry[:3]) for where in [(a, our_place), (b, their_place)])
    names = [[entry[:3] for entry in entries] for entries in (ours, theirs)]
    if names[0] != names[1]:
        new = [n for n in names[0] if n not in set(names[1])][:4]
        gone = [n for n in names[1] if n not in set(names[0])][:4]
        yield f"entries: new {new}, missing {gone}" if new or gone else "entries: other order or number"
        return
    for (step, tag, kind, found), (_, _, _, wanted) in zip(ours, theirs):
        if is_clock(tag):
            continue
        if isinstance(wanted, str):
            if found != wanted:
                yield f"{tag} of step {step}: {shortened(wanted)} -> {shortened(found)}"
        elif len(found) != len(wanted) or not all(close(x, y, bound) for x, y in zip(found, wanted)):
            yield f"{tag} of step {step}: {shortened(wanted)} -> {shortened(found)}"


# ---------------------------------------------------------------- the session


class Session:
    def __init__(self, options):
        self.options = options
        self.programs = pathlib.Path(options.bin).resolve()
        self.out = pathlib.Path(options.out).resolve()
        self.made = pathlib.Path(tempfile.mkdtemp(prefix="witness-"))
        self.record = self.out if options.command == "compare" else None
        self.here = Place(str(ROOT), str(self.made), str(self.programs), self.record)
        home = self.made / ".home"
        home.mkdir()
        # Nothing of this user's: no measured layouts, no hub cache, no settings of libraries.
        self.environment = {
            "PATH": os.environ.get("PATH", ""), "HOME": str(home), "TMPDIR": str(home), "LC_ALL": "C",
            "OMP_NUM_THREADS": "1", "ECHELON_WEIGHT_LAYOUT": "plain", "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:1",
        }  # fmt: skip
        for name in ["LD_LIBRARY_PATH", "LIBTORCH"]:
            if name in os.environ:
                self.environment[name] = os.environ[name]
        self.then = {}
        if self.record:
            self.then = json.loads((self.out / "record.json").read_text())
        self.stopped, self.children = False, []
        self.lock = threading.Condition()
        self.free = options.jobs
        self.done = {}

    def to_here(self, file):
        """Paths of the recorded programs in a file become this session's."""
        if self.record:
            text = file.read_text()
            text = text.replace(self.then["made"], str(self.made)).replace(self.then["root"], str(ROOT))
            file.write_text(text)

    def chosen(self):
        names = set(CASES)
        if self.options.only:
            asked = self.options.only.split(",")
            names = {n for n in CASES if any(n == a or n.startswith(a.rstrip("/") + "/") for a in asked)}
            unknown = [a for a in asked if not any(n == a or n.startswith(a.rstrip("/") + "/") for n in CASES)]
            if unknown:
                stop(f"no case {', '.join(unknown)}: --list shows them")
            following = list(names)
            while following:
                before = set(CASES[following.pop()].after) - names
                names |= before
                following += before
        chosen = [case for name, case in CASES.items() if name in names]
        return sorted(chosen, key=lambda case: case.slots)  # what takes the machine alone comes last

    def run(self):
        cases = self.chosen()
        if self.record:
            absent = [case.name for case in cases if case.name not in self.then["cases"]]
            if absent:
                stop(f"{self.out} has no {', '.join(absent)}: record them, or choose with --only")
            if self.then["machine"] != machine():
                print(f"note: recorded on {self.then['machine']}, this is {machine()}: rounding may differ", flush=True)
        begun = time.monotonic()
        waiting = list(cases)
        threads = [threading.Thread(target=self.work, args=(waiting,)) for _ in range(self.options.jobs)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            for number in [signal.SIGINT, signal.SIGTERM]:
                signal.signal(number, signal.SIG_IGN)  # nothing is left behind, whoever is impatient
            with self.lock:
                self.stopped = True
                waiting.clear()
                for child in self.children:
                    if child.returncode is None:
                        kill(child)
            for thread in threads:
                thread.join()
            raise
        self.finish(cases)
        seconds = time.monotonic() - begun
        wrong = [name for name, (_, lines) in self.done.items() if lines]
        verb = "compared" if self.record else "recorded"
        print(f"{len(self.done)} cases {verb} in {seconds:.0f} s, {len(wrong)} with differences", flush=True)
        return 1 if wrong or len(self.done) < len(cases) else 0

    def work(self, waiting):
        while True:
            with self.lock:
                ready = None
                while ready is None:
                    if not waiting:
                        return
                    ready = next((c for c in waiting if all(name in self.done for name in c.after)), None)
                    slots = ready and min(ready.slots, self.options.jobs)
                    if ready is None or slots > self.free:
                        ready = None
                        self.lock.wait(1)
                waiting.remove(ready)
                self.free -= slots
            lines, begun = [], time.monotonic()
            try:
                lines = self.one(ready)
            except Failed as error:
                lines = [str(error)]
            except Exception as error:  # a case that cannot be judged is not ok
                lines = [f"{type(error).__name__}: {error}"]
            finally:
                with self.lock:
                    self.free += slots
                    self.done[ready.name] = (time.monotonic() - begun, lines)
                    self.say(ready, lines, time.monotonic() - begun)
                    self.lock.notify_all()

    def one(self, case):
        desk = Desk(self, case)
        try:
            case.work(desk)
        finally:
            if not case.keep_checkpoints:
                for path in desk.folder.rglob("checkpoints/*/*"):
                    if path.is_file() and "kept" not in path.relative_to(desk.folder).parts[:1]:
                        path.write_bytes(b"")
        lines = list(desk.complaints)
        if self.record:
            then = Place(self.then["root"], self.then["made"], self.then["programs"])
            found, wanted = Tree(desk.folder, self.here), Tree(self.out / case.name, then)
            # Every later line of a difference that has begun says less; the first ones are shown.
            lines += differences(found, wanted, case.statistics, case.bits)
        return lines

    def say(self, case, lines, seconds):
        if not lines:
            print(f"ok       {case.name} ({seconds:.1f} s)", flush=True)
            return
        print(f"DIFFERS  {case.name} ({seconds:.1f} s): {len(lines)} differences", flush=True)
        for line in lines[:SHOWN]:
            print(f"           {line}", flush=True)
        if len(lines) > SHOWN:
            print(f"           and {len(lines) - SHOWN} more", flush=True)

    def finish(self, cases):
        if self.record is None:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / "record.json").write_text(json.dumps({
                "root": str(ROOT), "made": str(self.made), "programs": str(self.programs), "machine": machine(),
                "cases": [case.name for case in cases], "seconds": {name: round(s, 1) for name, (s, _) in self.done.items()},
            }, indent=1))  # fmt: skip
            for case in cases:
                shutil.copytree(self.made / case.name, self.out / case.name)
        if self.options.keep:
            shutil.copytree(self.made, self.options.keep, ignore=lambda *_: [".home"])
        self.clean()

    def clean(self):
        shutil.rmtree(self.made, ignore_errors=True)


def machine():
    with open("/proc/cpuinfo") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return f"{names[0] if names else 'unknown'}, {len(os.sched_getaffinity(0))} threads"


def stop(message):
    print(f"witness.py: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", choices=["record", "compare"])
    parser.add_argument("bin", nargs="?", metavar="BIN")
    parser.add_argument("out", nargs="?", metavar="OUT")
    parser.add_argument("--only", metavar="NAME[,NAME...]")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--keep", metavar="FOLDER")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if options.list:
        for case in CASES.values():
            print(f"{case.name:<22} {case.about}")
        return 0
    if not options.out:
        parser.error("a command, BIN and OUT are needed")
    if not (pathlib.Path(options.bin) / "ppo").is_file():
        stop(f"no programs in {options.bin}")
    out = pathlib.Path(options.out)
    if options.command == "record" and out.exists() and any(out.iterdir()):
        stop(f"{out} is not empty: choose another folder")
    if options.command == "compare" and not (out / "record.json").is_file():
        stop(f"{out} is no record")
    if options.keep and pathlib.Path(options.keep).exists():
        stop(f"{options.keep} is there already")
    if options.jobs < 1:
        stop("--jobs is at least 1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    session = Session(options)
    try:
        return session.run()
    finally:
        session.clean()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
