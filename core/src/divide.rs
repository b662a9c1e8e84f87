//! How each verb goes over the data-parallel ranks of a group: which rows each rank gets, and how the answers become one.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::rollout::{GenerationReport, Prompts, Rollout, Tokens};
use crate::verb::*;

/// The rows of each rank, by index into the request's rows, in rising order.
pub type Shares = Vec<Vec<i64>>;

/// A verb that several ranks answer together.
pub trait Divide: Verb + Sized {
    /// One request per rank, and whose rows are whose. A rank may get none.
    fn divide(self, ranks: usize) -> (Vec<Self>, Shares);
    /// The same request, for the tensor-parallel neighbour of a rank.
    fn again(&self) -> Self;
    /// One answer of the ranks' answers, rows in the order of the request.
    ///
    /// # Errors
    /// Answers that contradict each other.
    fn unite(replies: Vec<Self::Reply>, shares: &Shares) -> Result<Self::Reply>;
}

/// Deals rows so that ranks get about as many tokens: the longest first, each to the rank with the fewest so far.
pub fn deal(lengths: &[i64], ranks: usize) -> Shares {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&row| (std::cmp::Reverse(lengths[row]), row));
    let mut shares = vec![Vec::new(); ranks];
    let mut tokens = vec![0; ranks];
    for row in order {
        let rank = (0..ranks).min_by_key(|&rank| tokens[rank]).expect("at least one rank");
        tokens[rank] += lengths[row];
        shares[rank].push(row as i64);
    }
    shares.iter_mut().for_each(|rows| rows.sort_unstable());
    shares
}

/// Where each of the request's rows stands in the ranks' answers laid end to end.
fn places(shares: &Shares) -> Vec<i64> {
    let mut places = vec![0; shares.iter().map(Vec::len).sum()];
    for (place, &row) in shares.iter().flatten().enumerate() {
        places[row as usize] = place as i64;
    }
    places
}

/// `[b, t]` answers of the ranks as `[B, T]`, rows in the order of the request, 0 beyond a rank's columns.
fn unite_rows(replies: &[Tensor], shares: &Shares) -> Tensor {
    let width = replies.iter().map(|reply| reply.size()[1]).max().unwrap_or(0);
    let wide: Vec<Tensor> = replies.iter().map(|reply| reply.constant_pad_nd([0, width - reply.size()[1]])).collect();
    Tensor::cat(&wide, 0).index_select(0, &Tensor::from_slice(&places(shares)))
}

/// `[b]` answers of the ranks as `[B]`, in the order of the request's rows.
fn unite_numbers(replies: &[Tensor], shares: &Shares) -> Tensor {
    Tensor::cat(replies, 0).index_select(0, &Tensor::from_slice(&places(shares)))
}

/// `items` of the ranks laid end to end, in the order of the request's rows.
fn unite_items<T: Clone>(parts: Vec<Vec<T>>, shares: &Shares) -> Vec<T> {
    let all: Vec<T> = parts.into_iter().flatten().collect();
    places(shares).into_iter().map(|place| all[place as usize].clone()).collect()
}

impl Divide for Generate {
    fn again(&self) -> Generate {
        self.clone()
    }

    /// By prompt: a prompt's samples share its pass.
    fn divide(self, ranks: usize) -> (Vec<Generate>, Shares) {
        let Prompts { rows, samples_per_prompt, seed, evaluation } = self.prompts;
        let lengths: Vec<i64> = rows.iter().map(|prompt| prompt.token_ids.len() as i64).collect();
        let shares = deal(&lengths, ranks);
        let of_rank = |prompts: &Vec<i64>| Generate {
            prompts: Prompts {
                rows: prompts.iter().map(|&row| rows[row as usize].clone()).collect(),
                samples_per_prompt,
                seed,
                evaluation,
            },
            sampling: self.sampling.clone(),
        };
        let requests = shares.iter().map(of_rank).collect();
        let n = samples_per_prompt as i64;
        let samples = |prompts: &Vec<i64>| prompts.iter().flat_map(|prompt| prompt * n..(prompt + 1) * n).collect();
        (requests, shares.iter().map(samples).collect())
    }

