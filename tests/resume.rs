//! A run that is killed, interrupted or finds a damaged checkpoint continues as if nothing had happened: CK-1 to CK-3 of
//! `src/checkpoint.rs`, driven through the real program. "The same" means every deterministic metric digit by digit, every
//! sample, both evaluations and every trained weight.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

use common::{
    SUPERVISED, Workplace, assert_same, copy_folder, deterministic_lines, examples, metrics, num_lines, said, send,
    series, wait_for,
};

/// An undisturbed run of the small recipe, made once for all tests.
fn undisturbed() -> &'static Path {
    static RUN: OnceLock<(Workplace, PathBuf)> = OnceLock::new();
    let (_, run) = RUN.get_or_init(|| {
        let workplace = Workplace::new();
        workplace.finish("undisturbed", &[]);
        let run = workplace.path("undisturbed");
        (workplace, run)
    });
    run
}

/// A number in 0..1 that depends on `seed` alone (splitmix64).
fn uniform(seed: u64) -> f64 {
    let mut z = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

/// AR-10.
#[test]
fn the_same_seed_gives_the_same_run() {
    let workplace = Workplace::new();
    workplace.finish("again", &[]);
    assert_same(&workplace.path("again"), undisturbed(), "the second run");
    workplace.finish("other", &["--set", "seed=8"]);
    let rewards = |run: &Path| series(run, "train/reward");
    assert_ne!(rewards(&workplace.path("other")), rewards(undisturbed()), "another seed is another run");
}

#[test]
fn the_same_seed_gives_the_same_run_on_all_threads() {
    let workplace = Workplace::new();
    for run in ["one", "two"] {
        let output = workplace.ppo(run, &["--set", "train.steps=3"]).env_remove("OMP_NUM_THREADS").output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
    }
    assert_same(&workplace.path("two"), &workplace.path("one"), "the second run");
}

/// Where a run is killed.
#[derive(Debug)]
enum Moment {
    /// So long after it started.
    After(Duration),
    /// After the line of this step in metrics.jsonl and this part of that step's time.
    Inside { step: usize, part: f64 },
    /// So long after the checkpoint of this step was begun.
    Saving { step: usize, after: Duration },
}

impl Moment {
    /// False when the run ended first.
    fn wait(&self, child: &mut Child, run: &Path) -> bool {
        let (reached, pause) = match self {
            Moment::After(pause) => (true, *pause),
            Moment::Inside { step, part } => {
                let reached = wait_for(child, || num_lines(&run.join("metrics.jsonl")) >= *step);
                let step_s = series(run, "train/timing/step_total").last().copied().unwrap_or_default();
                (reached, Duration::from_secs_f64(part * step_s))
            }
            Moment::Saving { step, after } => {
                let partial = run.join(format!("checkpoints/step-{step}.partial"));
                (wait_for(child, || partial.exists()), *after)
            }
        };
        std::thread::sleep(pause);
        reached && child.try_wait().unwrap().is_none()
    }
}

/// Kills a run with SIGKILL at each moment, resumes it, and compares; whether each was killed while it saved.
fn kill_and_resume(moments: &[Moment]) -> Vec<bool> {
    let whole = undisturbed();
    let workplace = Workplace::new();
    let kill = |(index, moment): (usize, &Moment)| {
        let name = format!("killed-{index}");
        let run = workplace.path(&name);
        let mut child = workplace.ppo(&name, &[]).spawn().unwrap();
        assert!(moment.wait(&mut child, &run), "{moment:?}: the run ended before it could be killed");
        child.kill().unwrap();
        child.wait().unwrap();
        let entries = fs::read_dir(run.join("checkpoints")).into_iter().flatten().map(Result::unwrap);
        let saving = entries.filter(|entry| entry.path().extension().is_some()).count() > 0;
        workplace.finish(&name, &["--resume"]);
        assert_same(&run, whole, &format!("killed at {moment:?}"));
        fs::remove_dir_all(&run).unwrap();
        saving
    };
    moments.iter().enumerate().map(kill).collect()
}

#[test]
fn a_run_killed_at_any_time_resumes_as_if_undisturbed() {
    let early = (0..3).map(|seed| Moment::After(Duration::from_secs_f64(0.4 * uniform(seed))));
    let later = (3..10).map(|seed| Moment::Inside { step: 1 + seed as usize % 4, part: uniform(seed) });
    kill_and_resume(&early.chain(later).collect::<Vec<_>>());
}

#[test]
fn a_run_killed_inside_an_update_or_a_checkpoint_resumes_as_if_undisturbed() {
    // The update is the last two thirds of a step, and an odd step is followed by no evaluation and no checkpoint.
    let timing = |name: &str| series(undisturbed(), &format!("train/timing/{name}")).iter().sum::<f64>();
    let before_update = (timing("generation") + timing("make_experience")) / timing("step_total");
    let before_update = before_update.min(0.6);
    let inside_update = |seed: u64| before_update + (1.0 - before_update) * (0.3 + 0.5 * uniform(seed));
    let updates = (10..15).map(|seed| Moment::Inside { step: [1, 3][seed as usize % 2], part: inside_update(seed) });
    let after = |seed| Duration::from_secs_f64(0.01 * uniform(seed));
    let saves = (15..20).map(|seed| Moment::Saving { step: [2, 4, 6][seed as usize % 3], after: after(seed) });
    let saving = kill_and_resume(&updates.chain(saves).collect::<Vec<_>>());
    assert!(saving[5..].iter().any(|&saving| saving), "no kill left an unfinished checkpoint: {saving:?}");
}

/// How weights lie while decoding is the run's, not the moment's: another layout rounds otherwise.
#[test]
fn a_resumed_run_keeps_its_layout_of_weights() {
    let workplace = Workplace::new();
    let layouts = ["onednn", "plain"];
    let run = |name: &str, layout: Option<&str>, arguments: &[&str]| {
        let mut command = workplace.ppo(name, &[&["--set", "rollout.max_new_tokens=24"], arguments].concat());
        layout.map(|layout| command.env("ECHELON_WEIGHT_LAYOUT", layout));
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
        said(&output)
    };
    for layout in layouts {
        run(layout, Some(layout), &["--set", "train.steps=4"]);
        let again = format!("{layout}-again");
        copy_folder(&workplace.path(layout), &workplace.path(&again));
        fs::remove_dir_all(workplace.path(&again).join("checkpoints/step-4")).unwrap();
        let said = run(&again, None, &["--set", "train.steps=4", "--resume"]);
        assert!(said.contains("resumed after step 2"), "{said}");
        assert_same(&workplace.path(&again), &workplace.path(layout), layout);
    }
    run("told", Some("onednn"), &["--set", "train.steps=2"]);
    let told = run("told", Some("plain"), &["--set", "train.steps=3", "--resume"]);
    assert!(told.contains("weights lie as plain while decoding, and lay as onednn when"), "{told}");

    let wrong = workplace.ppo("wrong", &[]).env("ECHELON_WEIGHT_LAYOUT", "fast").output().unwrap();
    assert_eq!(wrong.status.code(), Some(2));
    assert!(
        said(&wrong).contains("ECHELON_WEIGHT_LAYOUT: expected plain, mkl or onednn, found `fast`"),
        "{}",
        said(&wrong)
    );
    assert!(!workplace.path("wrong").exists());
}

/// The start, phases, what is named beside them and the rest: together all of a run's time to its last step.
#[test]
fn every_second_of_a_run_has_a_name() {
    let workplace = Workplace::new();
    let begun = Instant::now();
    workplace.finish("run", &["--set", "checkpoint.every_steps=1", "--set", "eval.every_steps=2"]);
    let wall = begun.elapsed().as_secs_f64();
    let steps = metrics(&workplace.path("run"));
    let number = |step: usize, name: &str| steps[step].get(name).and_then(Value::as_f64);
    assert!(number(0, "perf/start_s").unwrap() > 0.0 && number(1, "perf/start_s").is_none());
    assert!(number(1, "perf/evaluation_s").unwrap() > 0.0 && number(1, "perf/checkpoint_s").unwrap() > 0.0);
    let names =
        ["perf/start_s", "train/timing/step_total", "perf/evaluation_s", "perf/checkpoint_s", "perf/overhead_s"];
    let of_step = |step| names.iter().filter_map(|name| number(step, name)).sum::<f64>();
    let named: f64 = (0..steps.len()).map(of_step).sum();
    // What is left is the end: the last checkpoint, the evaluation, the exported model, the report.
    assert!(named <= wall + 0.1, "{named} s of {wall}");
    assert!((0..steps.len()).all(|step| number(step, "perf/overhead_s").is_some()));
    assert!(steps.iter().all(|step| !step.keys().any(|key| key.starts_with("perf/planned"))), "nobody asked");
}

#[test]
fn a_finished_run_resumes_to_the_same_end() {
    let workplace = Workplace::new();
    copy_folder(undisturbed(), &workplace.path("run"));
    workplace.finish("run", &["--resume"]);
    assert_same(&workplace.path("run"), undisturbed(), "resumed after its end");
}

/// A file of a checkpoint, and what happens to it.
type Damage = (&'static str, fn(&Path));

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_it_taken() {
    let flip: fn(&Path) = |path| {
        let mut bytes = fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(path, bytes).unwrap();
    };
    let cut: fn(&Path) = |path| fs::File::options().write(true).open(path).unwrap().set_len(1000).unwrap();
    let gone: fn(&Path) = |path| fs::remove_file(path).unwrap();
    let damages: [(&[Damage], usize); 3] = [
        (&[("step-6/critic.safetensors", flip)], 4),
        (&[("step-6/actor.safetensors", cut), ("step-4/manifest.json", gone)], 2),
        (&[("step-6/state.json", flip), ("step-4/actor.safetensors", gone)], 2),
    ];
    for (index, (damage, taken)) in damages.into_iter().enumerate() {
        let workplace = Workplace::new();
        let run = workplace.path("run");
        copy_folder(undisturbed(), &run);
        damage.iter().for_each(|(file, damage)| damage(&run.join("checkpoints").join(file)));
        let said = workplace.finish("run", &["--resume"]);
        for (file, _) in damage {
            let (checkpoint, file) = file.split_once('/').unwrap();
            let line = said
                .lines()
                .find(|line| line.contains(&format!("{checkpoint} is damaged")))
                .unwrap_or_else(|| panic!("{said}"));
            assert!(line.contains(file) && line.contains(&format!("of step {taken}")), "{line}");
        }
        assert!(said.contains(&format!("resumed after step {taken}")), "{said}");
        assert_same(&run, undisturbed(), &format!("damage {index}"));
    }
}

#[test]
fn without_any_whole_checkpoint_nothing_is_overwritten() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    copy_folder(undisturbed(), &run);
    for step in [2, 4, 6] {
        fs::write(run.join(format!("checkpoints/step-{step}/manifest.json")), "{").unwrap();
    }
    let output = workplace.ppo("run", &["--resume"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(said(&output).contains("no whole checkpoint is left"), "{}", said(&output));
    assert_same(&run, undisturbed(), "after the refusal");
}

/// Answers 1 for every response, but asks for the file `go` before the answer that is number $1 (`asked` says so).
const WAITING_REWARD: &str = r#"
n=0
while read -r line; do
    n=$((n + 1))
    if [ "$n" = "$1" ]; then
        : >asked
        while [ ! -e go ]; do sleep 0.01; done
    fi
    printf '{"reward": %s}\n' "${#line}"
done
"#;

/// The small recipe with a reward program that waits at its `answer`th answer; each step asks for 8, an evaluation for 4.
fn waiting(answer: usize) -> Workplace {
    let workplace = Workplace::new();
    workplace.write("reward.sh", WAITING_REWARD);
    let recipe = common::SMALL.replace("normalize = true\n", "");
    let recipe = recipe.replace("model = \"QUICKSTART/reward-model\"", &format!("command = \"sh reward.sh {answer}\""));
    workplace.write("small.toml", &recipe);
    workplace
}

/// Stops a run in the scoring of step 4, before that step's first optimizer move; its exit code and output.
fn stop_in_scoring(workplace: &Workplace, signal: i32) -> (Option<i32>, String) {
    let mut child = workplace.ppo("run", &[]).spawn().unwrap();
    let asked = workplace.path("asked");
    assert!(wait_for(&mut child, || asked.exists()), "{}", said(&child.wait_with_output().unwrap()));
    send(&child, signal);
    std::thread::sleep(Duration::from_millis(200));
    workplace.write("go", "");
    let output = child.wait_with_output().unwrap();
    (output.status.code(), said(&output))
}

/// Steps with a checkpoint.
fn checkpoints(run: &Path) -> Vec<String> {
    let entries = fs::read_dir(run.join("checkpoints")).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = entries.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

/// Answers before the fifth of step 4's scoring: one evaluation before the run, three steps, one evaluation in step 2.
const IN_STEP_4: usize = 4 + 3 * 8 + 4 + 5;

#[test]
fn a_signal_before_the_first_optimizer_move_abandons_the_step() {
    for (signal, code) in [(libc::SIGINT, 130), (libc::SIGTERM, 143)] {
        let workplace = waiting(IN_STEP_4);
        let run = workplace.path("run");
        let (exit, said) = stop_in_scoring(&workplace, signal);
        assert_eq!(exit, Some(code), "{said}");
        assert!(said.contains("step 3 is saved in") && said.contains("--resume continues"), "{said}");
        assert_eq!(checkpoints(&run), ["step-2", "step-3"]);
        assert_eq!(metrics(&run).len(), 3);
        workplace.finish("run", &["--resume"]);
        workplace.finish("whole", &[]);
        assert_same(&run, &workplace.path("whole"), "abandoned and resumed");
    }
}

#[test]
fn a_second_signal_ends_the_program_at_once() {
    // So many epochs that the update of step 1 takes minutes, and it is finished after one signal.
    let workplace = Workplace::new();
    let mut child = workplace.ppo("run", &["--set", "ppo.epochs=5000"]).spawn().unwrap();
    let evaluated = workplace.path("run/eval_before.json");
    assert!(wait_for(&mut child, || evaluated.exists()));
    std::thread::sleep(Duration::from_secs(2));
    send(&child, libc::SIGINT);
    std::thread::sleep(Duration::from_secs(1));
    assert!(child.try_wait().unwrap().is_none(), "one signal must not end an update");
    send(&child, libc::SIGINT);
    let begun = Instant::now();
    let output = child.wait_with_output().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert_eq!(output.status.code(), Some(130), "{}", said(&output));
    assert!(!workplace.path("run/checkpoints").exists(), "{}", said(&output));
}

#[test]
fn a_signal_before_the_first_step_leaves_nothing_to_save() {
    let workplace = waiting(2);
    let (exit, said) = stop_in_scoring(&workplace, libc::SIGINT);
    assert_eq!(exit, Some(130), "{said}");
    assert!(said.contains("no step was finished, so nothing was saved; --resume begins this run again"), "{said}");
    workplace.write("run/eval_before.json", "{\"mean_rew"); // as a kill in the middle of writing it leaves it
    workplace.finish("run", &["--resume"]);
    workplace.finish("whole", &[]);
    assert_same(&workplace.path("run"), &workplace.path("whole"), "resumed from nothing");
}

#[test]
fn a_signal_inside_generation_abandons_and_one_inside_the_update_finishes_the_step() {
    // Eight epochs: nine tenths of a step are its update.
    let settings = ["--set", "ppo.epochs=8", "--set", "train.steps=4", "--set", "checkpoint.every_steps=4"];
    let workplace = Workplace::new();
    workplace.finish("whole", &settings);
    for (part, saved) in [(0.0, "step-1"), (0.6, "step-2")] {
        // The moment is hit by the clock: on a busy machine it may pass, and the next run is tried.
        let hit = (0..8).any(|attempt| {
            let name = format!("{saved}-{attempt}");
            let run = workplace.path(&name);
            let mut child = workplace.ppo(&name, &settings).spawn().unwrap();
            assert!(Moment::Inside { step: 1, part }.wait(&mut child, &run));
            send(&child, libc::SIGINT);
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(130), "{}", said(&output));
            workplace.finish(&name, &[&settings[..], &["--resume"]].concat());
            assert_same(&run, &workplace.path("whole"), &name);
            said(&output).contains(&format!("{saved} is saved").replace('-', " "))
        });
        assert!(hit, "no signal was answered with {saved}");
    }
}

#[test]
fn a_signal_in_a_steps_evaluation_finishes_the_step() {
    // Step 2 is learned from; its evaluation asks for the answers after 4 + 2 * 8.
    let workplace = waiting(4 + 2 * 8 + 2);
    let (exit, said) = stop_in_scoring(&workplace, libc::SIGINT);
    assert_eq!(exit, Some(130), "{said}");
    assert_eq!(checkpoints(&workplace.path("run")), ["step-2"]);
    workplace.finish("run", &["--resume"]);
    workplace.finish("whole", &[]);
    assert_same(&workplace.path("run"), &workplace.path("whole"), "interrupted in an evaluation");
}

#[test]
fn the_newest_and_the_best_checkpoints_stay() {
    let workplace = Workplace::new();
    let settings =
        ["--set", "checkpoint.keep=1", "--set", "checkpoint.best_metric=eval/reward", "--set", "eval.every_steps=1"];
    let settings = [&settings[..], &["--set", "checkpoint.every_steps=1"]].concat();
    workplace.finish("run", &settings);
    let run = workplace.path("run");
    let rewards = series(&run, "eval/reward");
    let best = (1..=6).rev().max_by(|&a, &b| rewards[a - 1].total_cmp(&rewards[b - 1])).unwrap();
    let mut expected = vec![format!("step-{best}"), "step-6".to_owned()];
    expected.dedup();
    assert_eq!(checkpoints(&run), expected, "{rewards:?}");
    assert_ne!(best, 6, "a seed whose best step is the last shows nothing: {rewards:?}");
}

/// Every file of a folder with its bytes.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else {
                files.insert(path.clone(), fs::read(&path).unwrap());
            }
        }
    }
    files
}

