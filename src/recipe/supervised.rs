//! The tables of the recipes of the `sft` and `reward` programs.

use std::path::{Path, PathBuf};

use echelon_core::compute::Compute;
use echelon_core::optimizer::Optimizer;
use echelon_placement::devices::Devices;
use echelon_schema::{MOST, ModelSource, Origins, above, at_least, between, choice, from_below, table};

use super::tables::Checkpoint;

table! {
    /// A supervised fine-tuning run: a causal language model learns completions.
    pub struct SftRecipe {
        inline origins: Origins;
        /// Names the run folder `runs/<name>/`. Default: the recipe's file name.
        pub name: String = String::new();
        /// Every random number of the run follows from it: data order, fresh weights.
        pub seed: u64 = 42, in at_least(0.0);
        /// The model that is trained.
        pub model: Model = Model::default();
        /// Text to learn.
        pub data: SftData = SftData::default();
        /// Length of the run, numbers and memory.
        pub train: SupervisedTrain = SupervisedTrain::default();
        /// What is saved to resume from.
        pub checkpoint: Checkpoint = Checkpoint::default();
        /// Which devices there are.
        pub placement: Devices = Devices::default();
    }
}

table! {
    /// A reward-model run: a score head learns which of two responses people prefer.
    pub struct RewardRecipe {
        inline origins: Origins;
        /// Names the run folder `runs/<name>/`. Default: the recipe's file name.
        pub name: String = String::new();
        /// Every random number of the run follows from it: data order, fresh weights.
        pub seed: u64 = 42, in at_least(0.0);
        /// The model that is trained; a causal language model gets a fresh score head.
        pub model: Model = Model { optimizer: Optimizer { lr: 9e-6, ..Optimizer::default() }, ..Model::default() };
        /// Pairs to learn from.
        pub data: PairData = PairData::default();
        /// Length of the run, numbers and memory.
        pub train: SupervisedTrain = SupervisedTrain::default();
        /// What is saved to resume from.
        pub checkpoint: Checkpoint = Checkpoint::default();
        /// Which devices there are.
        pub placement: Devices = Devices::default();
    }
}

table! {
    /// The model that is trained.
    pub struct Model {
        /// Hugging Face folder, or hub id `owner/name`. With `init = "random"` a folder with `config.json` and tokenizer is enough.
        pub model: ModelSource;
        /// Folder with the model's `config.json`, enough for `--plan` where the weights are not at hand.
        pub shape: Option<PathBuf> = None;
        /// Where the weights start.
        pub init: Init = Init::Pretrained;
        /// AdamW.
        pub optimizer: Optimizer = Optimizer { lr: 5e-6, ..Optimizer::default() };
    }
}

choice! {
    /// Where the weights start.
    pub enum Init {
        /// From the model's files.
        Pretrained = "pretrained",
        /// Drawn from the seed.
        Random = "random",
    }
}

table! {
    /// Text to learn. A row is chat (`messages_key`), a prompt with its completion, or plain text, by the keys it has.
    pub struct SftData {
        /// File or folder of jsonl, json or parquet.
        pub train: Option<PathBuf> = None;
        /// Held-out rows. Default: the part `eval_fraction` of the training rows.
        pub eval: Option<PathBuf> = None;
        /// Part of the training rows held out when there is no `eval`.
        pub eval_fraction: f64 = 0.0, in from_below(0.0, 1.0);
        /// Key of a row's chat messages.
        pub messages_key: String = String::from("messages");
        /// Key of a row's prompt.
        pub prompt_key: String = String::from("prompt");
        /// Key of a row's completion.
        pub completion_key: String = String::from("completion");
        /// Key of a row's plain text.
        pub text_key: String = String::from("text");
        /// Wrap prompt and completion in the model's chat template; chat rows always are.
        pub apply_chat_template: bool = false;
        /// Learn only the assistant's messages and the completions, not the prompts.
        pub completion_only: bool = true;
        /// Use the first so many rows.
        pub max_samples: Option<usize> = None, in at_least(1.0);
        /// Several sources, drawn from by weight.
        pub mix: Vec<TrainMix> = Vec::new();
    }
}

table! {
    /// Pairs to learn from.
    pub struct PairData {
        /// File or folder of jsonl, json or parquet.
        pub train: Option<PathBuf> = None;
        /// Held-out rows. Default: the part `eval_fraction` of the training rows.
        pub eval: Option<PathBuf> = None;
        /// Part of the training rows held out when there is no `eval`.
        pub eval_fraction: f64 = 0.0, in from_below(0.0, 1.0);
        /// Key of a row's prompt; a row without it has whole dialogues as chosen and rejected.
        pub prompt_key: String = String::from("prompt");
        /// Key of the preferred response.
        pub chosen_key: String = String::from("chosen");
        /// Key of the other response.
        pub rejected_key: String = String::from("rejected");
        /// Wrap prompt and responses in the model's chat template; lists of chat messages always are.
        pub apply_chat_template: bool = false;
        /// Use the first so many rows.
        pub max_samples: Option<usize> = None, in at_least(1.0);
        /// Several sources, drawn from by weight.
        pub mix: Vec<TrainMix> = Vec::new();
    }
}

table! {
    /// Each names one source.
    pub struct TrainMix {
        /// File or folder of jsonl, json or parquet.
        pub train: PathBuf;
        /// Share of this source among all, relative to the other weights.
        pub weight: f64 = 1.0, in above(0.0);
    }
}

table! {
    /// Length of the run, numbers and memory.
    pub struct SupervisedTrain {
        /// Passes over the training rows.
        pub epochs: usize = 1, in between(1.0, MOST);
        /// Optimizer steps, in place of `epochs`.
        pub steps: Option<usize> = None, in at_least(1.0);
        /// Rows (or pairs) per optimizer step.
        pub batch_size: usize = 128, in between(1.0, MOST);
        /// Rows with more tokens are left out, and counted.
        pub max_tokens: usize = 2048, in between(2.0, MOST);
        /// Evaluate every so many optimizer steps, beside before and after the run.
        pub eval_every_steps: Option<usize> = None, in at_least(1.0);
        inline_last compute: Compute;
    }
}

impl SupervisedTrain {
    /// Optimizer steps of a run over `num_rows` rows; the last batch of an epoch may be smaller.
    pub fn optimizer_steps(&self, num_rows: usize) -> usize {
        self.steps.unwrap_or(num_rows.div_ceil(self.batch_size).saturating_mul(self.epochs))
    }
}

/// Which files either kind of training data is in.
macro_rules! files_of {
    ($($Data:ident),*) => {
        $(impl $Data {
            /// Files to learn from, with their weights.
            pub fn files(&self) -> Vec<(&Path, f64)> {
                let mixed = self.mix.iter().map(|part| (part.train.as_path(), part.weight));
                self.train.iter().map(|path| (path.as_path(), 1.0)).chain(mixed).collect()
            }

            /// The file of held-out rows, or the part of the training rows that is held out.
            pub fn held_out(&self) -> (Option<&Path>, f64) {
                (self.eval.as_deref(), self.eval_fraction)
            }

            /// What the shared rules need: (single source given, number of mixed sources, held-out file given,
            /// `eval_fraction`).
            pub(super) fn sources(&self) -> (bool, usize, bool, f64) {
                (self.train.is_some(), self.mix.len(), self.eval.is_some(), self.eval_fraction)
            }
        })*
    };
}

files_of!(SftData, PairData);
