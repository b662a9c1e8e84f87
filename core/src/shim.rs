//! The bridge to `csrc/`: libtorch calls that tch lacks, as safe functions over [`tch::Tensor`].

use tch::{Device, Kind, TchError, Tensor};

/// Memory that a tensor was wrapped around; dropped with the tensor's storage.
pub struct Mapping {
    _owner: Box<dyn std::any::Any + Send + Sync>,
}

#[cxx::bridge(namespace = "echelon")]
pub(crate) mod ffi {
    extern "Rust" {
        type Mapping;
    }
    unsafe extern "C++" {
        include!("shim.h");
        #[namespace = "at"]
        type Tensor;
        fn from_mapping(address: usize, shape: &[i64], dtype: i32, owner: Box<Mapping>) -> Result<UniquePtr<Tensor>>;
        fn set_grad(leaf: &Tensor, grad: &Tensor) -> Result<()>;
        fn clear_grad(leaf: &Tensor) -> Result<()>;
        fn backward_from(output: &Tensor, grad: &Tensor) -> Result<()>;
        #[allow(clippy::too_many_arguments)] // libtorch's own signature
        fn fused_adamw(
            param: &Tensor,
            grad: &Tensor,
            exp_avg: &Tensor,
            exp_avg_sq: &Tensor,
            step: &Tensor,
            lr: f64,
            beta1: f64,
            beta2: f64,
            weight_decay: f64,
            eps: f64,
        ) -> Result<()>;
        fn pack_with_mkl(weight: &Tensor, rows: i64) -> Result<UniquePtr<Tensor>>;
        fn pack_with_onednn(weight: &Tensor, rows: i64) -> Result<UniquePtr<Tensor>>;
        fn linear_with_mkl(
            x: &Tensor,
            packed: &Tensor,
            weight: &Tensor,
            bias: &Tensor,
            rows: i64,
        ) -> Result<UniquePtr<Tensor>>;
        fn linear_with_onednn(x: &Tensor, packed: &Tensor, bias: &Tensor) -> Result<UniquePtr<Tensor>>;
        include!("fused.h");
        fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<UniquePtr<Tensor>>;
        fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<UniquePtr<Tensor>>;
        fn swiglu(gate: &Tensor, up: &Tensor) -> Result<UniquePtr<Tensor>>;
        fn zeros_on_demand(numel: i64, dtype: i32) -> Result<UniquePtr<Tensor>>;
        fn take_pages(tensor: &Tensor) -> Result<()>;
        fn install_cpu_allocator();
        fn live_bytes() -> usize;
        fn peak_bytes() -> usize;
        fn reset_peak_bytes();
        fn taken_bytes() -> usize;
        fn give_back_kept();
        fn mapped_bytes() -> usize;
        fn torch_build() -> Result<String>;
        include!("accelerator.h");
        fn set_current_device(cuda_index: i32) -> Result<()>;
        fn device_live_bytes(cuda_index: i32) -> Result<usize>;
        fn device_peak_bytes(cuda_index: i32) -> Result<usize>;
        fn device_reset_peak_bytes(cuda_index: i32) -> Result<()>;
        fn device_reserved_bytes(cuda_index: i32) -> Result<usize>;
        fn device_free_bytes(cuda_index: i32) -> Result<usize>;
        fn device_total_bytes(cuda_index: i32) -> Result<usize>;
        fn device_give_back_kept(cuda_index: i32) -> Result<()>;
        fn pinned_zeros(numel: i64, dtype: i32) -> Result<UniquePtr<Tensor>>;
        fn pinned_bytes() -> usize;
        fn use_deterministic_algorithms(wanted: bool) -> Result<()>;
    }
}

pub(crate) fn raw(tensor: &Tensor) -> &ffi::Tensor {
    // SAFETY: a tch tensor's pointer is a valid `at::Tensor*` for as long as the tensor lives.
    unsafe { &*tensor.as_ptr().cast::<ffi::Tensor>() }
}

/// libtorch's `ScalarType` of the kinds that weights and batches come in.
fn scalar_type(kind: Kind) -> Result<i32, TchError> {
    match kind {
        Kind::Uint8 => Ok(0),
        Kind::Int8 => Ok(1),
        Kind::Int16 => Ok(2),
        Kind::Int => Ok(3),
        Kind::Int64 => Ok(4),
        Kind::Bool => Ok(11),
        Kind::Half => Ok(5),
        Kind::Float => Ok(6),
        Kind::Double => Ok(7),
        Kind::BFloat16 => Ok(15),
        other => Err(TchError::Kind(format!("{other:?} tensors cannot be mapped"))),
    }
}

