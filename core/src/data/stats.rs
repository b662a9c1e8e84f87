//! Statistics as sums: they add up over micro-batches and ranks, and become numbers at the very end.
//!
//! A number may stay on its device until the rank replies: on a GPU each transfer waits for the device.

use std::collections::BTreeMap;

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::divide::Shares;
use crate::error::Result;
use crate::message::{Body, Message};

/// A number here, or a scalar that is still on its device.
#[derive(Debug)]
pub enum Number {
    Here(f64),
    OnDevice(Tensor),
}

impl From<f64> for Number {
    fn from(number: f64) -> Number {
        Number::Here(number)
    }
}

impl From<Tensor> for Number {
    fn from(scalar: Tensor) -> Number {
        Number::OnDevice(scalar.detach().to_kind(Kind::Double))
    }
}

impl Number {
    fn combine(&mut self, other: Number, here: fn(f64, f64) -> f64, on_device: fn(&Tensor, &Tensor) -> Tensor) {
        let tensor = |number: &Number, like: &Tensor| match number {
            Number::Here(number) => Tensor::from(*number).to_device(like.device()),
            Number::OnDevice(tensor) => tensor.shallow_clone(),
        };
        *self = match (&*self, &other) {
            (Number::Here(a), Number::Here(b)) => Number::Here(here(*a, *b)),
            (Number::OnDevice(a), b) => Number::OnDevice(on_device(a, &tensor(b, a))),
            (a, Number::OnDevice(b)) => Number::OnDevice(on_device(&tensor(a, b), b)),
        };
    }

    fn add(&mut self, other: Number) {
        self.combine(other, |a, b| a + b, |a, b| a + b);
    }

    fn shallow_clone(&self) -> Number {
        match self {
            Number::Here(number) => Number::Here(*number),
            Number::OnDevice(scalar) => Number::OnDevice(scalar.shallow_clone()),
        }
    }

    fn here(&self) -> f64 {
        match self {
            Number::Here(number) => *number,
            Number::OnDevice(scalar) => scalar.double_value(&[]),
        }
    }
}

/// How a statistic becomes one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Fold {
    /// Sum over weight; 0 of nothing.
    Mean,
    Sum,
    Max,
    Last,
}

/// What is known of one statistic: a sum (or the most, or the last), and of a mean the weight that it is divided by.
#[derive(Debug)]
struct Stat {
    fold: Fold,
    value: Number,
    weight: Number,
}

impl Stat {
    fn unite(&mut self, other: Stat) {
        match self.fold {
            Fold::Mean | Fold::Sum => self.value.add(other.value),
            Fold::Max => self.value.combine(other.value, f64::max, Tensor::maximum),
            Fold::Last => self.value = other.value,
        }
        self.weight.add(other.weight);
    }

    fn number(&self) -> f64 {
        match (self.fold, self.value.here(), self.weight.here()) {
            (Fold::Mean, 0.0, 0.0) => 0.0,
            (Fold::Mean, sum, weight) => sum / weight,
            (_, value, _) => value,
        }
    }
}

/// Statistics by name, in the order in which they were first told.
#[derive(Debug, Default)]
pub struct Stats(IndexMap<String, Stat>);

impl Stats {
    /// Adds `sum` to a statistic that is the mean over all `weight`.
    pub fn mean(&mut self, name: impl Into<String>, sum: impl Into<Number>, weight: impl Into<Number>) {
        self.tell(name, Stat { fold: Fold::Mean, value: sum.into(), weight: weight.into() });
    }

    /// Adds to a statistic that is a sum.
    pub fn sum(&mut self, name: impl Into<String>, number: impl Into<Number>) {
        self.tell(name, Stat { fold: Fold::Sum, value: number.into(), weight: 0.0.into() });
    }

    /// A statistic that is the most of what is told.
    pub fn max(&mut self, name: impl Into<String>, number: impl Into<Number>) {
        self.tell(name, Stat { fold: Fold::Max, value: number.into(), weight: 0.0.into() });
    }

    /// A statistic that is what was told last.
    pub fn last(&mut self, name: impl Into<String>, number: impl Into<Number>) {
        self.tell(name, Stat { fold: Fold::Last, value: number.into(), weight: 0.0.into() });
    }

