//! Dtypes by safetensors' names and by libtorch's.

use safetensors::Dtype;
use tch::Kind;

pub(crate) fn kind_of(dtype: Dtype) -> Option<Kind> {
    DTYPES.iter().find(|(found, _)| *found == dtype).map(|(_, kind)| *kind)
}

pub(crate) fn dtype_of(kind: Kind) -> Option<Dtype> {
    DTYPES.iter().find(|(_, found)| *found == kind).map(|(dtype, _)| *dtype)
}

const DTYPES: [(Dtype, Kind); 10] = [
    (Dtype::BOOL, Kind::Bool),
    (Dtype::U8, Kind::Uint8),
    (Dtype::I8, Kind::Int8),
    (Dtype::I16, Kind::Int16),
    (Dtype::F16, Kind::Half),
    (Dtype::BF16, Kind::BFloat16),
    (Dtype::I32, Kind::Int),
    (Dtype::F32, Kind::Float),
    (Dtype::F64, Kind::Double),
    (Dtype::I64, Kind::Int64),
];
