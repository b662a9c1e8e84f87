//! What the planner says a step takes, beside what it took.

use std::collections::BTreeSet;
use std::path::PathBuf;

use echelon_algorithms::OnPolicy;
use echelon_core::Error;
use echelon_core::data::Rows;
use echelon_core::memory::Work;
use echelon_core::progress::Interrupt;
use echelon_core::role::Role;
use echelon_core::store::total;
use echelon_core::workload::Workload;
use echelon_placement::cluster::Cluster;
use echelon_placement::launch::spawn::{available_threads, threads_per_worker};
use echelon_placement::planner::{Constraints, StepSeconds, plan};
use echelon_placement::rates::Rates;
use tch::Device;

use crate::model_folders::{ModelFolders, shapes};
use crate::plan::workload_of;
use crate::program::Failure;
use crate::recipe::ResolvedRecipe;
use echelon_monitor::Metrics;
use echelon_placement::layout::Layout;
use echelon_roles::calibration::{self, Here};
use echelon_roles::models::Held;

/// The planner with this machine's rates, which are measured when the first step is over.
pub struct Forecast {
    workload: Workload,
    constraints: Constraints,
    /// None where devices are no share of this host: their rates are not measured.
    cluster: Option<Cluster>,
    /// The workers of this host.
    here: Here,
    folder: PathBuf,
    held: Held,
    rates: Option<Rates>,
}

impl Forecast {
    /// # Errors
    /// A model's config cannot be read, or a cluster of no device.
    pub fn new<K: OnPolicy>(
        recipe: &ResolvedRecipe<K>,
        folders: &ModelFolders,
        held: Held,
        layout: &Layout,
    ) -> Result<Forecast, Failure> {
        let on_cpu = held.pass.device == Device::Cpu;
        let workload = workload_of(recipe, shapes(folders)?);
        let here = here(&workload, layout, recipe.placement.devices.listen.is_some());
        // A worker alone at work has its threads to itself; what several take from each other is measured.
        let threads = here.threads * layout.num_workers;
        let cluster = on_cpu.then(|| Cluster::cpu(layout.num_workers, threads, total())).transpose();
        Ok(Forecast {
            workload,
            constraints: Constraints {
                // What was planned and now runs.
                zero_stage: Some(layout.group(Role::Actor).zero_stage),
                adam_offload: Some(layout.group(Role::Actor).adam_offload),
                tensor_parallel: Some(layout.group(Role::Generator).tensor_parallel),
                by_hand: layout.by_hand(),
                use_all_devices: true,
                // What runs has room: this is about time.
                memory_fraction: 1e6,
                ..Constraints::default()
            },
            cluster: cluster.map_err(Failure::input)?,
            here,
            folder: folders.actor.clone(),
            held,
            rates: None,
        })
    }

    /// Sets `perf/planned_<phase>_s` and `perf/planned_step_s`: the planner's seconds for the lengths that the step had. The
    /// first call measures this machine's rates; where that fails nothing is set.
    pub fn record(&mut self, metrics: &mut Metrics, rows: &Rows, interrupt: &Interrupt) {
        let Some(planned) = self.seconds(rows, interrupt) else { return };
        metrics
            .set("perf/planned_generation_s", planned.generate)
            .set("perf/planned_make_experience_s", planned.score)
            .set("perf/planned_ppo_train_s", planned.train)
            .set("perf/planned_step_s", planned.step);
    }

    fn seconds(&mut self, rows: &Rows, interrupt: &Interrupt) -> Option<StepSeconds> {
        self.cluster.as_ref()?;
        let count = rows.num_rows() as f64;
        let tokens = rows.num_tokens() as f64 / count;
        let response = rows.num_own_tokens() / count;
        let longest = rows.own_lengths().max().double_value(&[]).max(1.0);
        let workload = Workload {
            mean_prompt_tokens: tokens - response,
            mean_response_tokens: response,
            max_response_tokens: longest as usize,
            ..self.workload.clone()
        };
        let rates = match self.rates {
            Some(rates) => rates,
            None => {
                let measured = self.measure(&workload, interrupt);
                if let Err(error) = measured.as_ref().map_err(Error::root) {
                    if !matches!(error, Error::Interrupted) {
                        tracing::warn!(%error, "rates are not measured");
                    }
                    self.cluster = None; // not tried again
                }
                *self.rates.insert(measured.ok()?)
            }
        };
        plan(self.cluster.as_ref()?, &workload, &self.constraints, &rates).ok().map(|plan| plan.seconds)
    }

    /// This machine's rates; the links of the cluster are set to what they are.
    fn measure(&mut self, workload: &Workload, interrupt: &Interrupt) -> echelon_core::Result<Rates> {
        let rates = calibration::measure(self.here, workload, (&self.folder, self.held), interrupt)?;
        let Some(cluster) = self.cluster.as_mut().filter(|_| self.here.train > 1) else { return Ok(rates) };
        let link = calibration::measure_link(self.here.train)?;
        cluster.nodes.iter_mut().for_each(|node| node.within = link);
        Ok(Rates { collective_fraction: 1.0, ..rates })
    }
}

/// How many workers of this host are at work in each phase, groups apart at the same time. Where others start them they may
/// be anywhere: one is measured.
fn here(workload: &Workload, layout: &Layout, started_elsewhere: bool) -> Here {
    let threads = match layout.num_workers {
        1 => tch::get_num_threads().max(1) as usize,
        several => threads_per_worker(available_threads(), several as u32),
    };
    let of = |work: Work| match started_elsewhere {
        true => 1,
        false => {
            let groups = layout.groups.iter().filter(|group| workload.passes(group.role, work).next().is_some());
            let workers: BTreeSet<usize> = groups.flat_map(|group| group.workers.iter().copied()).collect();
            workers.len().clamp(1, MOST_PROBES)
        }
    };
    Here { generate: of(Work::Generate), score: of(Work::Score), train: of(Work::Learn), threads }
}

/// Probes that run at once: what more workers take from each other shows with these.
const MOST_PROBES: usize = 8;
