//! Logits to tokens: temperature, then top-k, then top-p, then min-p, then the inverse of the distribution function.
//!
//! The cuts mean what they mean in transformers (whose order this is) and vLLM, on p = softmax(logits / temperature):
//! - top-k keeps the tokens at least as likely as the k-th most likely one;
//! - top-p keeps, of what top-k left and renormalised, each token before which (by falling probability, equal ones by id)
//!   less than `top_p` has been collected: the smallest set that reaches it, the most likely token always;
//! - min-p keeps the tokens at least `min_p` times as likely as the most likely one.
//!
//! One uniform number per (seed, prompt, sample, position) picks the token whose interval holds it, tokens in order of
//! their ids. Probabilities are summed as integers, in units of 2^-52: exact in any order, so that the same numbers give
//! the same token on every device, and a token without probability is never drawn.
//!
//! Where ranks share a model, each has its part of the vocabulary's logits. The sums of the parts tell every rank in whose
//! part a number falls; that rank says which token it is, and all take its word.

use echelon_core::random::{Domain, uniform};
use echelon_core::rollout::SamplingConfig;
use echelon_core::{Error, Result};
use echelon_models::tensor_parallel::VocabularySlice;
use tch::{Kind, Tensor};

/// Probability 1 in the integer sums.
const ONE: f64 = (1u64 << 52) as f64;

/// Draws tokens by one sampling configuration from one random stream.
#[derive(Clone, Debug)]
pub struct Sampler {
    temperature: f64,
    top_k: i64,
    top_p: f64,
    min_p: f64,
    seed: u64,
    domain: Domain,
}

/// Which number of the stream a token is drawn with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrawKey {
    pub prompt_id: u64,
    pub sample: u32,
    /// In the response, from 0.
    pub position: u32,
}

/// A token and its log-prob over the full vocabulary.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawn {
    pub token: i64,
    pub logprob: f32,
}

impl Sampler {
    /// # Errors
    /// A parameter out of its range.
    pub fn new(sampling: &SamplingConfig, seed: u64, evaluation: bool) -> Result<Sampler> {
        let SamplingConfig { temperature, top_k, top_p, min_p, .. } = *sampling;
        let checks = [
            ("temperature", temperature, temperature >= 0.0 && temperature.is_finite(), "0 (greedy) or above"),
            ("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", min_p, (0.0..=1.0).contains(&min_p), "between 0 and 1"),
        ];
        if let Some((name, value, _, range)) = checks.into_iter().find(|(_, _, valid, _)| !valid) {
            return Err(Error::Refused(format!("{name} is {value}: it must be {range}")));
        }
        let domain = if evaluation { Domain::Evaluation } else { Domain::Sampling };
        Ok(Sampler { temperature, top_k, top_p, min_p, seed, domain })
    }

    /// What logits are to be divided by: the temperature, 1 when greedy.
    pub fn logits_temperature(&self) -> f64 {
        if self.is_greedy() { 1.0 } else { self.temperature }
    }

    /// Draws one token per row of `[S, V]` logits, already divided by [`Sampler::logits_temperature`]: the columns of this
    /// rank's part of the vocabulary. Every rank gets the same tokens.
    ///
    /// # Errors
    /// Logits that are not finite; a rank that is gone or does not come.
    pub fn sample(&self, vocabulary: &VocabularySlice, logits: &Tensor, keys: &[DrawKey]) -> Result<Vec<Drawn>> {
        let logprobs = log_softmax(vocabulary, logits)?;
        let choice = match self.is_greedy() {
            true => most_likely(vocabulary, &logprobs)?,
            false => self.draw(vocabulary, &logprobs.exp(), keys)?,
        };
        let chosen = logprobs.gather(1, &choice.columns, false).to_kind(Kind::Double);
        // One transfer: f64 holds ids and log-probs exactly.
        let mut both = Tensor::cat(&[(choice.columns + vocabulary.start()).to_kind(Kind::Double), chosen], 1);
        if let Some(others) = &choice.others {
            let parts = vocabulary.tensor_parallel().gather("drawn tokens", &both.masked_fill(others, 0.0))?;
            both = parts.sum_dim_intlist(0, false, Kind::Double);
        }
        let both: Vec<f64> = Vec::try_from(both.flatten(0, -1))?;
        both.chunks_exact(2).map(|pair| Drawn { token: pair[0] as i64, logprob: pair[1] as f32 }).map(finite).collect()
    }

    fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Draws from `[S, V]` probabilities.
    fn draw(&self, vocabulary: &VocabularySlice, probabilities: &Tensor, keys: &[DrawKey]) -> Result<Choice> {
        let weights = (self.cut(vocabulary, probabilities)? * ONE).to_kind(Kind::Int64);
        let sums = weights.cumsum(-1, Kind::Int64);
        let last = sums.size()[1] - 1;
        // Below 1 by more than a rounding, so that the number stays below the total.
        let number = |key: &DrawKey| {
            uniform(self.seed, self.domain, key.prompt_id, key.sample, key.position).min(1.0 - f64::EPSILON)
        };
        let numbers: Vec<f64> = keys.iter().map(number).collect();
        let numbers = Tensor::from_slice(&numbers).to_device(sums.device()).unsqueeze(1);
        let own = sums.narrow(1, last, 1);
        // The clamp is for rows of NaN, which are refused once their log-prob is seen, and for targets of other ranks.
        let column = |target: &Tensor| target.searchsorted(&sums, false, true, "right", None::<Tensor>).clamp_max(last);
        if vocabulary.is_whole() {
            let targets = (numbers * own.to_kind(Kind::Double)).floor().to_kind(Kind::Int64);
            return Ok(Choice { columns: column(&targets), others: None });
        }
        let over_ranks = vocabulary.tensor_parallel();
        let totals = over_ranks.gather("probability of each part", &own)?;
        let before = totals.narrow(0, 0, over_ranks.rank() as i64).sum_dim_intlist(0, false, Kind::Int64);
        let total = totals.sum_dim_intlist(0, false, Kind::Int64).to_kind(Kind::Double);
        let targets = (numbers * total).floor().to_kind(Kind::Int64) - before;
        let others = targets.lt(0).logical_or(&targets.ge_tensor(&own));
        Ok(Choice { columns: column(&targets), others: Some(others) })
    }

    /// `[S, V]` probabilities with those of the tokens cut off set to 0; not renormalised.
    fn cut(&self, vocabulary: &VocabularySlice, probabilities: &Tensor) -> Result<Tensor> {
        let mut kept = probabilities.shallow_clone();
        if self.top_k > 0 && self.top_k < vocabulary.full() {
            let largest = largest(vocabulary, &kept, self.top_k)?;
            kept = zero_below(&kept, &largest.narrow(1, self.top_k - 1, 1));
        }
        if self.top_p < 1.0 {
            let whole = whole_vocabulary(vocabulary, &kept)?;
            kept = nucleus(&whole, self.top_p).narrow(1, vocabulary.start(), vocabulary.length());
        }
        if self.min_p > 0.0 {
            // The largest probability is never cut.
            kept = zero_below(&kept, &(largest(vocabulary, &kept, 1)? * self.min_p));
        }
        Ok(kept)
    }
}

/// What was drawn, by row.
struct Choice {
    /// `[S, 1]` columns of this rank's logits.
    columns: Tensor,
    /// `[S, 1]` true where the token is another rank's, and the column without meaning; None where there is no other.
    others: Option<Tensor>,
}

/// `[S, V]` log-probs over the full vocabulary, this rank's columns.
fn log_softmax(vocabulary: &VocabularySlice, logits: &Tensor) -> Result<Tensor> {
    if vocabulary.is_whole() {
        return Ok(logits.log_softmax(-1, None::<Kind>));
    }
    let parts = vocabulary.tensor_parallel().gather("log-sum-exp of each part", &logits.logsumexp(1, true))?;
    let log_sum_exp = parts.logsumexp(0, false);
    // Seen by all ranks in the same bits: they refuse together.
    if !bool::try_from(log_sum_exp.isfinite().all())? {
        return Err(not_finite());
    }
    Ok(logits - log_sum_exp)
}

/// The largest of each row.
fn most_likely(vocabulary: &VocabularySlice, logprobs: &Tensor) -> Result<Choice> {
    if vocabulary.is_whole() {
        return Ok(Choice { columns: logprobs.argmax(-1, true), others: None });
    }
    let (largest, columns) = logprobs.max_dim(-1, true);
    let over_ranks = vocabulary.tensor_parallel();
    let winner = over_ranks.gather("most likely of each part", &largest)?.argmax(0, false);
    Ok(Choice { columns, others: Some(winner.ne(over_ranks.rank() as i64)) })
}

/// `[S, count]` largest values of the vocabulary, falling; 0 where there are not as many.
fn largest(vocabulary: &VocabularySlice, values: &Tensor, count: i64) -> Result<Tensor> {
    let here = count.min(vocabulary.length());
    let (largest, _) = values.topk(here, -1, true, true);
    if vocabulary.is_whole() {
        return Ok(largest);
    }
    let parts =
        vocabulary.tensor_parallel().gather("largest of each part", &largest.constant_pad_nd([0, count - here]))?;
    let (largest, _) = parts.transpose(0, 1).reshape([values.size()[0], -1]).topk(count, -1, true, true);
    Ok(largest)
}