/// RS-1: the program refuses to go on, says `expected`, and every file is as it was.
#[track_caller]
fn assert_not_resumed(run: &Path, mut command: Command, expected: &[&str]) {
    let before = contents(run);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    for expected in expected {
        assert!(said(&output).contains(expected), "{expected:?} is not in:\n{}", said(&output));
    }
    assert!(contents(run) == before, "the refused resume changed the run folder");
}

#[test]
fn a_resume_with_another_recipe_is_refused_and_changes_nothing() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    copy_folder(undisturbed(), &run);
    let resume = |sets: &[&str]| workplace.ppo("run", &[&["--resume"], sets].concat());
    let ends = ["change it back, or start a new run with another --output-dir", "may change name, train.steps"];
    for (sets, changes) in [
        (vec!["--set", "seed=8"], vec!["seed: 7 before, 8 now"]),
        (
            vec!["--set", "ppo.kl_coef=0.2", "--set", "rollout.batch_size=8"],
            vec!["ppo.kl_coef: 0.1 before, 0.2 now", "rollout.batch_size: 4 before, 8 now"],
        ),
    ] {
        assert_not_resumed(&run, resume(&sets), &[&changes[..], &ends].concat());
    }
    let free = ["train.steps=7", "eval.every_steps=off", "checkpoint.keep=1", "placement.workers=1"];
    let free: Vec<&str> = free.iter().flat_map(|set| ["--set", set]).collect();
    let said = workplace.finish("run", &[&["--resume"], &free[..]].concat());
    assert!(said.contains("resumed after step 6"), "{said}");
    assert_eq!(metrics(&run).len(), 7);
}

