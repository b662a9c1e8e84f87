//! The loss of a reward model: of two responses the preferred one should score higher.
//!
//! Bradley–Terry: P(chosen beats rejected) = σ(score_chosen − score_rejected).

use tch::{Kind, Tensor};

/// The loss over a batch of pairs and how many of them the model ranks as people did.
pub struct BradleyTerry {
    /// Σ −log σ(chosen − rejected) over the pairs, a scalar with gradient: divide by the number of pairs of
    /// the whole mini-batch.
    pub sum: Tensor,
    /// Pairs whose chosen response scores strictly higher; over the number of pairs it is the accuracy.
    pub num_correct: Tensor,
}

/// Bradley–Terry loss of the scores `[N]` of chosen and rejected responses.
pub fn bradley_terry(chosen: &Tensor, rejected: &Tensor) -> BradleyTerry {
    assert_eq!(chosen.size(), rejected.size(), "every chosen response needs its rejected one");
    let margin = chosen - rejected;
    BradleyTerry { sum: -margin.log_sigmoid().sum(margin.kind()), num_correct: margin.gt(0.0).sum(Kind::Double) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_scores_cost_log_two_and_are_not_correct() {
        let scores = Tensor::from_slice(&[0.5, -3.0]);
        let pairs = bradley_terry(&scores, &scores);
        assert!((pairs.sum.double_value(&[]) - 2.0 * 2f64.ln()).abs() < 1e-12);
        assert_eq!(pairs.num_correct.double_value(&[]), 0.0);
    }

    #[test]
    fn a_hopeless_pair_costs_its_margin_and_stays_finite() {
        let chosen = Tensor::from_slice(&[-1000.0, 1000.0]).set_requires_grad(true);
        let pairs = bradley_terry(&chosen, &Tensor::from_slice(&[1000.0, -1000.0]));
        pairs.sum.backward();
        assert_eq!(pairs.sum.double_value(&[]), 2000.0);
        assert_eq!(chosen.grad(), Tensor::from_slice(&[-1.0, 0.0]));
        assert_eq!(pairs.num_correct.double_value(&[]), 1.0);
    }
}