/// `[S, V]` values of the whole vocabulary on every rank.
fn whole_vocabulary(vocabulary: &VocabularySlice, values: &Tensor) -> Result<Tensor> {
    if vocabulary.is_whole() {
        return Ok(values.shallow_clone());
    }
    // All parts but the last are of one length.
    let over_ranks = vocabulary.tensor_parallel();
    let longest = (vocabulary.full() + over_ranks.size() as i64 - 1) / over_ranks.size() as i64;
    let padded = values.constant_pad_nd([0, longest - vocabulary.length()]);
    let parts = over_ranks.gather("probabilities of each part", &padded)?;
    Ok(parts.transpose(0, 1).reshape([values.size()[0], -1]).narrow(1, 0, vocabulary.full()))
}

/// Sets what is below the row's bound `[S, 1]` to 0.
fn zero_below(values: &Tensor, bound: &Tensor) -> Tensor {
    values.masked_fill(&values.lt_tensor(bound), 0.0)
}

/// Top-p on `[S, V]` weights that need not sum to 1.
fn nucleus(weights: &Tensor, top_p: f64) -> Tensor {
    let (sorted, order) = weights.sort_stable(true, -1, true);
    let sums = sorted.cumsum(-1, Kind::Double);
    let total = sums.narrow(1, sums.size()[1] - 1, 1);
    let before = &sums - sorted.to_kind(Kind::Double);
    let cut = before.ge_tensor(&(total * top_p));
    let _ = cut.narrow(1, 0, 1).fill_(0);
    weights.zeros_like().scatter(1, &order, &sorted.masked_fill(&cut, 0.0))
}

fn finite(drawn: Drawn) -> Result<Drawn> {
    if drawn.logprob.is_finite() { Ok(drawn) } else { Err(not_finite()) }
}