#[test]
fn a_resume_of_something_else_or_something_damaged_is_refused_and_changes_nothing() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    copy_folder(undisturbed(), &run);
    let recipe = workplace.write("supervised.toml", SUPERVISED);
    workplace.write("train.jsonl", &"{\"prompt\": \"A\", \"completion\": \" b\"}\n".repeat(8));
    let mut sft = Command::new(env!("CARGO_BIN_EXE_sft"));
    sft.arg(&recipe).arg("--output-dir").arg(&run).arg("--resume");
    assert_not_resumed(&run, sft, &["step-6 is a checkpoint of `ppo`, and this is `sft`", "another --output-dir"]);

    let resume = || workplace.ppo("run", &["--resume"]);
    let samples = fs::read_to_string(run.join("samples.jsonl")).unwrap();
    fs::write(run.join("samples.jsonl"), samples.replacen("{\"step\"", "{\"stp\"", 1)).unwrap();
    // Something to cut, which a resume that fails must not have cut.
    let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    fs::write(run.join("metrics.jsonl"), format!("{metrics}{{\"step\":7}}\n")).unwrap();
    assert_not_resumed(&run, resume(), &["samples.jsonl:1: not a JSON object with a `step`"]);
    fs::write(run.join("samples.jsonl"), &samples).unwrap();

    // The recipe is the same, the rows in its file are not.
    let rows = fs::read_to_string(common::quickstart().join("prompts-train.jsonl")).unwrap();
    workplace.write("prompts.jsonl", &rows);
    let own = ["--set".to_owned(), format!("data.prompts={}", workplace.path("prompts.jsonl").display())];
    let own: Vec<&str> = own.iter().map(String::as_str).chain(["--set", "train.steps=2"]).collect();
    workplace.finish("own", &own);
    let lines: Vec<&str> = rows.lines().skip(1).collect();
    workplace.write("prompts.jsonl", &(lines.join("\n") + "\n"));
    let run = workplace.path("own");
    let resume = workplace.ppo("own", &[&own[..], &["--resume"]].concat());
    assert_not_resumed(&run, resume, &["the number of rows by source"]);
}

