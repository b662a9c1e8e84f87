//! `--plan`: which role goes on which device and what a step takes there, with no device present.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use echelon_algorithms::{Learning, OnPolicy};
use echelon_core::compute::{Compute, ComputeDtype};
use echelon_core::device::DeviceChoice;
use echelon_core::role::Role;
use echelon_core::shape::ModelShape;
use echelon_core::store::total;
use echelon_core::verb::{Learn, Logprobs, Scores, Verb};
use echelon_core::workload::{Gives, Pass, RoleModel, Sampling, Training, Workload, passes_with_sampling};
use echelon_models::config::{DecoderConfig, HeadKind};
use echelon_placement::cluster::Cluster;
use echelon_placement::devices::Devices;
use echelon_placement::launch::spawn::available_threads;
use echelon_placement::planner::{ByHand, Constraints, Plan, PlanError, plan};
use echelon_placement::rates::Rates;

use crate::node;
use crate::program::{Failure, PlanFormat, failed, write_whole};
use crate::recipe::{Auto, Model, ModelSource, ResolvedRecipe, SupervisedTrain};
use echelon_monitor::PLAN_FILE;
use serde::Serialize;

/// The GPUs that a recipe without a kind is planned for.
const USUAL_GPU: &str = "H100-80GB";
const USUAL_GPUS_PER_NODE: usize = 8;

/// The plan of a run whose models are at hand, wherever they came from.
///
/// # Errors
/// [`Failure::Input`]: hardware or models that cannot be planned, and a plan that does not fit, with the nearest change
/// that would.
pub fn of_run<K: OnPolicy>(recipe: &ResolvedRecipe<K>, shapes: Shapes) -> Result<Plan, Failure> {
    let (cluster, workload) = (cluster(&recipe.placement.devices)?, workload_of(recipe, shapes));
    plan(&cluster, &workload, &constraints(recipe), &Rates::of(&cluster)).map_err(Failure::input)
}

/// The same, with a refusal as the planner gives it; None where a model's shape is not at hand (a hub id without `shape`).
///
/// # Errors
/// [`Failure::Input`]: hardware or models that cannot be planned.
pub fn ask<K: OnPolicy>(recipe: &ResolvedRecipe<K>) -> Result<Option<Result<Plan, PlanError>>, Failure> {
    let Some(workload) = workload(recipe)? else { return Ok(None) };
    let cluster = cluster(&recipe.placement.devices)?;
    Ok(Some(plan(&cluster, &workload, &constraints(recipe), &Rates::of(&cluster))))
}

/// How a model is trained alone (`sft`, `reward`): on which devices, with which numbers.
pub struct TrainingJob<'a> {
    pub role: Role,
    pub model: &'a Model,
    /// Where the model is, when it is at hand.
    pub folder: Option<&'a Path>,
    pub train: &'a SupervisedTrain,
    pub devices: &'a Devices,
    /// Rows that belong together: 2 of a pair.
    pub rows_per_example: usize,
}

impl TrainingJob<'_> {
    /// The plan; None where the model's shape is not at hand (a hub id without `shape`).
    ///
    /// # Errors
    /// [`Failure::Input`]: hardware or a model that cannot be planned.
    pub fn ask(&self) -> Result<Option<Result<Plan, PlanError>>, Failure> {
        let Some(workload) = self.workload()? else { return Ok(None) };
        let (cluster, compute) = (cluster(self.devices)?, &self.train.compute);
        let constraints = Constraints {
            zero_stage: compute.zero_stage.fixed().map(|stage| stage as u8),
            adam_offload: compute.adam_offload.then_some(true),
            use_all_devices: self.devices.workers.fixed().is_some(),
            pools: !self.devices.node_pool.is_empty(),
            ..Constraints::default()
        };
        Ok(Some(plan(&cluster, &workload, &constraints, &Rates::of(&cluster))))
    }

    /// What a step works on; None where the model's shape is not at hand.
    ///
    /// # Errors
    /// [`Failure::Input`]: a model whose config cannot be read.
    pub fn workload(&self) -> Result<Option<Workload>, Failure> {
        let TrainingJob { role, model, folder, train, devices, rows_per_example } = *self;
        let source = folder.map_or_else(|| model.model.clone(), |folder| ModelSource::Folder(folder.into()));
        let (head, gives, says) = match role {
            Role::Actor => (HeadKind::Logits, Gives::Logprobs, Logprobs::NAME),
            _ => (HeadKind::Score, Gives::Scalars, Scores::NAME),
        };
        let Some(shape) = shape((&source, &model.shape), Some(head))? else { return Ok(None) };
        let (compute, rows) = (&train.compute, train.batch_size * rows_per_example);
        Ok(Some(Workload {
            models: vec![RoleModel { role, shape, gives, training: Some(Training::default()), offload: false }],
            sampling: None,
            passes: vec![Pass { role, verb: Learn::NAME, rows, times: 1 }, Pass { role, verb: says, rows, times: 0 }],
            rows,
            rows_per_unit: rows_per_example,
            max_prompt_tokens: 0,
            max_response_tokens: train.max_tokens,
            mean_prompt_tokens: 0.0,
            // Unknown before the rows are read: half the limit.
            mean_response_tokens: train.max_tokens as f64 / 2.0,
            tokens_per_micro_batch: compute.tokens_per_micro_batch,
            dtype: compute_dtype(compute, devices),
            activation_checkpointing: compute.activation_checkpointing,
        }))
    }
}

