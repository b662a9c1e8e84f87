//! What reads the last hidden states: log-probs over a vocabulary in chunks, or one number per row.

use echelon_core::loss::Output;
use echelon_core::memory::CHUNK_LOGITS;
use echelon_core::pack::PackedRows;
use echelon_core::zero::{Head, ParamWithGrad, Told};
use echelon_core::{Error, Result};
use tch::{Kind, Tensor};

use crate::tensor_parallel::VocabularySlice;

/// Log-probs (and entropy) of the wanted tokens, a chunk of rows at a time, so that memory does not grow with
/// vocabulary × sequence. The forward pass keeps each row's log-sum-exp; the backward pass makes a chunk's logits again
/// and applies the analytic gradient.
#[derive(Debug)]
pub struct LogprobHead {
    /// `[V, H]`; of a frozen head the rows of a rank's part of the vocabulary.
    weight: Tensor,
    /// Of a weight that is trained.
    grad: Option<Tensor>,
    vocabulary: VocabularySlice,
    temperature: f64,
    chunk_logits: i64,
}

/// Per-token outputs in `[b, T]` rows, 0 where nothing is wanted.
#[derive(Debug)]
pub struct LogprobOutput {
    /// `[b, T]` log-softmax(logits / temperature) of the row's own tokens (AR-8).
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
        let vocabulary = VocabularySlice::whole(weight.size()[0]);
        LogprobHead::sliced(weight, temperature, &vocabulary)
    }

    /// A frozen head of which this rank has the rows of its part of the vocabulary; each rank makes the logits of its part.
    ///
    /// # Panics
    /// A weight with another number of rows.
    pub fn sliced(weight: Tensor, temperature: f64, vocabulary: &VocabularySlice) -> LogprobHead {
        assert_eq!(weight.size()[0], vocabulary.length(), "the rows of {vocabulary:?}");
        LogprobHead {
            weight,
            grad: None,
            vocabulary: vocabulary.clone(),
            temperature,
            chunk_logits: CHUNK_LOGITS.into(),
        }
    }

    /// A head that a loss goes through; its weight may be frozen.
    pub fn trained(param: ParamWithGrad, temperature: f64) -> LogprobHead {
        LogprobHead { grad: param.grad, ..LogprobHead::frozen(param.weight, temperature) }
    }

    /// `[V, H]`, or this rank's rows of it.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// `[r, V]` logits / temperature (the columns of this rank), in f32 (f64 stays f64), of `[r, H]`.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        tempered(hidden.linear(&self.weight.detach(), None::<&Tensor>), self.temperature)
    }

    fn chunk_rows(&self) -> i64 {
        (self.chunk_logits / self.weight.size()[0]).max(1)
    }

    /// log-probs, entropy and log-sum-exp, `[R]` each; entropy only where one rank has the whole vocabulary.
    fn in_chunks(&self, hidden: &Tensor, targets: &Tensor, with_entropy: bool) -> Result<[Tensor; 3]> {
        let kind = if hidden.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let rows = hidden.size()[0];
        let foreign = (!self.vocabulary.is_whole()).then(|| self.vocabulary.own(targets));
        let targets = foreign.as_ref().map_or(targets, |(own, _)| own);
        let [chosen, entropy, log_sum_exp] = [(); 3].map(|()| Tensor::zeros([rows], (kind, hidden.device())));
        for start in (0..rows).step_by(self.chunk_rows() as usize) {
            let length = self.chunk_rows().min(rows - start);
            let part = |x: &Tensor| x.narrow(0, start, length);
            let mut logits = self.logits(&part(hidden));
            part(&chosen).copy_(&logits.gather(1, &part(targets).unsqueeze(1), false).squeeze_dim(1));
            let lse = logits.logsumexp(1, false);
            part(&log_sum_exp).copy_(&lse);
            if with_entropy {
                let _ = logits.g_sub_(&lse.unsqueeze(1));
                let negative = (logits.exp() * &logits).sum_dim_intlist(1, false, None::<Kind>);
                part(&entropy).copy_(&negative.neg());
            }
        }
        let chosen = foreign.map_or_else(|| chosen.shallow_clone(), |(_, others)| chosen.masked_fill(&others, 0.0));
        let (log_sum_exp, chosen) = self.vocabulary.joined("log-probs", log_sum_exp, chosen)?;
        Ok([chosen - &log_sum_exp, entropy, log_sum_exp])
    }
}

/// Logits / temperature, in f32 (f64 stays f64).
pub fn tempered(logits: Tensor, temperature: f64) -> Tensor {
    let mut wide = if logits.kind() == Kind::Double { logits } else { logits.to_kind(Kind::Float) };
    if temperature != 1.0 {
        let _ = wide.divide_scalar_(temperature);
    }
    wide
}

impl Head for LogprobHead {
    type Output = LogprobOutput;

    fn rows(&self, batch: &PackedRows) -> Tensor {
        batch.predecessors.shallow_clone()
    }

