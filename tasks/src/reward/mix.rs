//! Several sources, weighted.

use std::sync::Mutex;
use std::thread;

use super::{RewardError, RewardRequest, RewardSource, score_checked};

/// The weighted sum of several sources' scores. Sources score at the same time.
///
/// [`RewardSource::take_metrics`] reports each source's own mean, before weighting, as `reward/NAME`, and what the
/// sources themselves report.
pub struct WeightedMix {
    sources: Vec<(Box<dyn RewardSource>, f64)>,
    /// Unique: a second `math` is `math#2`.
    names: Vec<String>,
    means: Mutex<Vec<(String, f64)>>,
}

impl WeightedMix {
    /// A mix of sources with their weights; a negative weight makes its source a penalty.
    ///
    /// # Errors
    /// No source, or a weight that is not finite or is 0.
    pub fn new(sources: Vec<(Box<dyn RewardSource>, f64)>) -> Result<Self, RewardError> {
        let setting = |message: String| RewardError::Setting { rule: "mix".to_owned(), message };
        if sources.is_empty() {
            return Err(setting("it has no source of reward".to_owned()));
        }
        let mut names: Vec<String> = Vec::with_capacity(sources.len());
        for (source, weight) in &sources {
            let name = unique(source.name(), &names);
            if !weight.is_finite() || *weight == 0.0 {
                return Err(setting(format!("weight {weight} of {name} must be a finite number other than 0")));
            }
            names.push(name);
        }
        Ok(Self { sources, names, means: Mutex::default() })
    }

    /// Scores of each source before weighting, by its name.
    ///
    /// # Errors
    /// The first source's, in their order.
    pub fn score_parts(&self, requests: &[RewardRequest]) -> Result<Vec<(String, Vec<f64>)>, RewardError> {
        let answers: Vec<_> = thread::scope(|scope| {
            let sources = self.sources.iter().map(|(source, _)| source.as_ref());
            let threads: Vec<_> = sources.map(|source| scope.spawn(move || score_checked(source, requests))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        });
        self.names.iter().zip(answers).map(|(name, scores)| Ok((name.clone(), scores?))).collect()
    }
}

fn unique(name: String, taken: &[String]) -> String {
    if !taken.contains(&name) {
        return name;
    }
    let numbered = (2..).map(|number| format!("{name}#{number}"));
    numbered.into_iter().find(|name| !taken.contains(name)).unwrap_or(name)
}

impl RewardSource for WeightedMix {
    fn name(&self) -> String {
        self.names.join("+")
    }

    fn score(&self, requests: &[RewardRequest]) -> Result<Vec<f64>, RewardError> {
        let parts = self.score_parts(requests)?;
        let mut total = vec![0.0; requests.len()];
        for ((_, scores), (_, weight)) in parts.iter().zip(&self.sources) {
            total.iter_mut().zip(scores).for_each(|(sum, score)| *sum += weight * score);
        }
        if !requests.is_empty() {
            let mean = |scores: &[f64]| scores.iter().sum::<f64>() / scores.len() as f64;
            let means = parts.iter().map(|(name, scores)| (format!("reward/{name}"), mean(scores))).collect();
            *self.means.lock().unwrap_or_else(|poison| poison.into_inner()) = means;
        }
        Ok(total)
    }

    fn take_metrics(&self) -> Vec<(String, f64)> {
        let mut metrics = std::mem::take(&mut *self.means.lock().unwrap_or_else(|poison| poison.into_inner()));
        metrics.extend(self.sources.iter().flat_map(|(source, _)| source.take_metrics()));
        metrics
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reward::{LengthRule, MathRule};

    struct Fixed(Vec<f64>);

    impl RewardSource for Fixed {
        fn name(&self) -> String {
            "fixed".to_owned()
        }

        fn score(&self, _: &[RewardRequest]) -> Result<Vec<f64>, RewardError> {
            Ok(self.0.clone())
        }
    }

    fn request(response: &str, num_response_tokens: usize) -> RewardRequest {
        let (prompt, response, label) = ("1+1".to_owned(), response.to_owned(), Some("2".to_owned()));
        RewardRequest { prompt, response, label, num_response_tokens, finished: true }
    }

    #[test]
    fn sums_by_weight_and_reports_each_mean() {
        let length = LengthRule::target(10).unwrap();
        let mix = WeightedMix::new(vec![
            (Box::new(MathRule::default()), 2.0),
            (Box::new(length), -0.5),
            (Box::new(length), 1.0),
        ])
        .unwrap();
        assert_eq!(mix.score(&[request("2", 10), request("3", 5)]).unwrap(), [2.5, 0.25]);
        let metrics = mix.take_metrics();
        let expected = [("reward/math", 0.5), ("reward/length", 0.75), ("reward/length#2", 0.75)];
        assert_eq!(metrics, expected.map(|(name, mean)| (name.to_owned(), mean)));
        assert!(mix.take_metrics().is_empty());
        assert_eq!(mix.score(&[]).unwrap(), Vec::<f64>::new());
    }

    #[test]
    fn a_source_that_breaks_the_rules_is_named() {
        let score = |scores: Vec<f64>| {
            let mix = WeightedMix::new(vec![(Box::new(Fixed(scores)), 1.0)]).unwrap();
            mix.score(&[request("2", 1), request("2", 1)]).unwrap_err().to_string()
        };
        assert_eq!(score(vec![1.0]), "reward \"fixed\": 2 requests, 1 scores");
        assert_eq!(
            score(vec![1.0, f64::NAN]),
            "reward \"fixed\": request 2 of 2 (prompt \"1+1\"): its score is NaN, not a finite number"
        );
    }

    #[test]
    fn weights_that_mean_nothing_are_refused() {
        assert!(WeightedMix::new(vec![]).is_err());
        for weight in [0.0, f64::NAN, f64::INFINITY] {
            let error = WeightedMix::new(vec![(Box::new(Fixed(vec![])), weight)]).err().unwrap().to_string();
            assert!(error.contains("weight") && error.contains("fixed"), "{error}");
        }
    }
}