    fn unite(replies: Vec<Rollout>, shares: &Shares) -> Result<Rollout> {
        let version = replies[0].policy_version;
        if let Some(other) = replies.iter().find(|reply| reply.policy_version != version) {
            let versions = (version, other.policy_version);
            return Err(Error::Refused(format!("generators sample with policy versions {versions:?}")));
        }
        let mut generation = GenerationReport::default();
        for part in replies.iter().map(|reply| &reply.generation) {
            generation.prefill_tokens += part.prefill_tokens;
            generation.generated_tokens += part.generated_tokens;
            generation.decode_steps = generation.decode_steps.max(part.decode_steps);
            generation.seconds = generation.seconds.max(part.seconds);
            generation.first_token_s = generation.first_token_s.max(part.first_token_s);
        }
        let rows = |of: fn(&Rollout) -> &Tensor| {
            let parts: Vec<Tensor> = replies.iter().map(|reply| of(reply).shallow_clone()).collect();
            unite_rows(&parts, shares)
        };
        let (token_ids, response_mask) = (rows(|r| &r.token_ids), rows(|r| &r.response_mask).to_kind(Kind::Bool));
        let rollout_logprobs = rows(|r| &r.rollout_logprobs);
        fn items<T: Clone>(replies: &[Rollout], shares: &Shares, of: fn(&Rollout) -> &Vec<T>) -> Vec<T> {
            unite_items(replies.iter().map(|reply| of(reply).clone()).collect(), shares)
        }
        Ok(Rollout {
            token_ids,
            lengths: items(&replies, shares, |r| &r.lengths),
            response_mask,
            rollout_logprobs,
            finish_reasons: items(&replies, shares, |r| &r.finish_reasons),
            prompts: items(&replies, shares, |r| &r.prompts),
            responses: items(&replies, shares, |r| &r.responses),
            labels: items(&replies, shares, |r| &r.labels),
            policy_version: version,
            generation,
        })
    }
}

/// One request per rank with its share of the rows.
fn by_rows<V>(tokens: &Tokens, ranks: usize, of_rank: impl Fn(&[i64]) -> V) -> (Vec<V>, Shares) {
    let shares = deal(&tokens.lengths, ranks);
    (shares.iter().map(|rows| of_rank(rows)).collect(), shares)
}

impl Divide for Logprobs {
    fn divide(self, ranks: usize) -> (Vec<Logprobs>, Shares) {
        by_rows(&self.tokens, ranks, |rows| Logprobs { role: self.role, tokens: self.tokens.select(rows) })
    }
    fn again(&self) -> Logprobs {
        Logprobs { role: self.role, tokens: self.tokens.shallow_clone() }
    }
    fn unite(replies: Vec<Tensor>, shares: &Shares) -> Result<Tensor> {
        Ok(unite_rows(&replies, shares))
    }
}

impl Divide for Values {
    fn divide(self, ranks: usize) -> (Vec<Values>, Shares) {
        by_rows(&self.tokens, ranks, |rows| Values { tokens: self.tokens.select(rows) })
    }
    fn again(&self) -> Values {
        Values { tokens: self.tokens.shallow_clone() }
    }
    fn unite(replies: Vec<Tensor>, shares: &Shares) -> Result<Tensor> {
        Ok(unite_rows(&replies, shares))
    }
}

impl Divide for Scores {
    fn divide(self, ranks: usize) -> (Vec<Scores>, Shares) {
        let texts = |all: &[String], rows: &[i64]| rows.iter().map(|&row| all[row as usize].clone()).collect();
        by_rows(&self.tokens, ranks, |rows| Scores {
            tokens: self.tokens.select(rows),
            prompts: texts(&self.prompts, rows),
            responses: texts(&self.responses, rows),
        })
    }
    fn again(&self) -> Scores {
        let (prompts, responses) = (self.prompts.clone(), self.responses.clone());
        Scores { tokens: self.tokens.shallow_clone(), prompts, responses }
    }
    fn unite(replies: Vec<Tensor>, shares: &Shares) -> Result<Tensor> {
        Ok(unite_numbers(&replies, shares))
    }
}

impl Divide for UpdateActor {
    fn divide(self, ranks: usize) -> (Vec<UpdateActor>, Shares) {
        by_rows(&self.experience.tokens, ranks, |rows| UpdateActor { experience: self.experience.select(rows), ..self })
    }
    fn again(&self) -> UpdateActor {
        UpdateActor { experience: self.experience.shallow_clone(), ..*self }
    }

