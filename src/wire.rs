//! Starts what a run works with: its workers, the handles of their roles, what scores responses.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use echelon_algorithms::OnPolicy;
use echelon_core::progress::{Interrupt, Progress};
use echelon_core::role::Role;
use echelon_core::verb::{Calls, Reward, Roles, WorkerGroup};
use echelon_models::tokenizer::Tokenizer;
use echelon_placement::planner::Plan;

use crate::assignment::Assignment;
use crate::devices::num_workers;
use crate::model_folders::{ModelFolders, shapes};
use crate::plan;
use crate::program::Failure;
use crate::rank_plan::rank_plan;
use crate::recipe::{Devices, ResolvedRecipe};
use crate::reward::{NamedTask, Source, WeightedSources, distinct_names, task_source};
use crate::run_spec::RunSpec;
use crate::workers::{Joining, Workers};
use echelon_placement::layout::Layout;
use echelon_roles::models::{Held, score_statistics};

/// What scores responses, started but for models.
#[derive(Clone)]
pub struct Rewards {
    tasks: Vec<Option<NamedTask>>,
    weights: Vec<f64>,
    /// Mean and standard deviation by which a lone model's scores are normalised for learning; they are reported as they are.
    pub alone: Option<(f64, f64)>,
    /// By which those of a model in a sum are: before they are added.
    in_sum: Option<(f64, f64)>,
}

impl Rewards {
    /// # Errors
    /// A source that cannot be started; a model without statistics where they are asked for.
    pub fn start<K: OnPolicy>(recipe: &ResolvedRecipe<K>, folders: &ModelFolders) -> Result<Rewards, Failure> {
        let statistics = match folders.reward.as_deref().filter(|_| recipe.reward.normalize) {
            Some(folder) => Some(score_statistics(folder).map_err(Failure::input)?),
            None => None,
        };
        let sources = recipe.reward.sources();
        let is_lone = matches!(sources[..], [(_, 1.0)]);
        let (alone, in_sum) = if is_lone { (statistics, None) } else { (None, statistics) };
        Ok(Rewards {
            tasks: sources.iter().map(|(source, _)| task_source(source)).collect::<Result<_, _>>()?,
            weights: sources.iter().map(|(_, weight)| *weight).collect(),
            alone,
            in_sum,
        })
    }

    fn wired(self, model: impl Fn() -> WorkerGroup, interrupt: Interrupt) -> WeightedSources {
        let names: Vec<String> =
            self.tasks.iter().map(|task| task.as_ref().map_or("model".to_owned(), |(name, _)| name.clone())).collect();
        let sources = self.tasks.into_iter().map(|task| match task {
            Some((_, task)) => Source::Task(task),
            None => Source::Model { group: model(), normalization: self.in_sum },
        });
        let sources = distinct_names(&names).into_iter().zip(self.weights).zip(sources);
        let sources = sources.map(|((name, weight), source)| (name, weight, source)).collect();
        WeightedSources { sources, interrupt }
    }
}

/// Starts a run's workers, and makes the handles of their roles.
///
/// # Errors
/// A model that cannot be loaded, a worker that does not come.
pub async fn connect(
    (spec, tokenizer): (RunSpec, Arc<Tokenizer>),
    devices: &Devices,
    rewards: Option<Rewards>,
    (interrupt, progress): (Interrupt, Arc<dyn Progress>),
    say: Arc<dyn Fn(&str) + Send + Sync>,
) -> Result<(Roles, Workers), Failure> {
    let (layout, with_models) = (spec.layout.clone(), spec.roles());
    let workers = start_crew(spec, tokenizer, devices, (interrupt.clone(), progress), say).await?;
    let calls = Calls::default();
    let group = |role| workers.group(&layout, role, &calls);
    let mut groups: BTreeMap<Role, WorkerGroup> = with_models.iter().map(|&role| (role, group(role))).collect();
    if let Some(generator) = groups.remove(&Role::Generator) {
        let apart = layout.group(Role::Generator).workers != layout.group(Role::Actor).workers;
        groups.insert(Role::Generator, if apart { generator.apart_from_actor() } else { generator });
    }
    let reward = rewards.map(|rewards| Box::new(rewards.wired(|| group(Role::Reward), interrupt)) as Box<dyn Reward>);
    Ok((Roles { groups, reward, calls }, workers))
}

/// Starts a run's workers: a thread of this process, or processes.
///
/// # Errors
/// A model that cannot be loaded, a worker that does not come.
async fn start_crew(
    spec: RunSpec,
    tokenizer: Arc<Tokenizer>,
    devices: &Devices,
    (interrupt, progress): (Interrupt, Arc<dyn Progress>),
    say: Arc<dyn Fn(&str) + Send + Sync>,
) -> Result<Workers, Failure> {
    if spec.layout.num_workers == 1 && devices.listen.is_none() {
        let (plan, _told) = rank_plan(&spec, None)?;
        return Workers::here(plan, spec.layout, tokenizer, interrupt, progress).await.map_err(Failure::input);
    }
    let assignment = Assignment { spec, worker: 0, on_its_host: 1, meeting_port: None, store: None };
    let patience = Duration::from_secs_f64(devices.join_timeout_s);
    let credentials = devices.credentials.as_ref().map(|file| file.0.clone());
    let joining = Joining { listen: devices.listen, credentials, patience, say };
    Workers::of_processes(assignment, &joining, (interrupt, progress)).await
}

/// Where a run's roles go: on one worker, or as the planner says, with its plan.
///
/// # Errors
/// [`Failure::Input`]: a plan that does not fit, with the numbers; hardware that is not here.
pub fn layout<K: OnPolicy>(
    recipe: &ResolvedRecipe<K>,
    folders: &ModelFolders,
    held: Held,
) -> Result<(Layout, Option<Plan>), Failure> {
    let workers = num_workers(&recipe.placement.devices, held)?;
    if workers == 1 {
        return Ok((Layout::together(1, 0, recipe.train.compute.adam_offload), None));
    }
    let plan = plan::of_run(recipe, shapes(folders)?)?;
    Ok((Layout::of(&plan), Some(plan)))
}