/// What `--plan` prints: the resolved recipe, as text or JSON, and the plan or why there is none.
///
/// # Errors
/// [`Failure::Input`]: the plan was refused.
pub fn print<P: Serialize + Display>(
    format: PlanFormat,
    (text, mut json): (String, serde_json::Value),
    plan: Option<Result<P, &PlanError>>,
) -> Result<(), Failure> {
    match format {
        PlanFormat::Text => {
            let plan = plan.transpose().map_err(Failure::input)?;
            print!("{text}");
            let plan = plan.map_or(
                "no plan: a model has no config.json here (a folder that is not there, or a hub id): name a folder that has it, as `shape`".into(),
                |plan| plan.to_string(),
            );
            plan.lines().for_each(|line| println!("{}", format!("# {line}").trim_end()));
            Ok(())
        }
        PlanFormat::Json => {
            let refused = match plan.transpose() {
                Ok(plan) => {
                    json["plan"] = serde_json::to_value(plan).map_err(Failure::other)?;
                    None
                }
                Err(error) => {
                    if let PlanError::Refused(refusal) = &error {
                        json["refusal"] = serde_json::to_value(refusal).map_err(Failure::other)?;
                    }
                    Some(Failure::input(error))
                }
            };
            println!("{}", serde_json::to_string_pretty(&json).map_err(Failure::other)?);
            refused.map_or(Ok(()), Err)
        }
    }
}

/// Keeps the plan of a run of several workers in its folder; a run of one has none.
///
/// # Errors
/// The operating system's.
pub fn keep(folder: &Path, plan: Option<&str>) -> Result<(), Failure> {
    let file = folder.join(PLAN_FILE);
    match plan {
        Some(text) => write_whole(&file, text),
        None if file.exists() => std::fs::remove_file(&file).map_err(|error| failed(&file, error)),
        None => Ok(()),
    }
}

/// Counts this machine's GPUs where the recipe leaves it to us: several are then planned for, and the resolved recipe says
/// how many. One needs no plan.
pub fn count_gpus(devices: &mut Devices) {
    if devices.device != DeviceChoice::Cpu
        && devices.count().is_none()
        && devices.gpu.is_none()
        && let Some(found) = node::gpus().map(|here| here.num_devices()).filter(|&found| found > 1)
    {
        devices.gpus_per_node = Auto::Fixed(found);
    }
}

fn on_cpu(devices: &Devices) -> bool {
    let names_gpus = devices.count().is_some() || devices.gpu.is_some();
    devices.device == DeviceChoice::Cpu || (devices.device == DeviceChoice::Auto && !names_gpus)
}

fn cluster(devices: &Devices) -> Result<Cluster, Failure> {
    let memory = |cluster: Cluster, gib: Auto<f64>| match gib {
        Auto::Fixed(gib) => cluster.with_host_memory((gib * (1u64 << 30) as f64) as u64),
        Auto::Auto => cluster,
    };
    let pools = devices.node_pool.iter().map(|pool| {
        let cluster = Cluster::of(pool.nodes, pool.gpus_per_node, &pool.gpu).map_err(Failure::input)?;
        Ok(memory(cluster, pool.host_memory_gib))
    });
    let pools = pools.collect::<Result<Vec<Cluster>, Failure>>()?;
    let cluster = match pools.into_iter().reduce(Cluster::joined) {
        Some(all) => return Ok(all),
        None if on_cpu(devices) => {
            let workers = devices.workers.fixed().unwrap_or(1).div_ceil(devices.nodes);
            let host = Cluster::cpu(workers, available_threads(), total()).map_err(Failure::input)?;
            host.repeated(devices.nodes, workers).expect("a host's own workers")
        }
        None => gpus(devices)?,
    };
    Ok(memory(cluster, devices.host_memory_gib))
}

