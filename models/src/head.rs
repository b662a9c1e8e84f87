//! What reads the last hidden states: log-probs over a vocabulary in chunks, or one number per row.

use echelon_core::pack::PackedRows;
use echelon_core::zero::{Head, ParamWithGrad, PolicyOutput, ScalarValues};
use echelon_core::{Error, Result};
use tch::{Kind, Tensor};

/// Logits held at once: 2^24 numbers, 64 MB in f32, whatever the vocabulary and the sequence length.
const CHUNK_LOGITS: i64 = 1 << 24;

/// Log-probs (and entropy) of the wanted tokens, a chunk of rows at a time, so that memory does not grow with
/// vocabulary × sequence. The forward pass keeps each row's log-sum-exp; the backward pass makes a chunk's logits again
/// and applies the analytic gradient.
#[derive(Debug)]
pub struct LogprobHead {
    /// `[V, H]`, with its gradient where it is trained.
    weight: Tensor,
    grad: Option<Tensor>,
    temperature: f64,
}

/// Per-token outputs in `[b, T]` rows, 0 where nothing is wanted.
#[derive(Debug)]
pub struct LogprobOutput {
    /// `[b, T]` log-softmax(logits / temperature) of the row's own tokens.
    pub logprobs: Tensor,
    /// `[b, T]` entropy of the full distribution; only when learning.
    pub entropy: Option<Tensor>,
    leaves: Option<LogprobLeaves>,
}

#[derive(Debug)]
struct LogprobLeaves {
    logprobs: Tensor,
    entropy: Tensor,
    log_sum_exp: Tensor,
}

impl LogprobHead {
    /// A frozen head.
    pub fn frozen(weight: Tensor, temperature: f64) -> LogprobHead {
        LogprobHead { weight, grad: None, temperature }
    }

    pub fn trained(param: ParamWithGrad, temperature: f64) -> LogprobHead {
        LogprobHead { weight: param.weight, grad: Some(param.grad), temperature }
    }

    /// `[V, H]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// `[r, V]` logits / temperature, in f32 (f64 stays f64), of `[r, H]`.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        let logits = hidden.linear(&self.weight.detach(), None::<&Tensor>);
        let mut wide = if logits.kind() == Kind::Double { logits } else { logits.to_kind(Kind::Float) };
        if self.temperature != 1.0 {
            let _ = wide.divide_scalar_(self.temperature);
        }
        wide
    }

    fn chunk_rows(&self) -> i64 {
        (CHUNK_LOGITS / self.weight.size()[0]).max(1)
    }

    /// log-probs, entropy and log-sum-exp, `[R]` each.
    fn in_chunks(&self, hidden: &Tensor, targets: &Tensor, with_entropy: bool) -> [Tensor; 3] {
        let kind = if hidden.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let rows = hidden.size()[0];
        let [logprobs, entropy, log_sum_exp] = [(); 3].map(|()| Tensor::zeros([rows], (kind, hidden.device())));
        for start in (0..rows).step_by(self.chunk_rows() as usize) {
            let length = self.chunk_rows().min(rows - start);
            let part = |x: &Tensor| x.narrow(0, start, length);
            let mut logits = self.logits(&part(hidden));
            let chosen = logits.gather(1, &part(targets).unsqueeze(1), false).squeeze_dim(1);
            let lse = logits.logsumexp(1, false);
            part(&logprobs).copy_(&(chosen - &lse));
            part(&log_sum_exp).copy_(&lse);
            if with_entropy {
                let _ = logits.g_sub_(&lse.unsqueeze(1));
                let negative = (logits.exp() * &logits).sum_dim_intlist(1, false, None::<Kind>);
                part(&entropy).copy_(&negative.neg());
            }
        }
        [logprobs, entropy, log_sum_exp]
    }
}

impl Head for LogprobHead {
    type Output = LogprobOutput;

    fn rows(&self, batch: &PackedRows) -> Tensor {
        batch.predecessors.shallow_clone()
    }

    fn forward(&self, hidden: &Tensor, batch: &PackedRows, leaves: bool) -> Result<LogprobOutput> {
        let [logprobs, entropy, log_sum_exp] = tch::no_grad(|| self.in_chunks(hidden, &batch.targets, leaves));
        if !leaves {
            return Ok(LogprobOutput { logprobs: batch.to_rows(&logprobs), entropy: None, leaves: None });
        }
        let (logprobs, entropy) = (logprobs.set_requires_grad(true), entropy.set_requires_grad(true));
        Ok(LogprobOutput {
            logprobs: batch.to_rows(&logprobs),
            entropy: Some(batch.to_rows(&entropy)),
            leaves: Some(LogprobLeaves { logprobs, entropy, log_sum_exp }),
        })
    }

