//! Node reuse: what learns leaves the device while a generator works there, and comes back.
//!
//! What left comes back bit for bit, and views of it are valid again; in between nobody may read it. Tests:
//! `models/tests/sharding.rs`, `tests/node_reuse.rs`.

use tch::{Device, Tensor};

use crate::collective::{allocate_storage, free_storage, unversioned};
use crate::error::Result;
use crate::shim;

/// Tensors without memory on the device, beside what they held.
#[derive(Default)]
pub struct Aside(Vec<(Tensor, Tensor)>);

impl Aside {
    /// Takes a tensor's contents to host memory and gives its memory back. Its views stay.
    pub fn take(&mut self, tensor: &Tensor) -> Result<()> {
        let contents = in_host_memory(tensor)?;
        free_storage(tensor)?;
        self.0.push((tensor.shallow_clone(), contents));
        Ok(())
    }

    /// The same of several, unless something is away already.
    pub fn take_all<'a>(&mut self, tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<()> {
        if self.0.is_empty() { tensors.into_iter().try_for_each(|tensor| self.take(tensor)) } else { Ok(()) }
    }

    pub fn bring_back(&mut self) -> Result<()> {
        let _guard = tch::no_grad_guard();
        for (tensor, contents) in self.0.drain(..) {
            allocate_storage(&tensor)?;
            unversioned(&tensor)?.f_copy_(&contents)?;
        }
        Ok(())
    }
}

/// A copy in host memory, page-locked where it comes from a GPU.
pub(super) fn in_host_memory(tensor: &Tensor) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    let mut host = match tensor.device() {
        Device::Cpu => Tensor::f_empty(tensor.size(), (tensor.kind(), Device::Cpu))?,
        _ => shim::pinned_zeros(&tensor.size(), tensor.kind())?,
    };
    host.f_copy_(&tensor.detach())?;
    Ok(host)
}
