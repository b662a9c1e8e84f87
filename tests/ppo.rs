//! PPO end to end through the real program, and the properties of an update that no setting of memory may change:
//! the micro-batch size (`core/src/zero/trainable.rs`) and activation checkpointing.

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use common::{SMALL, Workplace, assert_same, metrics, quickstart, said, series};
use echelon_algorithms::columns::{ADVANTAGES, OLD_LOGPROBS, REF_LOGPROBS, RETURNS, VALUES};
use echelon_algorithms::kl::KlEstimator;
use echelon_algorithms::losses::PolicyClip;
use echelon_algorithms::ppo::{PolicyLoss, ValueLoss};
use echelon_core::data::{Report, Rows};
use echelon_core::loss::{Numbers, Totals};
use echelon_core::pack::PackedRows;
use echelon_core::random::{Domain, normal};
use echelon_core::role::Role;
use echelon_core::weight_layout::WeightLayout;
use echelon_core::zero::{OptimizerConfig, PassConfig, Sharding, TensorFile, TrainingState, forward};
use echelon_models::head::ScalarRows;
use echelon_roles::models::{Held, Policy, trainable_policy, trainable_scorer};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

#[test]
fn nothing_changes_at_learning_rate_zero() {
    let workplace = Workplace::new();
    workplace.finish("run", &["--set", "actor.optimizer.lr=0", "--set", "train.steps=5"]);
    let run = workplace.path("run");
    assert_eq!(metrics(&run).len(), 5);
    for (name, expected, tolerance) in [
        ("train/ratio_max", 1.0, 1e-4),
        ("train/approx_kl", 0.0, 1e-9),
        ("train/ppo_kl", 0.0, 1e-6),
        ("train/kl", 0.0, 1e-6),
    ] {
        let found = series(&run, name);
        assert!(found.iter().all(|value| (value - expected).abs() <= tolerance), "{name}: {found:?}");
    }
    let weights = |folder: &Path| tensors(&folder.join("model.safetensors"));
    let (start, end) = (weights(&quickstart().join("language-model")), weights(&run.join("actor")));
    assert_eq!(start.len(), end.len());
    for (name, tensor) in &start {
        assert_eq!(*tensor, end[name], "{name}");
    }
    let rewards = |name: &str| fs::read_to_string(run.join(name)).unwrap();
    assert_eq!(rewards("eval_before.json"), rewards("eval_after.json"), "no gain and no loss");
}

fn tensors(file: &Path) -> HashMap<String, Tensor> {
    let bytes = fs::read(file).unwrap();
    let header_length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..8 + header_length]).unwrap();
    let open = TensorFile::open(file).unwrap();
    let names = header.keys().filter(|name| *name != "__metadata__");
    names.map(|name| (name.clone(), open.tensor(name).unwrap())).collect()
}

const OPTIMIZER: OptimizerConfig =
    OptimizerConfig { betas: (0.9, 0.95), eps: 1e-8, weight_decay: 0.0, max_grad_norm: 0.0 };

fn held(kind: Kind, tokens_per_micro_batch: i64, activation_checkpointing: bool) -> Held {
    let pass = PassConfig { device: Device::Cpu, tokens_per_micro_batch, activation_checkpointing };
    Held { kind, pass, weight_layout: WeightLayout::Plain, deterministic: true }
}

/// Twelve rows of 6 to 39 tokens; old log-probs are near the policy's own, so that some ratios are clipped.
fn experience(kind: Kind) -> Rows {
    let lengths: Vec<i64> = (0..12).map(|row| 6 + (row * 11) % 34).collect();
    let row = |(row, &length): (usize, &i64)| {
        let ids = (0..length).map(|t| 2 + (row as i64 * 97 + t * 53) % 1000).collect();
        (ids, (0..length).map(|t| t >= 3).collect())
    };
    let tokens = Rows::of_tokens(&lengths.iter().enumerate().map(row).collect::<Vec<_>>());
    let folder = quickstart().join("language-model");
    let policy =
        trainable_policy(Role::Actor, &folder, None, held(kind, 4096, false), (OPTIMIZER, &Sharding::whole()), 1.0)
            .unwrap();
    let logprobs =
        forward(&policy.model, &policy.head, &PackedRows::new(&tokens, Device::Cpu)).unwrap().logprobs.copy();
    let noise = |what: u32| {
        let numbers: Vec<f64> = (0..logprobs.numel()).map(|i| normal(5, Domain::Data, i as u64, what, 0)).collect();
        Tensor::from_slice(&numbers).to_kind(kind).view_as(&logprobs)
    };
    tokens
        .with(OLD_LOGPROBS, &logprobs + noise(1) * 0.2)
        .and_then(|rows| rows.with(REF_LOGPROBS, &logprobs + noise(2) * 0.2))
        .and_then(|rows| rows.with(VALUES, noise(3)))
        .and_then(|rows| rows.with(ADVANTAGES, noise(4)))
        .and_then(|rows| rows.with(RETURNS, noise(5)))
        .unwrap()
}