    /// With z = logits / temperature, p = softmax z and H its entropy:
    /// ∂logprob/∂z = onehot − p and ∂H/∂z = −p (log p + H).
    fn backward(&self, hidden: &Tensor, batch: &PackedRows, output: &LogprobOutput) -> Result<Tensor> {
        let (Some(leaves), Some(grad)) = (&output.leaves, &self.grad) else {
            return Err(Error::Refused("backward through a frozen head".into()));
        };
        let gradient = hidden.zeros_like();
        let of_logprobs = defined_or_zeros(&leaves.logprobs);
        let of_entropy = leaves.entropy.grad();
        let mut grad = grad.shallow_clone();
        let rows = hidden.size()[0];
        for start in (0..rows).step_by(self.chunk_rows() as usize) {
            let length = self.chunk_rows().min(rows - start);
            let part = |x: &Tensor| x.narrow(0, start, length);
            let column = |x: &Tensor| part(x).unsqueeze(1);
            let mut log_p = self.logits(&part(hidden));
            let _ = log_p.g_sub_(&column(&leaves.log_sum_exp));
            let p = log_p.exp();
            let mut slope = &p * column(&of_logprobs).neg();
            let _ = slope.scatter_add_(1, &column(&batch.targets), &column(&of_logprobs));
            if of_entropy.defined() {
                let _ = log_p.g_add_(&column(&leaves.entropy.detach()));
                slope -= p * log_p * column(&of_entropy);
            }
            if self.temperature != 1.0 {
                let _ = slope.divide_scalar_(self.temperature);
            }
            let slope = slope.to_kind(hidden.kind());
            part(&gradient).copy_(&slope.matmul(&self.weight.detach()));
            if grad.kind() == hidden.kind() {
                let _ = grad.addmm_(&slope.tr(), &part(hidden));
            } else {
                let _ = grad.g_add_(&slope.tr().matmul(&part(hidden)).to_kind(grad.kind()));
            }
        }
        Ok(gradient)
    }
}

/// Where a scalar head reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScalarRows {
    /// Before each wanted token: the critic's V(prefix), `[b, T]`.
    Predecessors,
    /// At each row's last token, by its length: a reward model's score, `[b]`.
    LastTokens,
}

/// One number per hidden state: `score.weight` `[1, H]`, no bias.
#[derive(Debug)]
pub struct ScalarHead {
    weight: Tensor,
    grad: Option<Tensor>,
    reads: ScalarRows,
}

/// Values `[b, T]` or scores `[b]`.
#[derive(Debug)]
pub struct ScalarOutput {
    pub values: Tensor,
    leaf: Tensor,
}

impl ScalarHead {
    pub fn frozen(weight: Tensor, reads: ScalarRows) -> ScalarHead {
        ScalarHead { weight, grad: None, reads }
    }

    pub fn trained(param: ParamWithGrad, reads: ScalarRows) -> ScalarHead {
        ScalarHead { weight: param.weight, grad: Some(param.grad), reads }
    }
}

impl Head for ScalarHead {
    type Output = ScalarOutput;

    fn rows(&self, batch: &PackedRows) -> Tensor {
        match self.reads {
            ScalarRows::Predecessors => batch.predecessors.shallow_clone(),
            ScalarRows::LastTokens => batch.last_tokens.shallow_clone(),
        }
    }

    fn forward(&self, hidden: &Tensor, batch: &PackedRows, leaves: bool) -> Result<ScalarOutput> {
        let read = tch::no_grad(|| hidden.matmul(&self.weight.detach().tr()).squeeze_dim(1));
        let wide = if read.kind() == Kind::Double { read } else { read.to_kind(Kind::Float) };
        let leaf = wide.set_requires_grad(leaves);
        let values = match self.reads {
            ScalarRows::Predecessors => batch.to_rows(&leaf),
            ScalarRows::LastTokens => leaf.shallow_clone(),
        };
        Ok(ScalarOutput { values, leaf })
    }

    fn backward(&self, hidden: &Tensor, _batch: &PackedRows, output: &ScalarOutput) -> Result<Tensor> {
        let Some(grad) = &self.grad else { return Err(Error::Refused("backward through a frozen head".into())) };
        let slope = defined_or_zeros(&output.leaf).to_kind(hidden.kind()).unsqueeze(1);
        let _ = grad.shallow_clone().g_add_(&slope.tr().matmul(hidden).to_kind(grad.kind()));
        Ok(slope.matmul(&self.weight.detach()))
    }
}

impl PolicyOutput for LogprobOutput {
    fn logprobs(&self) -> &Tensor {
        &self.logprobs
    }
    fn entropy(&self) -> Option<&Tensor> {
        self.entropy.as_ref()
    }
}

impl ScalarValues for ScalarOutput {
    fn values(&self) -> &Tensor {
        &self.values
    }
}

fn defined_or_zeros(leaf: &Tensor) -> Tensor {
    let grad = leaf.grad();
    if grad.defined() { grad } else { leaf.detach().zeros_like() }
}