/// Like nodes with GPUs. Hardware that is here is known better than by a name.
fn gpus(devices: &Devices) -> Result<Cluster, Failure> {
    let in_use = devices.workers.fixed().map(|workers| workers.div_ceil(devices.nodes));
    let here = node::gpus().filter(|_| devices.gpu.is_none());
    let counted = here.map_or(USUAL_GPUS_PER_NODE, Cluster::num_devices);
    let per_node = in_use.or(devices.gpus_per_node.fixed()).unwrap_or(counted);
    if let Some(cluster) = here.and_then(|here| here.repeated(devices.nodes, per_node)) {
        return Ok(cluster);
    }
    Cluster::of(devices.nodes, per_node, devices.gpu.as_deref().unwrap_or(USUAL_GPU)).map_err(Failure::input)
}

fn workload<K: OnPolicy>(recipe: &ResolvedRecipe<K>) -> Result<Option<Workload>, Failure> {
    let of = |(model, folder): (Option<&ModelSource>, &Option<PathBuf>), head| match model {
        Some(model) => shape((model, folder), head),
        None => Ok(None),
    };
    let (reference, reward) = (&recipe.reference, recipe.reward.model());
    let Some(actor) = shape((&recipe.actor.model, &recipe.actor.shape), None)? else { return Ok(None) };
    let critic = of((recipe.critic.model.as_ref(), &recipe.critic.shape), Some(HeadKind::Score))?;
    if critic.is_none() && K::has_critic() {
        return Ok(None);
    }
    let reference = of((reference.model.as_ref(), &reference.shape), None)?;
    let reward = match reward {
        Some(source) => of((source.model.as_ref(), &source.shape), Some(HeadKind::Score))?,
        None => None,
    };
    Ok(Some(workload_of(recipe, Shapes { actor, critic, reference, reward })))
}

/// The shapes of a recipe's models.
pub struct Shapes {
    pub actor: ModelShape,
    pub critic: Option<ModelShape>,
    pub reference: Option<ModelShape>,
    pub reward: Option<ModelShape>,
}

/// What a step of a recipe works on.
pub(crate) fn workload_of<K: OnPolicy>(recipe: &ResolvedRecipe<K>, shapes: Shapes) -> Workload {
    let (prompt, response) = (recipe.data.max_prompt_tokens, recipe.rollout.max_new_tokens);
    let Learning { epochs, mini_batch_size: batch, entropy_in_loss, .. } = recipe.keys.learning();
    let samples = recipe.rollout.samples_per_prompt;
    let rows = recipe.rollout.batch_size * samples;
    let model = |role, shape, gives, training| RoleModel { role, shape, gives, training, offload: false };
    let mut models = vec![model(Role::Actor, shapes.actor, Gives::Logprobs, Some(Training { entropy_in_loss }))];
    let of_critic = Some(Training::default());
    models.extend(shapes.critic.map(|shape| model(Role::Critic, shape, Gives::Scalars, of_critic)));
    models.extend(shapes.reference.map(|shape| RoleModel {
        offload: recipe.reference.offload,
        ..model(Role::Reference, shape, Gives::Logprobs, None)
    }));
    models.extend(shapes.reward.map(|shape| model(Role::Reward, shape, Gives::Scalars, None)));
    Workload {
        passes: passes_with_sampling(&models, rows, batch, rows.div_ceil(batch).saturating_mul(epochs)),
        models,
        sampling: Some(Sampling {
            published: Role::Actor,
            prompts: recipe.rollout.batch_size,
            samples_per_prompt: samples,
            max_sequences: recipe.generation.max_sequences,
            max_batched_tokens: recipe.generation.max_batched_tokens,
            kv_cache_bytes: recipe.generation.kv_cache_bytes.fixed().map(|bytes| bytes as u64),
        }),
        rows,
        rows_per_unit: 1,
        max_prompt_tokens: prompt,
        max_response_tokens: response,
        // Unknown before the first rollout: half the limits.
        mean_prompt_tokens: prompt as f64 / 2.0,
        mean_response_tokens: response as f64 / 2.0,
        tokens_per_micro_batch: recipe.train.compute.tokens_per_micro_batch,
        dtype: compute_dtype(&recipe.train.compute, &recipe.placement.devices),
        activation_checkpointing: recipe.train.compute.activation_checkpointing,
    }
}

