//! Training state by layer units: flat buffers of weights, gradients and AdamW moments, and the forward and backward
//! passes that go through them unit by unit.
//!
//! A unit's parameters form one flat buffer, tensors on 64-byte boundaries, matrices first; the model's own tensors
//! are views of it. Backward passes add into the flat gradient, the optimizer steps on the flat buffers.

mod flat;
mod optimizer;
mod pass;
mod state_file;
mod trainable;

pub use flat::{FlatUnit, ParamWithGrad};
pub use optimizer::{OptimizerConfig, StepReport, TrainingState};
pub use pass::{Backbone, Head, forward, forward_backward};
pub use state_file::{StateFileError, TensorFile, write_tensors, write_tensors_as};
pub use trainable::{PassConfig, PolicyOutput, ScalarValues, Trainable, forward_rows, stack_rows};