    fn tell(&mut self, name: impl Into<String>, stat: Stat) {
        let name = name.into();
        match self.0.get_mut(&name) {
            Some(known) => known.unite(stat),
            None => drop(self.0.insert(name, stat)),
        }
    }

    /// Adds those of another micro-batch or rank.
    pub fn unite(&mut self, other: Stats) {
        other.0.into_iter().for_each(|(name, stat)| self.tell(name, stat));
    }

    /// Adds those of an optimizer step, which counts once: of its means the mean over all steps, of others what they are.
    pub fn follow(&mut self, step: Stats) {
        for (name, stat) in step.0 {
            let (value, weight) = (stat.number(), if stat.fold == Fold::Mean { 1.0 } else { 0.0 });
            self.tell(name, Stat { fold: stat.fold, value: value.into(), weight: weight.into() });
        }
    }

    /// The number of this name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.get(name).map(Stat::number)
    }

    /// All names and numbers.
    pub fn numbers(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(name, stat)| (name.as_str(), stat.number()))
    }

    /// Brings what is on a device here, all of it in one transfer.
    fn bring_here(&mut self) {
        let numbers = || self.0.values().flat_map(|stat| [&stat.value, &stat.weight]);
        let on_device =
            |number: &Number| if let Number::OnDevice(scalar) = number { Some(scalar.shallow_clone()) } else { None };
        let scalars: Vec<Tensor> = numbers().filter_map(on_device).collect();
        if scalars.is_empty() {
            return;
        }
        let here = Vec::<f64>::try_from(Tensor::stack(&scalars, 0).to_device(Device::Cpu)).expect("f64 scalars");
        let mut here = here.into_iter();
        for number in self.0.values_mut().flat_map(|stat| [&mut stat.value, &mut stat.weight]) {
            if let Number::OnDevice(_) = number {
                *number = Number::Here(here.next().expect("as many as were stacked"));
            }
        }
    }
}

/// Values by name, for histograms: `[N]` each.
#[derive(Debug, Default)]
pub struct Histograms(BTreeMap<String, Vec<Tensor>>);

impl Histograms {
    /// Adds `[n]` values.
    pub fn add(&mut self, name: &str, values: &Tensor) {
        self.0.entry(name.to_owned()).or_default().push(values.detach());
    }

    pub fn unite(&mut self, other: Histograms) {
        other.0.into_iter().for_each(|(name, values)| self.0.entry(name).or_default().extend(values));
    }

    /// All names and values.
    pub fn values(&self) -> impl Iterator<Item = (&str, Vec<f32>)> {
        let here = |values: &Vec<Tensor>| {
            let values = Tensor::cat(values, 0).to_device(Device::Cpu).to_kind(Kind::Float);
            Vec::<f32>::try_from(values).expect("a vector of numbers")
        };
        self.0.iter().map(move |(name, values)| (name.as_str(), here(values)))
    }
}

/// What a piece of work saw.
#[derive(Debug, Default)]
pub struct Report {
    pub stats: Stats,
    pub histograms: Histograms,
}

impl Report {
    /// That of the ranks' reports.
    pub fn unite(parts: Vec<Report>, _shares: &Shares) -> Report {
        let mut united = Report::default();
        for Report { stats, histograms } in parts {
            united.stats.unite(stats);
            united.histograms.unite(histograms);
        }
        united
    }

    /// Adds that of an optimizer step.
    pub fn follow(&mut self, step: Report) {
        self.stats.follow(step.stats);
        self.histograms.unite(step.histograms);
    }

    /// Another handle of the same.
    pub fn shallow_clone(&self) -> Report {
        let mut copy = Report::default();
        for (name, stat) in &self.stats.0 {
            let (value, weight) = (stat.value.shallow_clone(), stat.weight.shallow_clone());
            copy.stats.0.insert(name.clone(), Stat { fold: stat.fold, value, weight });
        }
        for (name, values) in &self.histograms.0 {
            values.iter().for_each(|values| copy.histograms.add(name, values));
        }
        copy
    }