pub(crate) fn torch_error(error: cxx::Exception) -> TchError {
    let first_line = error.what().lines().next().unwrap_or_default();
    TchError::Torch(first_line.to_string())
}

/// A tensor of `shape` and `kind` over memory at `address` that `owner` keeps alive. No byte is copied.
///
/// # Safety
/// `address` must point to `shape.product()` initialised elements of `kind`, aligned, that live as long as `owner`
/// and are not written while the tensor lives.
pub unsafe fn from_mapping(
    address: usize,
    shape: &[i64],
    kind: Kind,
    owner: Box<dyn std::any::Any + Send + Sync>,
) -> Result<Tensor, TchError> {
    let tensor = ffi::from_mapping(address, shape, scalar_type(kind)?, Box::new(Mapping { _owner: owner }))
        .map_err(torch_error)?;
    Ok(adopt(&tensor))
}

/// A flat tensor of `numel` zeros. On the CPU its memory is taken page by page, when it is first touched.
pub fn zeros_on_demand(numel: i64, kind: Kind, device: Device) -> Result<Tensor, TchError> {
    if device != Device::Cpu {
        return Tensor::f_zeros([numel], (kind, device));
    }
    Ok(adopt(&ffi::zeros_on_demand(numel, scalar_type(kind)?).map_err(torch_error)?))
}

/// Takes all memory of a tensor of [`zeros_on_demand`] at once. Call before zeros are read that will be written: a page that
/// is read first has to be taken twice.
pub fn take_pages(tensor: &Tensor) -> Result<(), TchError> {
    ffi::take_pages(raw(tensor)).map_err(torch_error)
}

pub(crate) fn adopt(tensor: &cxx::UniquePtr<ffi::Tensor>) -> Tensor {
    // SAFETY: `clone_from_ptr` makes a second handle of the same tensor; the first is dropped by its owner.
    unsafe { Tensor::clone_from_ptr(tensor.as_ptr().cast_mut().cast()) }
}

/// Makes `grad` the gradient of `leaf`: backward passes add into it in place.
pub fn set_grad(leaf: &Tensor, grad: &Tensor) -> Result<(), TchError> {
    ffi::set_grad(raw(leaf), raw(grad)).map_err(torch_error)
}

/// Forgets the gradient of `leaf`.
pub fn clear_grad(leaf: &Tensor) -> Result<(), TchError> {
    ffi::clear_grad(raw(leaf)).map_err(torch_error)
}

/// Backward from `output` with the incoming gradient `grad` (same shape); the graph is freed.
pub fn backward_from(output: &Tensor, grad: &Tensor) -> Result<(), TchError> {
    ffi::backward_from(raw(output), raw(grad)).map_err(torch_error)
}

/// One step of AdamW's hyper-parameters.
#[derive(Clone, Copy, Debug)]
pub struct AdamWStep {
    pub lr: f64,
    pub betas: (f64, f64),
    pub eps: f64,
    pub weight_decay: f64,
}

/// One AdamW step on `param` in one pass over memory; `step` (scalar f32) must already count this step.
pub fn fused_adamw(
    param: &Tensor,
    grad: &Tensor,
    exp_avg: &Tensor,
    exp_avg_sq: &Tensor,
    step: &Tensor,
    with: AdamWStep,
) -> Result<(), TchError> {
    ffi::fused_adamw(
        raw(param),
        raw(grad),
        raw(exp_avg),
        raw(exp_avg_sq),
        raw(step),
        with.lr,
        with.betas.0,
        with.betas.1,
        with.weight_decay,
        with.eps,
    )
    .map_err(torch_error)
}

/// Whether [`rms_norm`], [`rotate`] and [`swiglu`] take a tensor: f32 on the CPU.
pub fn fuses(x: &Tensor) -> bool {
    x.kind() == Kind::Float && x.device() == Device::Cpu
}

/// `x / rms(x) * weight` over the last dimension in one pass over memory, and its gradient in another.
///
/// # Errors
/// Another dtype, device or shape.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor, TchError> {
    Ok(adopt(&ffi::rms_norm(raw(x), raw(weight), eps).map_err(torch_error)?))
}

/// `[N, heads, D]` rotated by `cos` and `sin` `[N, 1, D / 2]`, halves as pairs, in one pass; differentiable.
///
/// # Errors
/// Another dtype, device or shape.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor, TchError> {
    Ok(adopt(&ffi::rotate(raw(x), raw(cos), raw(sin)).map_err(torch_error)?))
}

/// `silu(gate) * up` in one pass; differentiable.
///
/// # Errors
/// Another dtype or device, or two shapes.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor, TchError> {
    Ok(adopt(&ffi::swiglu(raw(gate), raw(up)).map_err(torch_error)?))
}

