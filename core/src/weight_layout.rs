//! How the weights of linear layers lie in memory while products have few rows, as decoding's have.
//!
//! Where a product has few rows, laying its weight out anew at every call (which BLAS does) costs more than the product:
//! a library's own layout, made once, avoids that at the price of a second copy. Which library is fastest, and for which
//! dtypes it has a layout at all, depends on the processor: `echelon_generation` measures it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tch::{TchError, Tensor};

use crate::shim::{adopt, ffi, raw, torch_error};

/// Decoding steps that pay for laying the weights out.
pub const STEPS_THAT_PAY: usize = 12;

/// A layout of a linear layer's weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightLayout {
    /// As the model has it: no second copy.
    #[default]
    Plain,
    /// MKL's (f32).
    Mkl,
    /// oneDNN's (f32 and bf16).
    OneDnn,
}

impl WeightLayout {
    pub const ALL: [WeightLayout; 3] = [WeightLayout::Plain, WeightLayout::Mkl, WeightLayout::OneDnn];

    pub fn name(self) -> &'static str {
        match self {
            WeightLayout::Plain => "plain",
            WeightLayout::Mkl => "mkl",
            WeightLayout::OneDnn => "onednn",
        }
    }
}

impl fmt::Display for WeightLayout {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for WeightLayout {
    type Err = String;

    fn from_str(name: &str) -> Result<WeightLayout, String> {
        let known = WeightLayout::ALL.into_iter().find(|layout| layout.name() == name);
        known.ok_or_else(|| format!("expected plain, mkl or onednn, found `{name}`"))
    }
}

/// A linear layer with its weight laid out once for products with a fixed number of rows.
#[derive(Debug)]
pub struct PackedLinear {
    weight: Tensor,
    bias: Tensor,
    packed: Tensor,
    layout: WeightLayout,
    rows: i64,
}

impl PackedLinear {
    /// Lays `weight` `[out, in]` out for inputs of `rows` rows. None where `layout` is the plain one, or this build of
    /// libtorch has no such layout for the weight's dtype and device.
    ///
    /// # Errors
    /// libtorch's: memory runs out, or this processor lacks what the layout needs.
    pub fn new(
        weight: &Tensor,
        bias: Option<&Tensor>,
        rows: i64,
        layout: WeightLayout,
    ) -> Result<Option<PackedLinear>, TchError> {
        let packed = match layout {
            WeightLayout::Plain => return Ok(None),
            WeightLayout::Mkl => ffi::pack_with_mkl(raw(weight), rows),
            WeightLayout::OneDnn => ffi::pack_with_onednn(raw(weight), rows),
        };
        let packed = adopt(&packed.map_err(torch_error)?);
        let bias = bias.map_or_else(Tensor::new, Tensor::shallow_clone);
        Ok(packed.defined().then(|| PackedLinear { weight: weight.shallow_clone(), bias, packed, layout, rows }))
    }

    /// `[rows, in]` to `[rows, out]`; no gradient.
    ///
    /// # Errors
    /// libtorch's, about shapes and dtypes, or what this processor lacks.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let [x, packed, weight, bias] = [x, &self.packed, &self.weight, &self.bias].map(raw);
        let out = match self.layout {
            WeightLayout::Mkl => ffi::linear_with_mkl(x, packed, weight, bias, self.rows),
            _ => ffi::linear_with_onednn(x, packed, bias),
        };
        Ok(adopt(&out.map_err(torch_error)?))
    }

    /// Rows that an input must have.
    pub fn rows(&self) -> i64 {
        self.rows
    }
}
