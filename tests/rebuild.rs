//! Workers, process groups, endpoints and senders can be dropped in the middle and built again from the run's spec, in the
//! same process; a checkpoint then gives them back what they had, by the function that `--resume` uses.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;

use common::{SMALL, Workplace};
use echelon::checkpoint::{Checkpoints, Resumed};
use echelon::rank_plan::rank_plan;
use echelon::recipe::{PpoKeys, PpoRecipe, ResolvedRecipe, Root};
use echelon::run::inputs::{Inputs, Program};
use echelon::run::learning::Learning;
use echelon::wire;
use echelon::workers::{End, Workers};
use echelon_algorithms::ppo::Ppo;
use echelon_core::progress::{Interrupt, Unwatched};
use echelon_core::role::Role;
use echelon_core::verb::Roles;
use echelon_placement::layout::Layout;
use echelon_roles::membership::{Membership, Watched};

mod common;

/// Steps before the workers are dropped, and of the whole run.
const DROPPED_AFTER: u64 = 3;
const STEPS: u64 = 5;

/// Where the workers join, if they are processes of their own.
struct Joined {
    recipe: ResolvedRecipe<PpoKeys>,
    count: usize,
    credentials: std::path::PathBuf,
}

impl Joined {
    fn start(&self) -> Vec<Child> {
        let Some(address) = self.recipe.devices().listen else { return Vec::new() };
        let worker = |rank: usize| {
            Command::new(env!("CARGO_BIN_EXE_worker"))
                .args(["--join", &address.to_string(), "--credentials"])
                .arg(&self.credentials)
                .envs(
                    [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", self.count)].map(|(k, v)| (k, v.to_string())),
                )
                .spawn()
                .unwrap()
        };
        (0..self.count).map(worker).collect()
    }

    /// New workers, whatever was before.
    async fn connect(&self, inputs: &Inputs<Ppo>) -> (Roles, Workers, Vec<Child>) {
        let children = self.start();
        let (spec, parts) = (inputs.spec.clone(), (Interrupt::default(), Arc::new(Unwatched) as _));
        let connected = wire::connect(
            (spec, inputs.tokenizer.clone()),
            self.recipe.devices(),
            inputs.rewards.clone(),
            parts,
            Arc::new(|_| ()),
        );
        let (roles, workers) = connected.await.unwrap();
        (roles, workers, children)
    }
}

async fn gone(workers: Workers, end: End, children: Vec<Child>) {
    workers.finish(end).await;
    for mut child in children {
        child.wait().unwrap();
    }
}

/// Runs in `folder`; where `drops`, every worker is dropped after [`DROPPED_AFTER`] steps, and after one more that is lost.
async fn run(joined: &Joined, folder: &Path, drops: bool) {
    let inputs = joined.recipe.inputs(&Resumed::default(), folder).unwrap();
    let checkpoints = Checkpoints::new(folder, joined.recipe.checkpoint());
    let Inputs { algorithm, feed, held, tokenizer, .. } = joined.recipe.inputs(&Resumed::default(), folder).unwrap();
    let (roles, mut workers, mut children) = joined.connect(&inputs).await;
    let mut learning = Learning { algorithm, roles, feed, policy_version: 0 };
    let interrupt = Interrupt::default();
    for step in 1..=STEPS {
        learning.step(step, &interrupt).await.unwrap();
        if step == DROPPED_AFTER {
            learning.save(checkpoints.begin(step).unwrap(), step, (held, &tokenizer), None).await.unwrap();
            if drops {
                learning.step(step + 1, &interrupt).await.unwrap();
                gone(workers, End::Failed, children).await;
                (learning.roles, workers, children) = joined.connect(&inputs).await;
                let (path, state) = checkpoints.newest().unwrap().saved.unwrap();
                learning.restore(&path, &state).await.unwrap();
            }
        }
    }
    learning.save(checkpoints.begin(STEPS).unwrap(), STEPS, (held, &tokenizer), None).await.unwrap();
    gone(workers, End::Done, children).await;
}

fn compare(sets: &[String], count: usize, workplace: &Workplace) {
    tch::set_num_threads(1); // beside other tests, threads of tiny operations only wait for each other
    let recipe = workplace.write("recipe.toml", SMALL);
    let recipe = PpoRecipe::load(&recipe, sets).unwrap().resolve();
    let joined = Joined { recipe, count, credentials: workplace.path("credentials") };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for (name, drops) in [("undisturbed", false), ("dropped", true)] {
        runtime.block_on(run(&joined, &workplace.path(name), drops));
    }
    for file in ["actor.safetensors", "critic.safetensors"] {
        let of = |run: &str| fs::read(workplace.path(&format!("{run}/checkpoints/step-{STEPS}/{file}"))).unwrap();
        assert!(of("dropped") == of("undisturbed"), "{file} differs");
    }
}

#[test]
fn a_dropped_worker_is_built_again_and_nothing_is_lost() {
    compare(&[], 1, &Workplace::new());
}

#[test]
fn dropped_processes_are_built_again_and_nothing_is_lost() {
    let workplace = Workplace::new();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let sets = [
        "placement.workers=2".to_owned(),
        "placement.tier=small".into(),
        "train.zero_stage=3".into(),
        format!("placement.listen={free}"),
        format!("placement.credentials={}", workplace.path("credentials").display()),
    ];
    compare(&sets, 2, &workplace);
}

/// Whether a device samples is the layout's word, not the number of its learners: an algorithm without a critic samples too.
#[test]
fn one_learner_has_a_generator_where_the_layout_says_so() {
    let workplace = Workplace::new();
    let recipe = PpoRecipe::load(&workplace.write("recipe.toml", SMALL), &[]).unwrap().resolve();
    let inputs = recipe.inputs(&Resumed::default(), &workplace.path("run")).unwrap();
    let samples = |layout: Layout| {
        let (mut plan, _) = rank_plan(&inputs.spec, None).unwrap();
        plan.trained.retain(|learner| learner.role == Role::Actor);
        let here = Membership::take(0, layout, None, &Watched::default()).unwrap();
        let built = plan.build(here, inputs.tokenizer.clone(), Interrupt::default(), Arc::new(Unwatched)).unwrap();
        (built.trained.len(), built.generator.is_some())
    };
    assert_eq!(samples(Layout::together(1, 0, false)), (1, true));
    assert_eq!(samples(Layout::alone(Role::Actor, 1, (0, false))), (1, false));
}