    /// Brings its statistics here from the device.
    #[must_use]
    pub fn here(mut self) -> Report {
        self.stats.bring_here();
        self
    }
}

impl Message for Report {
    const KIND: &'static str = "report";

    /// Numbers go as a tensor: JSON has no words for infinite and undefined ones.
    fn to_body(&self) -> Body {
        let folds: Vec<(&String, Fold)> = self.stats.0.iter().map(|(name, stat)| (name, stat.fold)).collect();
        let numbers: Vec<f64> =
            self.stats.0.values().flat_map(|stat| [stat.value.here(), stat.weight.here()]).collect();
        let histograms = self.histograms.0.iter();
        let body = Body::default().with_field("folds", folds).with("numbers", &Tensor::from_slice(&numbers));
        histograms.fold(body, |body, (name, values)| body.with(&format!("histogram/{name}"), &Tensor::cat(values, 0)))
    }

    fn from_body(body: &mut Body) -> Result<Report> {
        let numbers = Vec::<f64>::try_from(body.tensor("numbers")?)?;
        let folds: Vec<(String, Fold)> = body.field("folds")?;
        let stats = folds
            .into_iter()
            .zip(numbers.chunks_exact(2))
            .map(|((name, fold), number)| (name, Stat { fold, value: number[0].into(), weight: number[1].into() }));
        let mut report = Report { stats: Stats(stats.collect()), histograms: Histograms::default() };
        for full in body.tensor_names() {
            if let Some(name) = full.strip_prefix("histogram/") {
                report.histograms.add(name, &body.tensor(&full)?);
            }
        }
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{decode, encode};

    /// A rank's or a micro-batch's share of eight numbers.
    fn part(numbers: &[f64], on_device: bool) -> Report {
        let mut report = Report::default();
        let number = |value: f64| if on_device { Number::from(Tensor::from(value)) } else { value.into() };
        report.stats.mean("mean", number(numbers.iter().sum()), number(numbers.len() as f64));
        report.stats.sum("sum", number(numbers.iter().sum()));
        report.stats.max("max", number(numbers.iter().copied().fold(f64::NEG_INFINITY, f64::max)));
        report.stats.last("last", 7.5);
        report.histograms.add("all", &Tensor::from_slice(numbers));
        report
    }

    #[test]
    fn parts_are_the_whole_wherever_their_numbers_are() {
        let numbers = [3.0, -1.0, 2.0, 8.0, 0.5, 0.25, -4.0, 1.0];
        for cuts in [vec![8], vec![3, 5], vec![1, 0, 7], vec![2, 2, 2, 2]] {
            let mut left = &numbers[..];
            let mut parts = Vec::new();
            for (index, cut) in cuts.iter().enumerate() {
                parts.push(part(&left[..*cut], index % 2 == 0));
                left = &left[*cut..];
            }
            let united = Report::unite(parts, &Vec::new()).here();
            let united: Report = decode(&encode(&united)).unwrap();
            let found: Vec<(&str, f64)> = united.stats.numbers().collect();
            assert_eq!(found, [("mean", 9.75 / 8.0), ("sum", 9.75), ("max", 8.0), ("last", 7.5)]);
            let all = united.histograms.values().next().unwrap();
            assert_eq!(all, ("all", numbers.map(|number| number as f32).to_vec()));
        }
    }

    #[test]
    fn an_optimizer_step_counts_once() {
        let mut all = Report::default();
        all.follow(part(&[1.0, 2.0, 3.0], false));
        all.follow(part(&[6.0], true));
        let found: Vec<(&str, f64)> = all.stats.numbers().collect();
        assert_eq!(found, [("mean", 4.0), ("sum", 12.0), ("max", 6.0), ("last", 7.5)]);
    }

    #[test]
    fn a_mean_of_nothing_is_zero_and_what_json_cannot_say_comes_back() {
        let nothing = part(&[], false);
        assert_eq!(nothing.stats.get("mean"), Some(0.0));
        let again: Report = decode(&encode(&nothing)).unwrap();
        assert_eq!(again.stats.get("max"), Some(f64::NEG_INFINITY));
        assert_eq!(again.stats.get("no such"), None);
    }
}
