//! What a GPU holds that is no tensor of a role: plans keep it free.

const MIB: u64 = 1 << 20;

/// Name and bytes. The context with libtorch's kernels and NCCL's buffers for the few groups of a run are those of typical
/// machines; `perf/memory_runtime_bytes` is what a run really had. libtorch gives cuBLAS 32 MiB for each thread that multiplies:
/// the device's and the backward pass's.
pub const RUNTIME: [(&str, u64); 3] =
    [("CUDA's context and kernels", 640 * MIB), ("cuBLAS workspaces", 64 * MIB), ("NCCL's buffers", 832 * MIB)];

/// Bytes of a GPU that the runtime takes beside the allocator.
pub fn runtime_bytes() -> u64 {
    RUNTIME.iter().map(|(_, bytes)| bytes).sum()
}