fn not_finite() -> Error {
    Error::Refused("the policy's logits are not finite: its weights are damaged or training has diverged".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f64, top_k: i64, top_p: f64, min_p: f64) -> SamplingConfig {
        SamplingConfig { temperature, top_k, top_p, min_p, max_new_tokens: 1, stop: vec![], ignore_eos: false }
    }

    fn sampler(top_k: i64, top_p: f64, min_p: f64) -> Sampler {
        Sampler::new(&sampling(1.0, top_k, top_p, min_p), 1, false).unwrap()
    }

    fn whole(size: i64) -> VocabularySlice {
        VocabularySlice::whole(size)
    }

    fn keys(count: u64) -> Vec<DrawKey> {
        (0..count).map(|prompt_id| DrawKey { prompt_id, sample: 0, position: 0 }).collect()
    }

    /// Probabilities of a row, some of them equal, some of them 0.
    fn row(seed: u64, vocab_size: u64) -> Vec<f64> {
        let raw = |i| (uniform(seed, Domain::Data, i, 0, 0) * 12.0).floor().powi(3);
        let raw: Vec<f64> = (0..vocab_size).map(raw).collect();
        let total: f64 = raw.iter().sum();
        raw.iter().map(|x| x / total).collect()
    }

    /// The module's definition, token by token.
    fn obvious_cut(p: &[f64], top_k: i64, top_p: f64, min_p: f64) -> Vec<bool> {
        let mut order: Vec<usize> = (0..p.len()).collect();
        order.sort_by(|&a, &b| p[b].total_cmp(&p[a]).then(a.cmp(&b)));
        let mut kept = vec![true; p.len()];
        if top_k > 0 && (top_k as usize) < p.len() {
            let kth = p[order[top_k as usize - 1]];
            (0..p.len()).for_each(|i| kept[i] = p[i] >= kth);
        }
        let total: f64 = (0..p.len()).filter(|&i| kept[i]).map(|i| p[i]).sum();
        let mut collected = 0.0;
        for (rank, &i) in order.iter().enumerate().filter(|&(_, &i)| kept[i]).collect::<Vec<_>>() {
            kept[i] = top_p >= 1.0 || rank == 0 || collected < top_p * total;
            collected += p[i];
        }
        (0..p.len()).map(|i| kept[i] && p[i] > 0.0 && p[i] >= min_p * p[order[0]]).collect()
    }

    #[test]
    fn cuts_equal_the_obvious_loop() {
        for (top_k, top_p, min_p) in [
            (0, 1.0, 0.0),
            (5, 1.0, 0.0),
            (0, 0.7, 0.0),
            (0, 1.0, 0.2),
            (12, 0.8, 0.05),
            (1, 1.0, 0.0),
            (0, 1e-9, 0.0),
            (99, 0.5, 1.0),
        ] {
            for seed in 0..40 {
                let p = row(seed, 60);
                let cut = sampler(top_k, top_p, min_p).cut(&whole(60), &Tensor::from_slice(&p).unsqueeze(0)).unwrap();
                let cut: Vec<f64> = Vec::try_from(cut.squeeze_dim(0)).unwrap();
                let expected = obvious_cut(&p, top_k, top_p, min_p);
                for i in 0..p.len() {
                    let value = if expected[i] { p[i] } else { 0.0 };
                    assert_eq!(cut[i], value, "token {i}, seed {seed}, {top_k} {top_p} {min_p}");
                }
            }
        }
    }

    #[test]
    fn a_draw_is_the_inverse_of_the_distribution_function() {
        let p = row(3, 40);
        let logits = Tensor::from_slice(&p).log().unsqueeze(0).expand([500, 40], true);
        let drawn = sampler(0, 1.0, 0.0).sample(&whole(40), &logits, &keys(500)).unwrap();
        for (key, drawn) in keys(500).iter().zip(drawn) {
            let number = uniform(1, Domain::Sampling, key.prompt_id, 0, 0);
            let mut sum = 0.0;
            let expected = p.iter().position(|p| {
                sum += p;
                sum > number
            });
            assert_eq!(drawn.token as usize, expected.unwrap());
            assert!((f64::from(drawn.logprob) - p[drawn.token as usize].ln()).abs() < 1e-6);
        }
    }

    #[test]
    fn a_token_without_probability_is_never_drawn() {
        let logits = Tensor::full([2000, 9], f64::NEG_INFINITY, (Kind::Float, tch::Device::Cpu));
        let _ = logits.narrow(1, 3, 1).fill_(0.0);
        let _ = logits.narrow(1, 5, 1).fill_(-1.0);
        let drawn = sampler(0, 1.0, 0.0).sample(&whole(9), &logits, &keys(2000)).unwrap();
        assert!(drawn.iter().all(|drawn| [3, 5].contains(&drawn.token)));
        assert!(drawn.iter().any(|drawn| drawn.token == 5));
    }

    #[test]
    fn greedy_takes_the_most_likely_and_knows_its_logprob_at_temperature_one() {
        let sampler = Sampler::new(&sampling(0.0, 0, 1.0, 0.0), 1, false).unwrap();
        assert_eq!(sampler.logits_temperature(), 1.0);
        let drawn = sampler.sample(&whole(3), &Tensor::from_slice(&[0.0, 2.0, 1.0]).unsqueeze(0), &keys(1)).unwrap()[0];
        let expected = 2.0 - (0f64.exp() + 2f64.exp() + 1f64.exp()).ln();
        assert_eq!(drawn.token, 1);
        assert!((f64::from(drawn.logprob) - expected).abs() < 1e-6);
    }

    #[test]
    fn evaluation_has_a_stream_of_its_own() {
        let logits = Tensor::zeros([50, 1000], (Kind::Float, tch::Device::Cpu));
        let draw = |evaluation| {
            let sampler = Sampler::new(&sampling(1.0, 0, 1.0, 0.0), 1, evaluation).unwrap();
            sampler.sample(&whole(1000), &logits, &keys(50)).unwrap()
        };
        assert_eq!(draw(false), draw(false));
        assert_ne!(draw(false), draw(true));
    }

    #[test]
    fn logits_that_are_not_finite_are_refused() {
        for (temperature, bad) in [(1.0, f64::NAN), (0.0, f64::NAN), (1.0, f64::INFINITY)] {
            let sampler = Sampler::new(&sampling(temperature, 0, 1.0, 0.0), 1, false).unwrap();
            let logits = Tensor::from_slice(&[0.0, bad, 1.0]).unsqueeze(0);
            assert!(sampler.sample(&whole(3), &logits, &keys(1)).unwrap_err().to_string().contains("not finite"));
        }
    }

    #[test]
    fn parameters_out_of_range_are_refused_by_name() {
        for (sampling, name) in [
            (sampling(-0.1, 0, 1.0, 0.0), "temperature"),
            (sampling(f64::NAN, 0, 1.0, 0.0), "temperature"),
            (sampling(1.0, 0, 0.0, 0.0), "top_p"),
            (sampling(1.0, 0, 1.5, 0.0), "top_p"),
            (sampling(1.0, 0, 1.0, -0.5), "min_p"),
        ] {
            let message = Sampler::new(&sampling, 1, false).unwrap_err().to_string();
            assert!(message.starts_with(name), "{message}");
        }
    }
}