/// Makes libtorch use the counting, block-keeping CPU allocator. Call once, before the first tensor.
pub fn install_cpu_allocator() {
    ffi::install_cpu_allocator();
}

/// Makes `device` the calling thread's current one: what libtorch allocates without naming a device is there.
///
/// # Errors
/// There is no such device.
pub fn set_current_device(device: Device) -> Result<(), TchError> {
    match device {
        Device::Cuda(index) => ffi::set_current_device(index as i32).map_err(torch_error),
        _ => Ok(()),
    }
}

/// Bytes of the blocks that a device's allocator holds beyond what tensors hold: rounding, and freed blocks kept for later.
pub fn kept_bytes(device: Device) -> usize {
    let taken = match device {
        Device::Cuda(index) => ffi::device_reserved_bytes(index as i32).unwrap_or(0),
        _ => ffi::taken_bytes(),
    };
    taken.saturating_sub(live_bytes(device))
}

/// Gives the blocks that the device's allocator keeps for later back: to the system, after work of a kind that does not come
/// again; of a GPU, before another process needs them.
pub fn give_back_kept(device: Device) {
    match device {
        Device::Cuda(index) => ffi::device_give_back_kept(index as i32).unwrap_or(()),
        _ => ffi::give_back_kept(),
    }
}

/// Bytes of a GPU that nobody holds, and all of them. None of a CPU.
pub fn free_and_total_bytes(device: Device) -> Option<(usize, usize)> {
    let Device::Cuda(index) = device else { return None };
    Some((ffi::device_free_bytes(index as i32).ok()?, ffi::device_total_bytes(index as i32).ok()?))
}

/// A tensor of zeros in page-locked host memory, which a GPU reads and writes at full speed. It takes its bytes in whole pages,
/// and no more.
pub fn pinned_zeros(shape: &[i64], kind: Kind) -> Result<Tensor, TchError> {
    let flat = ffi::pinned_zeros(shape.iter().product(), scalar_type(kind)?).map_err(torch_error)?;
    adopt(&flat).f_view(shape)
}

/// Bytes live in tensors of [`pinned_zeros`].
pub fn pinned_bytes() -> usize {
    ffi::pinned_bytes()
}

/// From now on operators have one result for one input, on a GPU too; those that cannot throw.
pub fn use_deterministic_algorithms(wanted: bool) -> Result<(), TchError> {
    ffi::use_deterministic_algorithms(wanted).map_err(torch_error)
}

/// Bytes of mapped memory that tensors are wrapped around: no allocation, but a model's weights all the same.
pub fn mapped_bytes() -> usize {
    ffi::mapped_bytes()
}

/// Bytes now live in tensors on `device` (on the CPU, of tensors made since [`install_cpu_allocator`]). 0 where the
/// device keeps no count.
pub fn live_bytes(device: Device) -> usize {
    match device {
        Device::Cuda(index) => ffi::device_live_bytes(index as i32).unwrap_or(0),
        _ => ffi::live_bytes(),
    }
}

/// Most bytes live at once on `device` since the last [`reset_peak_bytes`].
pub fn peak_bytes(device: Device) -> usize {
    match device {
        Device::Cuda(index) => ffi::device_peak_bytes(index as i32).unwrap_or(0),
        _ => ffi::peak_bytes(),
    }
}

/// Starts a new peak measurement at what is live now.
pub fn reset_peak_bytes(device: Device) {
    match device {
        Device::Cuda(index) => ffi::device_reset_peak_bytes(index as i32).unwrap_or(()),
        _ => ffi::reset_peak_bytes(),
    }
}

/// How libtorch was built, in its own words: versions of CUDA and cuDNN among them, where its CUDA libraries are loaded.
pub fn torch_build() -> String {
    ffi::torch_build().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Resident memory of this process, in bytes.
    fn resident() -> i64 {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: i64 = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
        pages * rustix::param::page_size() as i64
    }

    #[test]
    fn zeros_cost_nothing_until_they_are_taken_and_then_all_at_once() {
        const BYTES: i64 = 256 << 20;
        let near = |taken: i64, expected: i64| (taken - expected).abs() < BYTES / 4; // other tests take memory too
        let before = resident();
        let zeros = zeros_on_demand(BYTES / 4, Kind::Float, Device::Cpu).unwrap();
        assert!(near(resident() - before, 0), "untouched");
        take_pages(&zeros).unwrap();
        assert!(near(resident() - before, BYTES), "taken");
        assert_eq!(zeros.abs().max().double_value(&[]), 0.0);
        drop(zeros);
    }
}
