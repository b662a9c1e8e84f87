//! TP-2: what a rank holds of a checkpoint, counted by the allocator.

use std::path::Path;

use echelon_core::shape::{ModelShape, TensorParallelAxis, TensorParallelPart};
use echelon_core::shim;
use echelon_models::checkpoint::Checkpoint;
use echelon_models::config::DecoderConfig;
use tch::{Device, Kind, Tensor};

#[path = "common/mapped.rs"]
mod mapped;

use mapped::lies_in;

fn numel(shape: &ModelShape, which: impl Fn(TensorParallelAxis) -> bool) -> usize {
    let params = shape.units.iter().flat_map(|unit| &unit.params);
    params.filter(|param| which(param.axis)).map(|param| param.numel() as usize).sum()
}

/// One test for all of it: the allocator's count is the process's, and the tests of a file share one.
#[test]
fn a_rank_holds_its_slices_and_no_more() {
    shim::install_cpu_allocator();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/checkpoints");
    for (name, stored) in [("llama2_untied_mha", Kind::Float), ("llama3_scaled_bf16", Kind::BFloat16)] {
        let folder = root.join(name);
        let config = DecoderConfig::read(&folder).unwrap();
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let whole = config.shape();
        for size in [1, 2, 4] {
            let mut split = 0;
            for rank in 0..size {
                let part = TensorParallelPart { rank, size };
                let shape = whole.sliced(part).unwrap();
                for kind in [stored, Kind::Double] {
                    let before = shim::live_bytes(Device::Cpu);
                    let mut load = checkpoint.slice_loader(&config, kind, Device::Cpu, part).unwrap();
                    let params = || shape.units.iter().flat_map(|unit| &unit.params);
                    let slices: Vec<Tensor> = params().map(|param| load(&param.name).unwrap()).collect();
                    let grown = shim::live_bytes(Device::Cpu) - before;
                    let copied = numel(&shape, |axis| kind != stored || axis == TensorParallelAxis::Columns);
                    let exact = copied * kind.elt_size_in_bytes();
                    // A block has a header and is rounded up: 128 bytes at most for tensors of these sizes.
                    assert!(
                        (exact..=exact + 128 * slices.len()).contains(&grown),
                        "{name} {part:?} {kind:?}: {grown}, {exact}"
                    );
                    for (param, slice) in params().zip(&slices) {
                        assert_eq!(slice.size(), param.shape, "{}", param.name);
                        let mapped = kind == stored && param.axis != TensorParallelAxis::Columns;
                        assert_eq!(lies_in(&folder, slice), mapped, "{}", param.name);
                        let of =
                            whole.units.iter().flat_map(|unit| &unit.params).find(|p| p.name == param.name).unwrap();
                        let full = checkpoint.tensor(&of.name, &of.shape).unwrap();
                        let slice_of = whole.slice(of, part);
                        let expected = full.narrow(slice_of.dim as i64, slice_of.start, slice_of.length).to_kind(kind);
                        assert_eq!(*slice, expected, "{}", param.name);
                    }
                }
                split += numel(&shape, |axis| matches!(axis, TensorParallelAxis::Rows | TensorParallelAxis::Columns));
            }
            let divided = numel(&whole, |axis| matches!(axis, TensorParallelAxis::Rows | TensorParallelAxis::Columns));
            assert_eq!(split, divided, "{name}: the slices of {size} ranks are the model");
        }
    }
}