fn compute_dtype(compute: &Compute, devices: &Devices) -> ComputeDtype {
    let usual = if on_cpu(devices) { ComputeDtype::Float32 } else { ComputeDtype::Bfloat16 };
    compute.dtype.fixed().unwrap_or(usual)
}

/// A model's shape from its own `config.json`, or where that is not at hand from the one named for planning.
fn shape(
    (model, shape): (&ModelSource, &Option<PathBuf>),
    head: Option<HeadKind>,
) -> Result<Option<ModelShape>, Failure> {
    match (shape, model) {
        (_, ModelSource::Folder(folder)) if folder.join("config.json").exists() => shape_with(folder, head).map(Some),
        (Some(folder), _) => shape_with(folder, head).map(Some),
        _ => Ok(None),
    }
}

/// The shape of a folder's model with this head, or its own.
pub(crate) fn shape_with(folder: &Path, head: Option<HeadKind>) -> Result<ModelShape, Failure> {
    let config = DecoderConfig::read(folder).map_err(Failure::input)?;
    Ok(DecoderConfig { head: head.unwrap_or(config.head), ..config }.shape())
}

pub(crate) fn constraints<K: OnPolicy>(recipe: &ResolvedRecipe<K>) -> Constraints {
    let placement = &recipe.placement;
    let by_hand = [
        (Role::Actor, &placement.actor),
        (Role::Critic, &placement.critic),
        (Role::Reward, &placement.reward),
        (Role::Reference, &placement.reference),
        (Role::Generator, &placement.generator),
    ];
    let by_hand = by_hand.into_iter().filter(|(_, place)| place.devices.is_some() || place.colocate_with.is_some());
    let by_hand = by_hand.map(|(role, place)| ByHand {
        role,
        devices: place.devices.clone(),
        colocate_with: place.colocate_with,
    });
    Constraints {
        tier: placement.devices.tier.fixed(),
        zero_stage: recipe.train.compute.zero_stage.fixed().map(|stage| stage as u8),
        adam_offload: recipe.train.compute.adam_offload.then_some(true),
        tensor_parallel: Some(recipe.generation.tensor_parallel_size).filter(|&size| size > 1),
        by_hand: by_hand.collect(),
        use_all_devices: placement.devices.workers.fixed().is_some(),
        pools: !placement.devices.node_pool.is_empty(),
        ..Constraints::default()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::recipe::{PpoRecipe, Root};
    use echelon_placement::layout::Layout;

    #[test]
    fn workers_have_the_devices_that_the_recipe_names() {
        let sets = [
            "placement.actor.devices=[0, 1]",
            "placement.critic.devices=[4, 5]",
            "placement.generator.colocate_with=actor",
            "placement.reference.colocate_with=critic",
            "placement.reward.colocate_with=critic",
        ];
        let recipe = PpoRecipe::load_for_plan(Path::new("recipes/ppo-llama-7b-1n8g.toml"), &sets.map(String::from));
        let plan = ask(&recipe.unwrap().resolve()).unwrap().expect("its shape is with the recipe").unwrap();
        assert_eq!((plan.idle_devices, plan.idle_reason.as_str()), (4, "roles are placed by hand"));
        let layout = Layout::of(&plan);
        assert_eq!((layout.devices.as_slice(), layout.num_workers), (&[0, 1, 4, 5][..], 4));
        assert_eq!(
            (&layout.group(Role::Actor).workers, &layout.group(Role::Reward).workers),
            (&vec![0, 1], &vec![2, 3])
        );
    }

    #[test]
    fn host_memory_is_as_the_recipe_says() {
        let planned = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
            let recipe = PpoRecipe::load_for_plan(Path::new("recipes/ppo-llama-7b-1n8g.toml"), &sets).unwrap();
            ask(&recipe.resolve()).unwrap().unwrap().unwrap().host_memory
        };
        assert!(planned(&[]).contains("as assumed"));
        assert_eq!(planned(&["placement.host_memory_gib=512"]), "512 GiB");
    }
}