#[test]
fn a_finished_run_without_a_checkpoint_does_not_begin_anew() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    copy_folder(undisturbed(), &run);
    fs::remove_dir_all(run.join("checkpoints")).unwrap();
    let expected = ["has finished", "no checkpoint to go on from", "another --output-dir"];
    assert_not_resumed(&run, workplace.ppo("run", &["--resume"]), &expected);
    for end in ["actor/config.json", "eval_after.json", "report.html"] {
        let only = workplace.path("only");
        let file = workplace.write(&format!("only/{end}"), "");
        assert_not_resumed(&only, workplace.ppo("only", &["--resume"]), &expected);
        fs::remove_dir_all(file.ancestors().find(|path| path.parent() == only.parent()).unwrap()).unwrap();
    }
}

#[test]
fn supervised_runs_killed_or_interrupted_resume_as_if_undisturbed() {
    let workplace = Workplace::new();
    let recipe = workplace.write("supervised.toml", SUPERVISED);
    for program in [env!("CARGO_BIN_EXE_sft"), env!("CARGO_BIN_EXE_reward")] {
        workplace.write("train.jsonl", &examples(program));
        let start = |run: &Path, arguments: &[&str]| {
            let mut command = Command::new(program);
            command.arg(&recipe).arg("--output-dir").arg(run).args(arguments).env("OMP_NUM_THREADS", "1");
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let finish = |run: &Path, arguments: &[&str]| {
            let output = start(run, arguments).wait_with_output().unwrap();
            assert!(output.status.success(), "{program}: {}", said(&output));
            let files = ["metrics.jsonl", "model/model.safetensors", "model/config.json"];
            let mut read = files.map(|name| fs::read(run.join(name)).unwrap());
            read[0] = deterministic_lines(run).into_bytes();
            read
        };
        let name = Path::new(program).file_name().unwrap().to_str().unwrap();
        let expected = finish(&workplace.path(&format!("{name}-whole")), &[]);
        for (lines, signal, code) in [(4, libc::SIGKILL, None), (11, libc::SIGKILL, None), (7, libc::SIGINT, Some(130))]
        {
            let run = workplace.path(&format!("{name}-{lines}"));
            let mut child = start(&run, &[]);
            assert!(wait_for(&mut child, || num_lines(&run.join("metrics.jsonl")) >= lines), "{program} ended");
            send(&child, signal);
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), code, "{program}: {}", said(&output));
            assert!(finish(&run, &["--resume"]) == expected, "{program} after a signal at step {lines}");
        }
    }
}

