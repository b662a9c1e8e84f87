//! A run over several ranks is the run over one: whatever is divided, the metrics are the same (AR-22, AR-24).

use common::{Workplace, said, worst};

mod common;

fn settings(ranks: usize, stage: usize, checkpointing: bool, rest: &[&str]) -> Vec<String> {
    let set = [
        format!("placement.workers={ranks}"),
        format!("train.zero_stage={stage}"),
        format!("train.activation_checkpointing={checkpointing}"),
    ];
    set.into_iter().chain(rest.iter().map(|s| s.to_string())).flat_map(|s| ["--set".to_string(), s]).collect()
}

fn run(workplace: &Workplace, name: &str, settings: &[String]) {
    let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
    workplace.finish(name, &settings);
}

#[test]
fn metrics_do_not_depend_on_the_ranks_nor_on_what_is_divided() {
    let workplace = Workplace::new();
    let f64s =
        ["train.dtype=float64", "checkpoint.every_steps=off", "train.steps=3", "train.tokens_per_micro_batch=128"];
    run(&workplace, "one", &settings(1, 0, false, &f64s));
    let cases = [
        (2, 0, false),
        (2, 0, true),
        (2, 1, false),
        (2, 2, true),
        (2, 3, false),
        (2, 3, true),
        (4, 1, true),
        (4, 2, false),
        (4, 3, false),
        (4, 3, true),
    ];
    for (ranks, stage, checkpointing) in cases {
        let name = format!("{ranks} ranks, stage {stage}, checkpointing {checkpointing}");
        run(&workplace, &name, &settings(ranks, stage, checkpointing, &f64s));
        let (difference, place) = worst(&workplace.path(&name), &workplace.path("one"));
        assert!(difference <= 1e-9, "{name}: {place}");
    }
}

/// Where roles are: all together, each on its own workers, the generator apart and tensor-parallel.
const PLACES: [(&str, &[&str]); 5] = [
    ("tier medium", &["placement.workers=4", "placement.tier=medium"]),
    ("tier large, the generator on the actor's workers", &["placement.workers=4", "placement.tier=large"]),
    ("tensor-parallel on the actor's workers", &["placement.workers=2", "generation.tensor_parallel_size=2"]),
    (
        "two generators apart from two actors",
        &[
            "placement.workers=5",
            "placement.actor.devices=[0, 1]",
            "placement.generator.devices=[3, 4]",
            "train.zero_stage=3",
        ],
    ),
    (
        "one tensor-parallel generator apart from two actors",
        &[
            "placement.workers=5",
            "placement.actor.devices=[0, 1]",
            "placement.generator.devices=[3, 4]",
            "generation.tensor_parallel_size=2",
            "train.zero_stage=2",
            "train.activation_checkpointing=true",
        ],
    ),
];

#[test]
fn metrics_do_not_depend_on_where_roles_are() {
    let workplace = Workplace::new();
    let flags = |keys: &[&str]| keys.iter().flat_map(|key| ["--set".to_string(), key.to_string()]).collect::<Vec<_>>();
    let always = ["train.dtype=float64", "checkpoint.every_steps=off", "train.steps=3"];
    run(&workplace, "one", &flags(&always));
    for (name, keys) in PLACES {
        let mut keys: Vec<&str> = [&always[..], keys].concat();
        if keys.iter().any(|key| key.starts_with("placement.actor.devices")) {
            keys.extend([
                "placement.critic.devices=[2]",
                "placement.reference.colocate_with=critic",
                "placement.reward.colocate_with=critic",
            ]);
        }
        run(&workplace, name, &flags(&keys));
        let (difference, place) = worst(&workplace.path(name), &workplace.path("one"));
        assert!(difference <= 1e-9, "{name}: {place}");
    }
}

#[test]
fn a_checkpoint_of_some_ranks_goes_on_with_others() {
    let workplace = Workplace::new();
    let with = |steps: &str| ["train.dtype=float64".to_string(), format!("train.steps={steps}")];
    let schedule = ["actor.optimizer.schedule=constant", "critic.optimizer.schedule=constant"];
    let all = |ranks, stage, steps: &str| {
        let [dtype, steps] = with(steps);
        settings(ranks, stage, false, &[&dtype, &steps, schedule[0], schedule[1]])
    };
    run(&workplace, "one", &all(1, 0, "6"));
    run(&workplace, "some", &all(2, 3, "4"));
    let mut more = all(4, 1, "6");
    more.push("--resume".into());
    run(&workplace, "some", &more);
    let (difference, place) = worst(&workplace.path("some"), &workplace.path("one"));
    assert!(difference <= 1e-9, "{place}");
}

/// Learning alone, from equal rollouts.
#[test]
fn recorded_rollouts_are_learned_from_alike_on_any_layout() {
    let workplace = Workplace::new();
    let folder = workplace.path("rollouts").display().to_string();
    let (record, replay) = (format!("rollout.record={folder}"), format!("rollout.replay={folder}"));
    let short = ["checkpoint.every_steps=off", "train.dtype=float64"];
    run(&workplace, "one", &settings(1, 0, false, &[&short[..], &[&record]].concat()));
    for (ranks, stage) in [(1, 0), (2, 3)] {
        let name = format!("{ranks} ranks");
        run(&workplace, &name, &settings(ranks, stage, true, &[&short[..], &[&replay]].concat()));
        let (difference, place) = worst(&workplace.path(&name), &workplace.path("one"));
        assert!(difference <= 1e-9, "{name}: {place}");
    }
    let lacking = workplace.path("lacking");
    common::copy_folder(&workplace.path("rollouts"), &lacking);
    let first = lacking.join("step-1.safetensors");
    let bytes = std::fs::read(&first).unwrap();
    let (name, other) = (b"rollout_logprobs", b"rollout_logprobz");
    let at = bytes.windows(name.len()).position(|window| window == name).expect("a column of this name");
    std::fs::write(&first, [&bytes[..at], other, &bytes[at + name.len()..]].concat()).unwrap();
    let lacking = format!("rollout.replay={}", lacking.display());
    for (sets, named) in [
        (&[lacking.as_str()][..], "step-1.safetensors: it has no column `rollout_logprobs` of its kind"),
        (&[replay.as_str(), "seed=8"], "prompts are not this step's"),
        (&[&replay, "train.steps=40"], "step-7.safetensors"),
        (&[&record], "step-1.safetensors is there already"),
        (&[&record, &replay], "`rollout.record` and `rollout.replay` are both"),
    ] {
        let settings = settings(1, 0, false, &[&short[..], sets].concat());
        let arguments: Vec<&str> = settings.iter().map(String::as_str).collect();
        let output = workplace.ppo("other", &arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(said(&output).contains(named), "{named}: {}", said(&output));
        assert!(!workplace.path("other").exists(), "{named}: nothing was begun");
    }
}

#[test]
fn what_ranks_cannot_share_is_refused() {
    let workplace = Workplace::new();
    let output = workplace.ppo("run", &["--set", "placement.workers=5"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("5 workers"), "{}", said(&output));
    assert!(!workplace.path("run").exists());
}
