//! Learning-rate schedules: pure functions of the optimizer step, equal to those of transformers.
//!
//! A schedule has no state, so a resumed run needs nothing but its step number.

pub use echelon_core::optimizer::Decay;
use echelon_core::optimizer::Optimizer;

/// Warm-up from zero, then decay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LrSchedule {
    /// The shape after warm-up.
    pub decay: Decay,
    /// Optimizer steps of linear warm-up; step 0 of a warm-up has learning rate zero, as in transformers.
    pub warmup_steps: usize,
    /// Optimizer steps of the whole run. The decay is meant for steps up to this one.
    pub total_steps: usize,
    /// Where the cosine ends, relative to the peak.
    pub min_lr_ratio: f64,
}

impl LrSchedule {
    /// `optimizer`'s course over `total_steps`.
    pub fn of(optimizer: &Optimizer, total_steps: usize) -> Self {
        Self::new(optimizer.schedule, total_steps, optimizer.warmup_ratio, optimizer.min_lr_ratio)
    }

    /// A schedule whose warm-up takes `warmup_ratio` of the run, rounded up, as OpenRLHF counts it.
    pub fn new(decay: Decay, total_steps: usize, warmup_ratio: f64, min_lr_ratio: f64) -> Self {
        let warmup_steps = (total_steps as f64 * warmup_ratio).ceil() as usize;
        Self { decay, warmup_steps, total_steps, min_lr_ratio }
    }

    /// The learning rate of optimizer step `step` (from 0), relative to the peak.
    pub fn factor(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return step as f64 / self.warmup_steps as f64;
        }
        let decay_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear => self.total_steps.saturating_sub(step) as f64 / decay_steps,
            Decay::Cosine => {
                let progress = (step - self.warmup_steps) as f64 / decay_steps;
                let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
                cosine * (1.0 - self.min_lr_ratio) + self.min_lr_ratio
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_peak_and_floor() {
        let schedule = LrSchedule::new(Decay::Cosine, 100, 0.03, 0.1);
        assert_eq!(schedule.warmup_steps, 3);
        assert_eq!([0, 3].map(|step| schedule.factor(step)), [0.0, 1.0]);
        assert!((schedule.factor(100) - 0.1).abs() < 1e-15);
    }

    #[test]
    fn a_part_of_a_step_is_a_step_of_warm_up() {
        assert_eq!(LrSchedule::new(Decay::Constant, 10, 0.03, 0.1).warmup_steps, 1);
        assert_eq!(LrSchedule::new(Decay::Constant, 10, 0.0, 0.1).warmup_steps, 0);
    }

    #[test]
    fn linear_never_goes_below_zero() {
        let schedule = LrSchedule::new(Decay::Linear, 10, 0.0, 0.0);
        assert_eq!([0, 5, 10, 11].map(|step| schedule.factor(step)), [1.0, 0.5, 0.0, 0.0]);
    }

    #[test]
    fn a_run_that_is_all_warm_up_divides_by_nothing() {
        for decay in [Decay::Constant, Decay::Linear, Decay::Cosine] {
            let schedule = LrSchedule::new(decay, 4, 1.0, 0.1);
            assert!((0..=4).all(|step| schedule.factor(step).is_finite()));
        }
    }
}
