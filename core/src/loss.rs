//! What a model learns: a loss, found by its name on every rank (AR-25).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::data::{Report, Rows};
use crate::error::{Error, Result};

/// What a model says of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gives {
    /// Of tokens, by way of logits.
    Logprobs,
    /// One number per row or per token.
    Scalars,
}

/// The same in numbers, of a micro-batch.
#[derive(Clone, Copy, Debug)]
pub enum Output<'a> {
    /// `[b, T]` each: log π(token | prefix), and when learning the entropy of the distribution that it was drawn from.
    Logprobs { logprobs: &'a Tensor, entropy: Option<&'a Tensor> },
    /// `[b, T]` a value before each own token, or `[b]` a score for each row.
    Scalars(&'a Tensor),
}

impl<'a> Output<'a> {
    /// # Panics
    /// The model gives scalars: a loss says what it needs ([`Loss::gives`]), and a rank that gives other refuses it.
    pub fn logprobs(self) -> &'a Tensor {
        let Output::Logprobs { logprobs, .. } = self else { panic!("this model gives scalars") };
        logprobs
    }

    pub fn entropy(self) -> Option<&'a Tensor> {
        if let Output::Logprobs { entropy, .. } = self { entropy } else { None }
    }

    /// # Panics
    /// As [`Output::logprobs`].
    pub fn scalars(self) -> &'a Tensor {
        let Output::Scalars(scalars) = self else { panic!("this model gives log-probs") };
        scalars
    }
}

/// What a loss's sums are divided by: the count of the whole mini-batch, over all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Per {
    /// Own tokens.
    Token,
    Row,
    /// Such as pairs.
    Unit,
}

/// A part of a loss: a scalar with gradient, summed over a micro-batch.
#[derive(Debug)]
pub struct Term {
    pub sum: Tensor,
    pub per: Per,
}

/// Counts of a whole mini-batch, over all ranks: the gradient depends neither on micro-batches nor on ranks (AR-5).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    pub tokens: f64,
    pub rows: f64,
    pub units: f64,
}

impl Totals {
    /// Of rows that stay together by `unit`.
    pub fn of(rows: &Rows, unit: usize) -> Totals {
        let num_rows = rows.num_rows() as f64;
        Totals { tokens: rows.num_own_tokens().max(1.0), rows: num_rows, units: num_rows / unit as f64 }
    }

    /// A scalar: the terms, each divided by its count.
    ///
    /// # Panics
    /// Without a term there is nothing to learn.
    pub fn mean(&self, terms: Vec<Term>) -> Tensor {
        let by = |per| match per {
            Per::Token => self.tokens,
            Per::Row => self.rows,
            Per::Unit => self.units,
        };
        let mut sums: Vec<Term> = Vec::new();
        for term in terms {
            match sums.iter_mut().find(|sum| sum.per == term.per) {
                Some(sum) => sum.sum = &sum.sum + term.sum,
                None => sums.push(term),
            }
        }
        sums.into_iter().map(|Term { sum, per }| sum / by(per)).reduce(|a, b| a + b).expect("a loss has a term")
    }
}

/// Numbers of a loss that change from call to call, by name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Numbers(BTreeMap<String, f64>);

impl Numbers {
    pub fn of(numbers: &[(&str, f64)]) -> Numbers {
        Numbers(numbers.iter().map(|(name, number)| ((*name).to_owned(), *number)).collect())
    }

    /// # Errors
    /// Nobody gave it.
    pub fn get(&self, name: &str) -> Result<f64> {
        self.0
            .get(name)
            .copied()
            .ok_or_else(|| Error::Refused(format!("a loss reads the number `{name}`, which nobody gives")))
    }
}

/// What is learned of rows. The same value is made on the driver and on every rank, from the resolved recipe, and a call names
/// it.
pub trait Loss: Send + Sync {
    fn name(&self) -> &'static str;
    /// What it is computed from.
    fn gives(&self) -> Gives;
    /// The columns that it reads; those that the rows lack are an error, unless they are [`Loss::may_read`]'s.
    fn columns(&self) -> &'static [&'static str];
    /// Columns that go along where they are there: read, or only kept as evidence of a step that was refused.
    fn may_read(&self) -> &'static [&'static str] {
        &[]
    }
    /// Neighbouring rows that stay together: 2 of a pair.
    fn unit(&self) -> usize {
        1
    }
    /// Before the names of the optimizer's statistics, `grad_norm` and `lr`.
    fn prefix(&self) -> &'static str {
        "train/"
    }
    /// The loss of a micro-batch, and what there is to tell of it. A rank may have a micro-batch without own tokens.
    ///
    /// # Errors
    /// A number that nobody gives.
    fn terms(&self, output: Output, rows: &Rows, numbers: &Numbers, report: &mut Report) -> Result<Vec<Term>>;
}

/// Refuses rows that lack what a loss reads.
///
/// # Errors
/// With the names of loss and column.
pub fn check_columns(loss: &dyn Loss, rows: &Rows) -> Result<()> {
    match loss.columns().iter().find(|name| !rows.has(name)) {
        Some(name) => {
            Err(Error::Refused(format!("the loss `{}` reads a column `{name}`, which nobody made", loss.name())))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Column, PerToken};

    const NEEDED: Column<PerToken> = Column::new("needed");

    struct Needy;

    impl Loss for Needy {
        fn name(&self) -> &'static str {
            "needy"
        }
        fn gives(&self) -> Gives {
            Gives::Logprobs
        }
        fn columns(&self) -> &'static [&'static str] {
            &["needed"]
        }
        fn terms(&self, _: Output, _: &Rows, numbers: &Numbers, _: &mut Report) -> Result<Vec<Term>> {
            let sum = Tensor::from(numbers.get("coef")?);
            Ok(vec![Term { sum, per: Per::Row }])
        }
    }

    fn rows() -> Rows {
        Rows::of_tokens(&[(vec![1, 2, 3], vec![false, true, true]), (vec![4, 5], vec![false, true])])
    }

    #[test]
    fn what_a_loss_reads_and_nobody_made_is_named() {
        let refused = check_columns(&Needy, &rows()).unwrap_err().to_string();
        assert_eq!(refused, "the loss `needy` reads a column `needed`, which nobody made");
        let made = rows().with(NEEDED, Tensor::zeros([2, 3], tch::kind::FLOAT_CPU)).unwrap();
        assert!(check_columns(&Needy, &made).is_ok());
        let output = Output::Scalars(&made.own);
        let unnamed = Needy.terms(output, &made, &Numbers::default(), &mut Report::default()).unwrap_err().to_string();
        assert_eq!(unnamed, "a loss reads the number `coef`, which nobody gives");
    }

    #[test]
    fn terms_are_divided_each_by_its_count() {
        let totals = Totals::of(&rows(), 2);
        assert_eq!(totals, Totals { tokens: 3.0, rows: 2.0, units: 1.0 });
        let term = |sum: f64, per| Term { sum: Tensor::from(sum), per };
        let terms = vec![term(6.0, Per::Token), term(10.0, Per::Row), term(3.0, Per::Token), term(0.5, Per::Unit)];
        assert_eq!(totals.mean(terms).double_value(&[]), 9.0 / 3.0 + 5.0 + 0.5);
    }
}