    /// Sums of what is divided by the global token count, means weighted by tokens.
    fn unite(replies: Vec<ActorReport>, _shares: &Shares) -> Result<ActorReport> {
        let total: f64 = replies.iter().map(|report| report.response_tokens).sum();
        let mut united = ActorReport { ratio_max: f64::NEG_INFINITY, ..ActorReport::default() };
        for report in replies {
            let weight = report.response_tokens / total;
            united.policy_loss += report.policy_loss;
            united.kl_loss += report.kl_loss;
            united.entropy += report.entropy;
            if report.response_tokens > 0.0 {
                united.clip_fraction += report.clip_fraction * weight;
                united.ppo_kl += report.ppo_kl * weight;
                united.approx_kl += report.approx_kl * weight;
                united.ratio_max = united.ratio_max.max(report.ratio_max);
            }
            united.grad_norm = report.grad_norm;
            united.lr = report.lr;
            united.ratios.extend(report.ratios);
            united.num_tokens += report.num_tokens;
            united.response_tokens += report.response_tokens;
        }
        Ok(united)
    }
}

impl Divide for UpdateCritic {
    fn divide(self, ranks: usize) -> (Vec<UpdateCritic>, Shares) {
        let num_tokens = self.num_tokens;
        by_rows(&self.experience.tokens, ranks, |rows| UpdateCritic {
            experience: self.experience.select(rows),
            num_tokens,
        })
    }
    fn again(&self) -> UpdateCritic {
        UpdateCritic { experience: self.experience.shallow_clone(), ..*self }
    }

    fn unite(replies: Vec<CriticReport>, _shares: &Shares) -> Result<CriticReport> {
        let total: f64 = replies.iter().map(|report| report.response_tokens).sum();
        let mut united = CriticReport::default();
        for report in replies {
            let weight = report.response_tokens / total;
            united.critic_loss += report.critic_loss;
            if report.response_tokens > 0.0 {
                united.clip_fraction += report.clip_fraction * weight;
                united.values_mean += report.values_mean * weight;
            }
            united.grad_norm = report.grad_norm;
            united.lr = report.lr;
            united.num_tokens += report.num_tokens;
            united.response_tokens += report.response_tokens;
        }
        Ok(united)
    }
}

impl Divide for Learn {
    /// By example: the rows of a pair stay together.
    fn divide(self, ranks: usize) -> (Vec<Learn>, Shares) {
        let Learn { rows, rows_per_example, num_learned, lr } = self;
        let lengths: Vec<i64> = rows.lengths.chunks(rows_per_example).map(|example| example.iter().sum()).collect();
        let n = rows_per_example as i64;
        let rows_of =
            |examples: &Vec<i64>| examples.iter().flat_map(|example| example * n..(example + 1) * n).collect();
        let shares: Shares = deal(&lengths, ranks).iter().map(rows_of).collect();
        let of_rank = |share: &Vec<i64>| Learn { rows: rows.select(share), rows_per_example, num_learned, lr };
        (shares.iter().map(of_rank).collect(), shares)
    }
    fn again(&self) -> Learn {
        Learn { rows: self.rows.shallow_clone(), ..*self }
    }

    /// Sums of what is divided by the batch's own count.
    fn unite(replies: Vec<LearnReport>, _shares: &Shares) -> Result<LearnReport> {
        let mut united = LearnReport::default();
        for report in replies {
            united.loss += report.loss;
            united.accuracy += report.accuracy;
            united.grad_norm = report.grad_norm;
            united.lr = report.lr;
            united.num_tokens += report.num_tokens;
        }
        Ok(united)
    }
}

impl Divide for Assess {
    fn divide(self, ranks: usize) -> (Vec<Assess>, Shares) {
        by_rows(&self.rows, ranks, |rows| Assess { rows: self.rows.select(rows) })
    }
    fn again(&self) -> Assess {
        Assess { rows: self.rows.shallow_clone() }
    }
    fn unite(replies: Vec<Tensor>, shares: &Shares) -> Result<Tensor> {
        Ok(unite_numbers(&replies, shares))
    }
}

/// Verbs that every rank carries out alike.
macro_rules! alike {
    ($($verb:ty),*) => {
        $(impl Divide for $verb {
            fn divide(self, ranks: usize) -> (Vec<$verb>, Shares) {
                (vec![self; ranks], vec![Vec::new(); ranks])
            }
            fn again(&self) -> $verb {
                self.clone()
            }
            fn unite(replies: Vec<<$verb as Verb>::Reply>, _shares: &Shares) -> Result<<$verb as Verb>::Reply> {
                let first = replies[0].clone();
                if replies.iter().any(|reply| *reply != first) {
                    return Err(Error::Refused(format!("ranks disagree after `{}`: {replies:?}", <$verb>::NAME)));
                }
                Ok(first)
            }
        })*
    };
}

