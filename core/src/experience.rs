//! A rollout plus everything an update needs.

use tch::Tensor;

use crate::error::{Error, Result};
use crate::rollout::{Rollout, Tokens};

/// Rows to learn from. B rows, T columns; column `t` belongs to token `t`.
#[derive(Debug)]
pub struct Experience {
    pub tokens: Tokens,
    /// `[B, T]` log π_old(a|s), by the trainer before this step.
    pub old_logprobs: Tensor,
    /// `[B, T]` log π_ref(a|s), for a KL term in the loss.
    pub ref_logprobs: Option<Tensor>,
    /// `[B, T]` V_old(s).
    pub values: Tensor,
    /// `[B, T]` whitened.
    pub advantages: Tensor,
    /// `[B, T]` advantage + value, before whitening.
    pub returns: Tensor,
}

impl Experience {
    /// # Errors
    /// [`Error::Shape`] when a per-token tensor does not cover the rollout.
    pub fn new(
        rollout: &Rollout,
        old_logprobs: Tensor,
        ref_logprobs: Option<Tensor>,
        values: Tensor,
        advantages: Tensor,
        returns: Tensor,
    ) -> Result<Experience> {
        let tokens = rollout.tokens();
        let expected = tokens.token_ids.size();
        let named =
            [("old_logprobs", &old_logprobs), ("values", &values), ("advantages", &advantages), ("returns", &returns)];
        for (what, tensor) in named.into_iter().chain(ref_logprobs.as_ref().map(|t| ("ref_logprobs", t))) {
            if tensor.size() != expected {
                return Err(Error::Shape { what, expected, found: tensor.size() });
            }
        }
        Ok(Experience { tokens, old_logprobs, ref_logprobs, values, advantages, returns })
    }

    pub fn num_rows(&self) -> usize {
        self.tokens.num_rows()
    }

    /// Response tokens in all rows: what a mini-batch's losses are divided by.
    pub fn num_response_tokens(&self) -> f64 {
        self.tokens.mask.sum(tch::Kind::Double).double_value(&[])
    }

    /// Another handle of the same rows.
    pub fn shallow_clone(&self) -> Experience {
        self.map(Tensor::shallow_clone, self.tokens.shallow_clone())
    }

    pub fn to_device(&self, device: tch::Device) -> Experience {
        self.map(|tensor| tensor.to_device(device), self.tokens.to_device(device))
    }

    fn map(&self, of: impl Fn(&Tensor) -> Tensor, tokens: Tokens) -> Experience {
        Experience {
            tokens,
            old_logprobs: of(&self.old_logprobs),
            ref_logprobs: self.ref_logprobs.as_ref().map(&of),
            values: of(&self.values),
            advantages: of(&self.advantages),
            returns: of(&self.returns),
        }
    }

    /// The rows at `indices`, cut to the longest of them.
    pub fn select(&self, indices: &[i64]) -> Experience {
        let tokens = self.tokens.select(indices);
        let width = tokens.token_ids.size()[1];
        let rows = Tensor::from_slice(indices);
        self.map(|tensor| tensor.index_select(0, &rows).narrow(1, 0, width), tokens)
    }
}