/// One optimizer step of the actor.
fn learn(actor: &mut Policy, rows: &Rows, kl_coef: f64, loss: PolicyLoss) -> echelon_core::Result<Report> {
    actor.learn(&loss, rows, (&Totals::of(rows, 1), &Numbers::of(&[("kl_coef", kl_coef)])), 1e-3)
}

/// The gradient of an update's first optimizer step: the first moment is (1 - 0.9) times it.
fn gradient(state: &TrainingState) -> Tensor {
    let moments = state.tensors().unwrap().into_iter().filter(|(name, _)| name.starts_with("exp_avg."));
    Tensor::cat(&moments.map(|(_, tensor)| tensor.flatten(0, -1).to_kind(Kind::Double)).collect::<Vec<_>>(), 0)
}

fn actor_gradient(experience: &Rows, held: Held) -> Tensor {
    let folder = quickstart().join("language-model");
    let mut actor = trainable_policy(Role::Actor, &folder, None, held, (OPTIMIZER, &Sharding::whole()), 0.9).unwrap();
    let clip = PolicyClip { low: 0.2, high: 0.28, dual: Some(3.0) };
    let loss = PolicyLoss { clip, entropy_coef: 0.01, kl_estimator: KlEstimator::K3 };
    let seen = learn(&mut actor, experience, 0.1, loss).unwrap().stats;
    let taken = seen.get("train/ppo_clip_ratio") > Some(0.1) && seen.get("train/kl_loss") > Some(0.0);
    assert!(taken, "the losses' branches are taken: {seen:?}");
    gradient(&actor.state)
}

fn critic_gradient(experience: &Rows, held: Held) -> Tensor {
    let folder = quickstart().join("reward-model");
    let reads = ScalarRows::Predecessors;
    let mut critic =
        trainable_scorer(Role::Critic, &folder, None, 1, held, (OPTIMIZER, &Sharding::whole()), reads).unwrap();
    let loss = ValueLoss { value_clip: Some(0.5) };
    critic.learn(&loss, experience, (&Totals::of(experience, 1), &Numbers::default()), 1e-3).unwrap();
    gradient(&critic.state)
}

/// Compares the gradients of micro-batches of one row, of 64 tokens, and with recomputed activations with those of one
/// micro-batch for all.
#[test]
fn neither_micro_batches_nor_recomputation_change_a_gradient() {
    type Gradient = fn(&Rows, Held) -> Tensor;
    for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::Double, 1e-12)] {
        let experience = experience(kind);
        for (role, gradient) in [("actor", actor_gradient as Gradient), ("critic", critic_gradient)] {
            let expected = gradient(&experience, held(kind, 4096, false));
            assert!(expected.norm().double_value(&[]) > 1e-4);
            for (tokens, recompute) in [(1, false), (64, false), (4096, true), (64, true)] {
                let found = gradient(&experience, held(kind, tokens, recompute));
                let error = ((found - &expected).norm() / expected.norm()).double_value(&[]);
                assert!(error <= tolerance, "{role}, {kind:?}, {tokens} tokens, recompute {recompute}: {error}");
            }
        }
    }
}

#[test]
fn metrics_do_not_depend_on_the_micro_batch_size() {
    let workplace = Workplace::new();
    let run = |tokens: &str| {
        let size = format!("train.tokens_per_micro_batch={tokens}");
        workplace.finish(tokens, &["--set", &size, "--set", "train.dtype=float64", "--set", "train.steps=3"]);
        metrics(&workplace.path(tokens))
    };
    let expected = run("4096");
    for tokens in ["1", "64"] {
        for (found, expected) in run(tokens).iter().zip(&expected) {
            for (name, value) in
                expected.iter().filter(|(name, _)| !name.starts_with("perf/") && !name.contains("timing"))
            {
                let (found, value) = (found[name].as_f64().unwrap(), value.as_f64().unwrap());
                let error = (found - value).abs() / value.abs().max(1.0);
                assert!(error <= 1e-9, "{name} at {tokens} tokens: {found} against {value}");
            }
        }
    }
}

