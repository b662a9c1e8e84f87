//! The rank side of a run: what a device's thread owns, and how it answers what the driver asks.
//!
//! Reading order: [`plan`] (what roles are built from), [`device_roles`] (how each verb is answered), [`trained`] (a model that
//! learns), [`generator`] (what samples, and how it gets new weights), [`membership`] (the process groups of a worker),
//! [`models`] (weights from folders and back).

pub mod plan;

pub mod device_roles;

pub mod trained;

pub mod calibration;
pub mod deferred;
pub mod generator;
pub mod matmul_rate;
pub mod membership;
pub mod models;
