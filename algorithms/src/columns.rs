//! What algorithms know of rows, by name. Column `t` of what is known per token belongs to token `t`.

use echelon_core::data::{Column, PerRow, PerToken};

/// `[B, T]` log π_old(token | prefix), by the trainer before the step's first update.
pub const OLD_LOGPROBS: Column<PerToken> = Column::new("old_logprobs");
/// `[B, T]` log π_ref(token | prefix).
pub const REF_LOGPROBS: Column<PerToken> = Column::new("ref_logprobs");
/// `[B, T]` V_old(prefix).
pub const VALUES: Column<PerToken> = Column::new("values");
/// `[B, T]` whitened.
pub const ADVANTAGES: Column<PerToken> = Column::new("advantages");
/// `[B, T]` advantage + value, before whitening.
pub const RETURNS: Column<PerToken> = Column::new("returns");
/// `[B]` f64: scores as their source gave them.
pub const SCORES: Column<PerRow> = Column::new("scores");
/// `[B]` f64: the same after normalisation, penalty and clipping: what the policy learns from.
pub const SHAPED_SCORES: Column<PerRow> = Column::new("shaped_scores");
/// `[B, T]` the score at the last own token, and the KL's part.
pub const REWARDS: Column<PerToken> = Column::new("rewards");
/// `[B, T]` estimate of the KL to the reference.
pub const KL: Column<PerToken> = Column::new("kl");
