//! Training state by layer units: flat buffers of weights, gradients and AdamW moments, and the forward and backward
//! passes that go through them unit by unit.
//!
//! A unit's parameters form one flat buffer, tensors on 64-byte boundaries, matrices first; the model's own tensors
//! are views of it. Backward passes add into the flat gradient, the optimizer steps on the flat buffers.
//!
//! Parameters that training leaves ([`trainable`](crate::shape::ParamShape::trainable)) have a flat buffer of their
//! own in their unit, without gradients and moments; two states may share those ([`TrainingState::with_base`]).
//!
//! Over several ranks, [`Sharding`] says what is divided. A unit's parameters are gathered when a pass comes to it and
//! released behind it; its gradients are handed to their ranks as soon as its backward pass is over.

mod aside;
mod flat;
mod flat_weights;
mod frozen;
mod learn;
mod optimizer;
mod pass;
mod sharding;
mod state_file;
mod trainable;

pub use aside::Aside;
pub use flat::{FlatUnit, ParamWithGrad};
pub use flat_weights::{FlatLayout, FlatWeights};
pub use frozen::{FrozenState, FrozenWhole};
pub use learn::Told;
pub use optimizer::{OptimizerConfig, StatePart, TrainingState};
pub use pass::{Backbone, Head, Units, WholeModel, forward, forward_backward, forward_units};
pub use sharding::{Sharding, ZeroStage};
pub use state_file::{StateFileError, TensorFile, TensorWriter, write_tensors};
pub use trainable::{PassConfig, Trainable, forward_rows, forward_rows_through, stack_rows};
