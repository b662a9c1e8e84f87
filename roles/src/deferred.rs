//! Models that are loaded when they are first asked.

use echelon_core::memory::StateBytes;
use echelon_core::{Error, Result, shim};
use tch::Device;

/// A role that is loaded when it is first asked: the first rollout does not wait for models that only score.
pub struct Deferred<T> {
    state: DeferredState<T>,
    device: Device,
}

enum DeferredState<T> {
    Waiting(Option<Build<T>>),
    Loaded(T, u64),
}

type Build<T> = Box<dyn FnOnce() -> Result<T>>;

impl<T> Deferred<T> {
    /// A role of `device`.
    pub fn new(device: Device, build: impl FnOnce() -> Result<T> + 'static) -> Deferred<T> {
        Deferred { state: DeferredState::Waiting(Some(Box::new(build))), device }
    }

    /// One that is here already.
    pub fn loaded_before(device: Device, value: T) -> Deferred<T> {
        Deferred { state: DeferredState::Loaded(value, 0), device }
    }

    /// # Errors
    /// What loading says; a later call says that it failed before.
    pub fn get(&mut self) -> Result<&mut T> {
        if let DeferredState::Waiting(build) = &mut self.state {
            let build = build.take().ok_or_else(|| Error::Refused("this model could not be loaded before".into()))?;
            let before = held_bytes(self.device);
            let value = build()?;
            self.state = DeferredState::Loaded(value, held_bytes(self.device).saturating_sub(before));
        }
        match &mut self.state {
            DeferredState::Loaded(value, _) => Ok(value),
            DeferredState::Waiting(_) => unreachable!("loaded above"),
        }
    }

    /// What was loaded, if it was.
    pub fn loaded(&mut self) -> Option<&mut T> {
        if let DeferredState::Loaded(value, _) = &mut self.state { Some(value) } else { None }
    }

    /// Bytes that loading left in tensors, mapped ones among them: a frozen model's weights.
    pub fn weights(&self) -> StateBytes {
        let weights = if let DeferredState::Loaded(_, bytes) = &self.state { *bytes } else { 0 };
        StateBytes { weights, ..StateBytes::default() }
    }
}

/// Bytes live in tensors of this rank's device, and those of mapped weights that a CPU computes on.
pub fn held_bytes(device: Device) -> u64 {
    let mapped = if device == Device::Cpu { shim::mapped_bytes() } else { 0 };
    (shim::live_bytes(device) + mapped) as u64
}