#[test]
fn without_a_kl_penalty_no_reference_is_held() {
    let workplace = Workplace::new();
    // In f64 the reference cannot be the mapped file: it is bytes in memory. No adaptive coefficient at 0.
    let recipe = SMALL.replace("kl_target = 0.05\nkl_horizon = 100.0\n", "");
    workplace.write("small.toml", &recipe);
    let live_bytes = |kl_coef: &str| {
        let kl = format!("ppo.kl_coef={kl_coef}");
        workplace.finish(kl_coef, &["--set", &kl, "--set", "train.dtype=float64", "--set", "train.steps=1"]);
        series(&workplace.path(kl_coef), "perf/memory_live_bytes")[0]
    };
    let params: usize =
        tensors(&quickstart().join("language-model/model.safetensors")).values().map(Tensor::numel).sum();
    let difference = live_bytes("0.1") - live_bytes("0");
    assert!(difference > 0.9 * 8.0 * params as f64, "{difference} bytes for {params} parameters");
    assert!(series(&workplace.path("0"), "train/kl").iter().all(|&kl| kl == 0.0));
}

#[test]
fn the_critic_starts_as_the_reward_model() {
    let workplace = Workplace::new();
    let settings = ["--set", "critic.optimizer.lr=0", "--set", "train.steps=1", "--set", "checkpoint.every_steps=1"];
    workplace.finish("run", &settings);
    let critic = tensors(&workplace.path("run/checkpoints/step-1/critic.safetensors"));
    let reward = tensors(&quickstart().join("reward-model/model.safetensors"));
    assert!(reward.contains_key("score.weight"));
    for (name, tensor) in reward {
        assert_eq!(critic[&format!("weights.{name}")], tensor, "{name}");
    }
}

#[test]
fn the_kl_is_in_the_rewards_or_in_the_loss() {
    let workplace = Workplace::new();
    let run = |placement: &str| {
        let placed = format!("ppo.kl_placement={placement}");
        workplace.finish(placement, &["--set", &placed, "--set", "train.steps=3"]);
        let run = workplace.path(placement);
        let shaping =
            series(&run, "train/total_reward").into_iter().zip(series(&run, "train/score")).map(|(a, b)| (a - b).abs());
        (shaping.fold(0.0, f64::max), series(&run, "train/kl_loss").into_iter().fold(0.0, f64::max))
    };
    let (shaping, kl_loss) = run("reward");
    assert!(shaping > 1e-6 && kl_loss == 0.0, "{shaping} {kl_loss}");
    let (shaping, kl_loss) = run("loss");
    assert!(shaping < 1e-12 && kl_loss > 0.0, "{shaping} {kl_loss}");
}

#[test]
fn several_rewards_are_added_by_weight() {
    let workplace = Workplace::new();
    let mixed = r#"
[[reward.mix]]
model = "QUICKSTART/reward-model"
weight = 0.5
[[reward.mix]]
rule = "length"
target_tokens = 6
weight = -2.0
[[reward.mix]]
command = "while read -r line; do echo '{\"reward\": 3}'; done"
"#;
    workplace.write("small.toml", &SMALL.replace("model = \"QUICKSTART/reward-model\"\nnormalize = true\n", mixed));
    workplace.finish("run", &["--set", "train.steps=2"]);
    let run = workplace.path("run");
    let [total, model, length, command] =
        ["train/reward", "train/reward_model", "train/reward_length", "train/reward_command"]
            .map(|name| series(&run, name));
    for step in 0..2 {
        assert!((total[step] - (0.5 * model[step] - 2.0 * length[step] + command[step])).abs() < 1e-9);
        assert!(command[step] == 3.0 && (0.0..=1.0).contains(&length[step]), "{command:?} {length:?}");
    }
}

