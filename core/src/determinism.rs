//! The same bits for the same work, on a GPU too.
//!
//! On a CPU every operator that is used here has one result for one input on one machine. On a GPU libtorch's sums run in the order in
//! which threads come, unless it is asked for its deterministic forms; cuBLAS needs a workspace of a fixed size, and NCCL
//! one algorithm and protocol, whatever the size of a message.

use tch::Device;

use crate::error::Result;
use crate::shim;

/// Read by libtorch when it first multiplies on a thread: a workspace of this size lets cuBLAS choose one algorithm always. Also
/// what libtorch takes on a Hopper by itself.
const CUBLAS_WORKSPACE: (&str, &str) = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8");

/// Read by NCCL when its library is opened.
const NCCL: [(&str, &str); 2] = [("NCCL_ALGO", "Ring"), ("NCCL_PROTO", "Simple")];

/// Makes all that this process computes on a GPU from now on deterministic: call before its first work. A CPU is as it is.
///
/// # Errors
/// libtorch's.
pub fn enforce(device: Device) -> Result<()> {
    if device == Device::Cpu {
        return Ok(());
    }
    for (name, value) in NCCL.into_iter().chain([CUBLAS_WORKSPACE]) {
        if std::env::var_os(name).is_none() {
            // SAFETY: the libraries that read them are opened later by this thread; nothing else here reads them.
            unsafe { std::env::set_var(name, value) };
        }
    }
    Ok(shim::use_deterministic_algorithms(true)?)
}
