//! The data of a run: rows of tokens with named columns, and statistics as sums.

mod column;
mod divide;
mod rows;
mod stats;

pub use column::{Column, ColumnKind, Label, PerRow, PerToken, Ragged, RaggedValues, Text};
pub use divide::{Shares, deal, micro_batches};
pub(crate) use divide::{places, rows_of};
pub use rows::Rows;
pub use stats::{Histograms, Number, Report, Stats};

/// `[B, T]` log π(token | prefix) by the engine that sampled, f32; 0 off the own tokens.
pub const ROLLOUT_LOGPROBS: Column<PerToken> = Column::new("rollout_logprobs");
/// Prompts as text, after the chat template.
pub const PROMPTS: Column<Text> = Column::new("prompts");
/// Responses as text, without special tokens.
pub const RESPONSES: Column<Text> = Column::new("responses");
/// What a rule compares a response with.
pub const LABELS: Column<Label> = Column::new("labels");
/// `[B]` int64: rows of one prompt have the same.
pub const GROUPS: Column<PerRow> = Column::new("groups");
/// `[B]` bool: the response ended by its length limit, without an end-of-sequence token.
pub const TRUNCATED: Column<PerRow> = Column::new("truncated");
/// `[B]` int64: the version of the weights that sampled.
pub const POLICY_VERSION: Column<PerRow> = Column::new("policy_version");
