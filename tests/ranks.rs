//! A run over several ranks is the run over one: whatever is divided, the metrics are the same.

use std::path::Path;

use common::{Workplace, metrics, said};

mod common;

/// The largest difference of any metric outside `perf/` and `train/timing/`, relative where it is above 1, and its name.
fn worst(found: &Path, expected: &Path) -> (f64, String) {
    let (found, expected) = (metrics(found), metrics(expected));
    assert_eq!(found.len(), expected.len());
    let mut worst = (0.0, "no metric".to_string());
    for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
        for (name, value) in expected.iter().filter(|(name, _)| !name.starts_with("perf/") && !name.contains("timing"))
        {
            let (Some(found), Some(value)) = (found[name].as_f64(), value.as_f64()) else {
                assert_eq!(&found[name], value, "{name}");
                continue;
            };
            let difference = (found - value).abs() / value.abs().max(1.0);
            if difference > worst.0 {
                worst = (difference, format!("{name} of step {}: {found} against {value}", step + 1));
            }
        }
    }
    worst
}

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

#[test]
fn what_ranks_cannot_share_is_refused() {
    let workplace = Workplace::new();
    let output = workplace.ppo("run", &["--set", "placement.workers=5"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("5 workers"), "{}", said(&output));
    assert!(!workplace.path("run").exists());
}