    fn forward(&self, hidden: &Tensor, batch: &PackedRows, leaves: bool) -> Result<LogprobOutput> {
        if leaves && !self.vocabulary.is_whole() {
            return Err(Error::Refused("a head whose vocabulary is divided among ranks does not learn".into()));
        }
        let [logprobs, entropy, log_sum_exp] = tch::no_grad(|| self.in_chunks(hidden, &batch.targets, leaves))?;
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
        let Some(leaves) = &output.leaves else {
            return Err(Error::Refused("backward through a frozen head".into()));
        };
        let gradient = hidden.zeros_like();
        let of_logprobs = defined_or_zeros(&leaves.logprobs);
        let of_entropy = leaves.entropy.grad();
        let mut grad = self.grad.as_ref().map(Tensor::shallow_clone);
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
            match &mut grad {
                Some(grad) if grad.kind() == hidden.kind() => drop(grad.addmm_(&slope.tr(), &part(hidden))),
                Some(grad) => drop(grad.g_add_(&slope.tr().matmul(&part(hidden)).to_kind(grad.kind()))),
                None => {}
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
        ScalarHead { weight: param.weight, grad: param.grad, reads }
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
        let slope = defined_or_zeros(&output.leaf).to_kind(hidden.kind()).unsqueeze(1);
        if let Some(grad) = &self.grad {
            let _ = grad.shallow_clone().g_add_(&slope.tr().matmul(hidden).to_kind(grad.kind()));
        }
        Ok(slope.matmul(&self.weight.detach()))
    }
}

impl Told for LogprobOutput {
    fn told(&self) -> Output<'_> {
        Output::Logprobs { logprobs: &self.logprobs, entropy: self.entropy.as_ref() }
    }
}

impl Told for ScalarOutput {
    fn told(&self) -> Output<'_> {
        Output::Scalars(&self.values)
    }
}

fn defined_or_zeros(leaf: &Tensor) -> Tensor {
    let grad = leaf.grad();
    if grad.defined() { grad } else { leaf.detach().zeros_like() }
}

#[cfg(test)]
mod tests {
    use echelon_core::data::Rows;
    use tch::Device;

    use super::*;

    /// Random f64 numbers that are the same every time.
    fn numbers(size: &[i64], seed: f64) -> Tensor {
        let count: i64 = size.iter().product();
        let index = Tensor::arange(count, tch::kind::DOUBLE_CPU);
        ((index + seed) * 12.9898).sin().view(size)
    }

    fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).abs().max().double_value(&[])
    }

    /// Against log_softmax under plain autograd, for chunks of one row, of three, and one chunk for all.
    #[test]
    fn gradients_of_logprobs_and_entropy_equal_autograds() {
        let (vocabulary, width) = (19, 8);
        let row =
            |length: i64| ((0..length).map(|t| (t * 7) % vocabulary).collect(), (0..length).map(|t| t > 1).collect());
        let batch = PackedRows::new(&Rows::of_tokens(&[row(6), row(3), row(5)]), Device::Cpu);
        let rows = batch.targets.size()[0];
        let (hidden, weight) = (numbers(&[rows, width], 0.3), numbers(&[vocabulary, width], 0.7));
        let (of_logprobs, of_entropy) = (numbers(&[rows], 1.1), numbers(&[rows], 2.2));
        for temperature in [1.0, 0.7] {
            let leaves = [&hidden, &weight].map(|tensor| tensor.copy().set_requires_grad(true));
            let log_p = (leaves[0].matmul(&leaves[1].tr()) / temperature).log_softmax(-1, Kind::Double);
            let logprobs = log_p.gather(1, &batch.targets.unsqueeze(1), false).squeeze_dim(1);
            let entropy = -(log_p.exp() * &log_p).sum_dim_intlist(1, false, Kind::Double);
            (&logprobs * &of_logprobs + &entropy * &of_entropy).sum(Kind::Double).backward();

            for chunk_logits in [1, 3 * vocabulary, CHUNK_LOGITS.into()] {
                let grad = weight.zeros_like();
                let param = ParamWithGrad { weight: weight.copy(), grad: Some(grad.shallow_clone()) };
                let head = LogprobHead { chunk_logits, ..LogprobHead::trained(param, temperature) };
                let output = head.forward(&hidden, &batch, true).unwrap();
                let found = [&output.logprobs, output.entropy.as_ref().unwrap()]
                    .map(|rows| rows.flatten(0, -1).index_select(0, &batch.columns));
                assert!(
                    largest_difference(&found[0], &logprobs) < 1e-12 && largest_difference(&found[1], &entropy) < 1e-12
                );
                (&found[0] * &of_logprobs + &found[1] * &of_entropy).sum(Kind::Double).backward();
                let of_hidden = tch::no_grad(|| head.backward(&hidden, &batch, &output)).unwrap();
                assert!(largest_difference(&of_hidden, &leaves[0].grad()) < 1e-10, "hidden, chunks of {chunk_logits}");
                assert!(largest_difference(&grad, &leaves[1].grad()) < 1e-10, "weight, chunks of {chunk_logits}");
            }
        }
    }
}
