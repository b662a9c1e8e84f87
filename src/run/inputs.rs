//! What a run is made of, as the recipe of its program gives it.

use std::path::Path;
use std::sync::Arc;

use echelon_algorithms::Algorithm;
use echelon_models::tokenizer::Tokenizer;

use super::feed::Feed;
use super::memory::MemoryLedger;
use super::metrics::Work;
use crate::checkpoint::Resumed;
use crate::forecast::Forecast;
use crate::program::{Arguments, Failure, PlanFormat};
use crate::recipe::{Checkpoint, Devices, Root};
use crate::run_spec::RunSpec;
use crate::wire::Rewards;
use echelon_roles::models::Held;

/// A recipe of one of the programs, with nothing left to decide.
pub trait Program: Sized {
    type Algorithm: Algorithm;
    /// As a person writes it.
    type Written: Root;

    /// # Errors
    /// Everything wrong with it; for `--plan`, files that it names need not exist.
    fn read(arguments: &Arguments) -> Result<Self, Failure>;
    fn name(&self) -> &str;
    /// What `recipe.resolved.toml` holds.
    fn text(&self) -> String;
    fn devices(&self) -> &Devices;
    fn devices_mut(&mut self) -> &mut Devices;
    fn checkpoint(&self) -> &Checkpoint;
    /// `--plan`.
    ///
    /// # Errors
    /// A plan that is refused.
    fn print_plan(&self, format: PlanFormat) -> Result<(), Failure>;
    /// Reads and decides everything before a worker is started; no weight is read yet.
    ///
    /// # Errors
    /// [`Failure::Input`]: models, data or devices that cannot be used.
    fn inputs(&self, resumed: &Resumed, run_folder: &Path) -> Result<Inputs<Self::Algorithm>, Failure>;
}

/// What a run reads and decides before its workers start.
pub struct Inputs<A> {
    pub algorithm: A,
    pub feed: Feed,
    pub spec: RunSpec,
    pub tokenizer: Arc<Tokenizer>,
    pub held: Held,
    /// Where scores come from.
    pub rewards: Option<Rewards>,
    pub memory: Option<MemoryLedger>,
    pub forecast: Option<Forecast>,
    pub arithmetic: Option<Work>,
    /// Steps of the run.
    pub total: u64,
    /// How several workers were planned.
    pub plan: Option<String>,
    /// The first lines on the terminal.
    pub header: Vec<(&'static str, String)>,
    /// What a person should know before the run begins.
    pub notes: Vec<String>,
}