#[test]
fn supervised_runs_are_evaluated_before_and_keep_their_best_checkpoint() {
    let workplace = Workplace::new();
    // The held-out rows say the opposite of what is learned, and it is learned in great steps: their loss rises.
    let text =
        SUPERVISED.replace("eval = \"train.jsonl\"", "eval = \"eval.jsonl\"").replace("epochs = 2", "epochs = 1");
    let text = text.replace("lr = 1e-3", "lr = 0.5\nwarmup_ratio = 0.0");
    let text = text.replace("eval_every_steps = 5", "eval_every_steps = 3") + "keep = 1\nbest_metric = \"eval/loss\"\n";
    let recipe = workplace.write("supervised.toml", &text);
    let completion =
        |index: i32, word: &str| format!("{{\"prompt\": \"The lamp {index} was\", \"completion\": \" {word}.\"}}\n");
    let pair = |index: i32, [good, bad]: [&str; 2]| {
        format!("{{\"prompt\": \"The lamp {index} was\", \"chosen\": \" {good}.\", \"rejected\": \" {bad}.\"}}\n")
    };
    let best = "eval/loss";
    for (program, binary) in [("sft", env!("CARGO_BIN_EXE_sft")), ("reward", env!("CARGO_BIN_EXE_reward"))] {
        let rows = |words: [&str; 2]| -> String {
            let row = |index| if program == "sft" { completion(index, words[0]) } else { pair(index, words) };
            (0..36).map(row).collect()
        };
        workplace.write("train.jsonl", &rows(["bright", "broken"]));
        workplace.write("eval.jsonl", &rows(["broken", "bright"]));
        let run = workplace.path(program);
        let mut command = Command::new(binary);
        command.arg(&recipe).arg("--output-dir").arg(&run).env("OMP_NUM_THREADS", "1");
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        assert!(said(&output).contains("before training: eval/"), "{}", said(&output));
        let before: Value = serde_json::from_slice(&fs::read(run.join("eval_before.json")).unwrap()).unwrap();
        assert!(before[best].as_f64().is_some_and(f64::is_finite), "{before}");

        let losses: Vec<f64> = [3, 6, 9].iter().map(|step| metrics(&run)[step - 1][best].as_f64().unwrap()).collect();
        let lowest = (0..3).min_by(|&a, &b| losses[a].total_cmp(&losses[b])).unwrap();
        assert_ne!(lowest, 2, "{program}: a run whose last step is the best shows nothing: {losses:?}");
        assert_eq!(checkpoints(&run), [format!("step-{}", 3 * (lowest + 1)), "step-9".to_owned()], "{losses:?}");
        let state = fs::read_to_string(run.join("checkpoints/step-9/state.json")).unwrap();
        let state: Value = serde_json::from_str(&state).unwrap();
        assert_eq!((state["program"].as_str(), state["metric"]["name"].as_str()), (Some(program), Some(best)));
    }
}