alike!(Publish, Save, Restore, Export);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::{FinishReason, Prompt, SamplingConfig, Sequence};

    #[test]
    fn rows_are_dealt_by_tokens() {
        let lengths = [9, 1, 5, 5, 1, 1, 8, 2];
        for ranks in 1..5 {
            let shares = deal(&lengths, ranks);
            let mut rows: Vec<i64> = shares.concat();
            rows.sort_unstable();
            assert_eq!(rows, (0..8).collect::<Vec<i64>>());
            let tokens: Vec<i64> =
                shares.iter().map(|rows| rows.iter().map(|&row| lengths[row as usize]).sum()).collect();
            assert!(tokens.iter().max().unwrap() - tokens.iter().min().unwrap() <= 2, "{tokens:?}");
            assert!(shares.iter().all(|rows| rows.is_sorted()));
        }
        assert_eq!(deal(&[3], 3), [vec![0], vec![], vec![]]);
    }

    #[test]
    fn answers_come_back_in_the_order_of_the_rows() {
        let rows: Vec<(Vec<i64>, Vec<bool>)> =
            [4, 1, 3, 2, 6].iter().map(|&n| ((0..n).map(|t| 10 * n + t).collect(), vec![true; n as usize])).collect();
        let tokens = Tokens::from_rows(&rows);
        for ranks in 1..4 {
            let (requests, shares) = Values { tokens: Tokens::from_rows(&rows) }.divide(ranks);
            let replies = requests.into_iter().map(|request| request.tokens.token_ids * 2).collect();
            assert_eq!(Values::unite(replies, &shares).unwrap(), &tokens.token_ids * 2, "{ranks} ranks");
        }
    }

    #[test]
    fn pairs_stay_together() {
        let row = |n: i64| ((0..n).map(|t| 10 * n + t).collect(), vec![true; n as usize]);
        let rows = Tokens::from_rows(&[9, 1, 2, 8, 3, 3, 1, 1].map(row));
        for ranks in 1..6 {
            let request = Learn { rows: rows.shallow_clone(), rows_per_example: 2, num_learned: 4.0, lr: 0.1 };
            let (requests, shares) = request.divide(ranks);
            let pairs: Vec<&[i64]> = shares.iter().flat_map(|rows| rows.chunks(2)).collect();
            assert_eq!(pairs.len(), 4, "{shares:?}");
            assert!(pairs.iter().all(|pair| pair[0] % 2 == 0 && pair[1] == pair[0] + 1), "{shares:?}");
            assert!(requests.iter().zip(&shares).all(|(request, share)| request.rows.num_rows() == share.len()));
        }
    }

    #[test]
    fn a_rollout_is_the_same_over_any_number_of_ranks() {
        let prompt = |id: u64| Prompt {
            id,
            token_ids: vec![1; 1 + id as usize % 3],
            text: format!("prompt {id}"),
            label: id.is_multiple_of(2).then(|| format!("label {id}")),
        };
        let sampling = SamplingConfig {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            max_new_tokens: 9,
            stop: vec![],
            ignore_eos: false,
        };
        // Stands for an engine: the response tells prompt and sample.
        let answer = |request: &Generate| {
            let rows = request.prompts.rows.iter().enumerate();
            let sequences: Vec<Sequence> = rows
                .flat_map(|(prompt_index, prompt)| {
                    (0..request.prompts.samples_per_prompt).map(move |sample| Sequence {
                        prompt_index,
                        sample,
                        prompt_token_ids: prompt.token_ids.clone(),
                        response_token_ids: vec![prompt.id as i64; 1 + sample + prompt.id as usize % 4],
                        rollout_logprobs: vec![-(sample as f32); 1 + sample + prompt.id as usize % 4],
                        finish_reason: if sample == 0 { FinishReason::Stop } else { FinishReason::Length },
                        response: format!("{} {sample}", prompt.id),
                    })
                })
                .collect();
            Rollout::from_sequences(&request.prompts, &sequences, 3, GenerationReport::default())
        };
        let request = || Generate {
            prompts: Prompts { rows: (0..5).map(prompt).collect(), samples_per_prompt: 2, seed: 1, evaluation: false },
            sampling: sampling.clone(),
        };
        let whole = answer(&request());
        for ranks in 1..4 {
            let (requests, shares) = request().divide(ranks);
            let united = Generate::unite(requests.iter().map(answer).collect(), &shares).unwrap();
            assert_eq!((&united.token_ids, &united.lengths), (&whole.token_ids, &whole.lengths));
            assert_eq!((&united.responses, &united.prompts), (&whole.responses, &whole.prompts));
            assert_eq!((&united.labels, &united.finish_reasons), (&whole.labels, &whole.finish_reasons));
            assert_eq!(united.response_mask, whole.response_mask);
            assert_eq!(united.rollout_logprobs, whole.rollout_logprobs);
        }
    }
}