#[test]
fn a_failing_reward_program_is_named_and_the_run_can_go_on() {
    let workplace = Workplace::new();
    // The program gives up at its 40th answer (step 4) unless the file `repaired` is there.
    let program = r#"
n=0
while read -r line; do
    n=$((n + 1))
    if [ "$n" = 40 ] && [ ! -e repaired ]; then echo "out of judgement" >&2; exit 7; fi
    echo "{\"reward\": ${#line}}"
done
"#;
    workplace.write("reward.sh", program);
    let recipe = SMALL.replace("normalize = true\n", "");
    workplace.write("small.toml", &recipe.replace("model = \"QUICKSTART/reward-model\"", "command = \"sh reward.sh\""));
    let output = workplace.ppo("run", &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    for part in ["sh reward.sh", "request", "of 8", "prompt", "exit status: 7", "out of judgement"] {
        assert!(message.contains(part), "no `{part}` in {message}");
    }
    assert!(workplace.path("run/checkpoints/step-2").exists());
    workplace.write("repaired", "");
    workplace.finish("run", &["--resume"]);
    workplace.finish("whole", &[]);
    assert_same(&workplace.path("run"), &workplace.path("whole"), "resumed after the repair");
}

/// The README's promise: 20 steps on two cores make the reviews kinder, and the run folder holds what it says.
#[test]
fn the_quickstart_learns() {
    let workplace = Workplace::new();
    let run = workplace.path("quickstart");
    let mut ppo = Command::new(env!("CARGO_BIN_EXE_ppo"));
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/quickstart.toml");
    let output = ppo.arg(recipe).arg("--output-dir").arg(&run).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));

    let evaluation =
        |name: &str| -> Value { serde_json::from_str(&fs::read_to_string(run.join(name)).unwrap()).unwrap() };
    let (before, after) = (evaluation("eval_before.json"), evaluation("eval_after.json"));
    assert!(before["num_prompts"].as_u64().unwrap() >= 200);
    let [start, deviation] = ["mean_reward", "std_reward"].map(|name| before[name].as_f64().unwrap());
    let gain = (after["mean_reward"].as_f64().unwrap() - start) / deviation;
    assert!(gain >= 1.0, "the held-out reward rose by {gain} standard deviations");
    assert_eq!(metrics(&run).len(), 20);
    assert!(*series(&run, "train/explained_variance").last().unwrap() > 0.2);
    assert!(series(&run, "train/kl").iter().all(|kl| kl.is_finite()));
    assert!(series(&run, "perf/rollout_logprob_diff_max").iter().all(|&difference| difference <= 1e-4));

    let report = fs::read_to_string(run.join("report.html")).unwrap();
    let embedded = report.split("id=\"metrics\">").nth(1).unwrap().split("</script").next().unwrap();
    let embedded: Vec<serde_json::Map<String, Value>> = serde_json::from_str(embedded).unwrap();
    assert_eq!(embedded, metrics(&run), "the report's numbers are the run's");

    // The exported actor is where another run can start.
    let actor = format!("actor.model={}", run.join("actor").display());
    workplace.finish("again", &["--set", &actor, "--set", "train.steps=1"]);
    let reward = series(&workplace.path("again"), "train/reward")[0];
    assert!(reward > start + 0.5 * deviation, "{reward} from the trained actor, {start} before");
}

/// A refused update leaves weights, moments and step count as they were, and no gradient behind.
#[test]
fn a_non_finite_loss_moves_nothing() {
    let good = experience(Kind::Double);
    let folder = quickstart().join("language-model");
    let held = held(Kind::Double, 64, false);
    let clip = PolicyClip { low: 0.2, high: 0.2, dual: None };
    let loss = PolicyLoss { clip, entropy_coef: 0.0, kl_estimator: KlEstimator::K1 };
    let start = || trainable_policy(Role::Actor, &folder, None, held, (OPTIMIZER, &Sharding::whole()), 1.0).unwrap();
    let (mut refused, mut fresh) = (start(), start());
    for value in [f64::NAN, f64::INFINITY] {
        let bad = experience(Kind::Double);
        let _ = bad[ADVANTAGES].get(11).fill_(value); // in the last micro-batch: others have left gradients by then
        let error = learn(&mut refused, &bad, 0.0, loss).unwrap_err().to_string();
        assert!(error.contains("actor: the loss is") && error.contains("the optimizer has not moved"), "{error}");
        assert_eq!(refused.state.steps, 0);
    }
    for actor in [&mut refused, &mut fresh] {
        learn(actor, &good, 0.0, loss).unwrap();
    }
    for ((name, found), (_, expected)) in
        refused.state.tensors().unwrap().into_iter().zip(fresh.state.tensors().unwrap())
    {
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn in_a_mix_only_the_models_scores_are_normalised_and_equal_names_are_numbered() {
    let workplace = Workplace::new();
    workplace.finish("alone", &["--set", "train.steps=1"]);
    let mix = r#"normalize = true
[[reward.mix]]
model = "QUICKSTART/reward-model"
weight = 2.0
[[reward.mix]]
rule = "length"
target_tokens = 4
[[reward.mix]]
rule = "length"
target_tokens = 9
weight = -0.5
"#;
    workplace.write("small.toml", &SMALL.replace("model = \"QUICKSTART/reward-model\"\nnormalize = true\n", mix));
    workplace.finish("mixed", &["--set", "train.steps=1"]);
    let config = fs::read(quickstart().join("reward-model/config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    let (mean, std) = (config["mean"].as_f64().unwrap(), config["std"].as_f64().unwrap());
    let raw = series(&workplace.path("alone"), "train/reward")[0]; // of the same rollout: it is the first
    let mixed = |name: &str| series(&workplace.path("mixed"), name)[0];
    let close = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-9, "{found}, expected {expected}");
    close(mixed("train/reward_model"), (raw - mean) / std);
    let lengths = [mixed("train/reward_length_1"), mixed("train/reward_length_2")];
    assert_ne!(lengths[0], lengths[1]);
    close(mixed("train/reward"), 2.0 * mixed("train/reward_model") + lengths[0] - 0.5 * lengths[1]);
    close(mixed("train/score"), mixed("train/reward"));
}
