use std::path::PathBuf;

pub type Result<T, E = ModelError> = std::result::Result<T, E>;

/// Why a model folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: {source}", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{}: `{key}`: expected {expected}, found {found}", path.display())]
    Config { path: PathBuf, key: String, expected: String, found: String },
    #[error("{}: architecture `{found}` is not one of {supported}", path.display())]
    Architecture { path: PathBuf, found: String, supported: String },
    #[error("{}: no model.safetensors and no model.safetensors.index.json here", folder.display())]
    NoWeights { folder: PathBuf },
    #[error("{}: {source}", path.display())]
    Shared { path: PathBuf, source: Box<echelon_core::store::StoreError> },
    #[error("{}: tensor `{tensor}` is missing{hint}", file.display())]
    MissingTensor { file: PathBuf, tensor: String, hint: String },
    #[error("{}: tensor `{tensor}`: expected shape {expected:?}, found {found:?}", file.display())]
    TensorShape { file: PathBuf, tensor: String, expected: Vec<i64>, found: Vec<i64> },
    #[error("{}: tensor `{tensor}`: expected dtype F32, F16 or BF16, found {found}", file.display())]
    TensorDtype { file: PathBuf, tensor: String, found: String },
    #[error("{}: truncated or damaged: expected {expected}, found {found}", file.display())]
    Damaged { file: PathBuf, expected: String, found: String },
    #[error("{}: {source}", path.display())]
    Write { path: PathBuf, source: echelon_core::zero::StateFileError },
    #[error("{model}: {source}")]
    Split { model: String, source: echelon_core::shape::SplitError },
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
}

impl From<ModelError> for echelon_core::Error {
    fn from(error: ModelError) -> echelon_core::Error {
        match error {
            ModelError::Torch(source) => source.into(), // such as a device without room
            error => echelon_core::Error::other("model", error),
        }
    }
}