#[test]
fn a_resumed_supervised_run_shows_its_rows_the_time_that_it_began_at() {
    let workplace = Workplace::new();
    let model = workplace.path("model");
    copy_folder(&common::quickstart().join("language-model"), &model);
    let template = "{{ strftime_now('%Y') }}{% for message in messages %} {{ message.role }}: {{ message.content }}\
                    <eos>{% endfor %}{% if add_generation_prompt %} assistant:{% endif %}";
    fs::write(model.join("chat_template.jinja"), template).unwrap();
    let recipe = workplace.write(
        "supervised.toml",
        &SUPERVISED.replace("QUICKSTART/language-model", "./model").replace("epochs = 2\n", ""),
    );
    let row = |index: i32| {
        let turn = |role: &str, content: &str| format!("{{\"role\": \"{role}\", \"content\": \"{content}\"}}");
        format!(
            "{{\"messages\": [{}, {}]}}\n",
            turn("user", &format!("Lamp {index}?")),
            turn("assistant", "It is bright.")
        )
    };
    workplace.write("train.jsonl", &(0..40).map(row).collect::<String>());
    let run = |seconds_since_1970: &str, arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sft"));
        command.arg(&recipe).arg("--output-dir").arg(workplace.path("run")).args(arguments);
        let output = command.env("SOURCE_DATE_EPOCH", seconds_since_1970).env("OMP_NUM_THREADS", "1").output().unwrap();
        assert!(output.status.success(), "{}", said(&output));
        said(&output)
    };
    run("0", &["--set", "train.steps=3"]);
    let said = run("1000000000", &["--set", "train.steps=6", "--resume"]);
    assert!(said.contains("resumed after step 3"), "{said}");
    assert_eq!(metrics(&workplace.path("run")).len(), 6);
}
