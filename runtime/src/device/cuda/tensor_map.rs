//! Tensor maps: descriptors by which the tensor memory accelerator finds boxes of a tensor.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys;

use super::error::During;
use super::{CudaError, DevicePtr};

pub use sys::CUtensorMapDataType_enum as MapDType;
pub use sys::CUtensorMapSwizzle_enum as Swizzle;

/// A tensor map; passed by value to a `const __grid_constant__` parameter.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct TensorMap(sys::CUtensorMap);

/// What a tensor map describes. Dimensions are innermost first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorMapSpec {
    /// Name for messages.
    pub name: String,
    /// Element type.
    pub dtype: MapDType,
    /// First element.
    pub base: DevicePtr,
    /// Elements in each dimension.
    pub dims: Vec<u64>,
    /// Bytes between neighbours in each dimension but the innermost.
    pub strides: Vec<u64>,
    /// Elements of a box in each dimension.
    pub block: Vec<u32>,
    /// How rows of a box are swizzled in shared memory.
    pub swizzle: Swizzle,
}

impl TensorMapSpec {
    /// Boxes `[box_rows, box_cols]` of a row-major bf16 matrix `[rows, cols]` with 128-byte swizzle: box_cols = 64
    /// makes one row of a box one 128-byte line, what wgmma's K-major operands want.
    pub fn matrix_bf16(
        name: &str,
        base: DevicePtr,
        rows: u64,
        cols: u64,
        box_rows: u32,
        box_cols: u32,
    ) -> Self {
        TensorMapSpec {
            name: name.to_owned(),
            dtype: MapDType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            base,
            dims: vec![cols, rows],
            strides: vec![2 * cols],
            block: vec![box_cols, box_rows],
            swizzle: Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        }
    }

    /// All reasons for which the hardware would refuse this map; the driver only says "invalid value".
    pub fn misfits(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        let rank = self.dims.len();
        if !(1..=5).contains(&rank) || self.strides.len() + 1 != rank || self.block.len() != rank {
            let (s, b) = (self.strides.len(), self.block.len());
            return vec![format!(
                "{rank} dimensions, {s} strides and {b} box sizes, expected n <= 5, n - 1 and n"
            )];
        }
        if !self.base.is_multiple_of(16) {
            reasons.push(format!("address {:#x} is not a multiple of 16", self.base));
        }
        for (i, &d) in self
            .dims
            .iter()
            .enumerate()
            .filter(|(_, d)| !(1..=1 << 32).contains(*d))
        {
            reasons.push(format!(
                "dimension {i} has {d} elements, expected 1 to 2^32"
            ));
        }
        for (i, &s) in self
            .strides
            .iter()
            .enumerate()
            .filter(|(_, s)| !s.is_multiple_of(16) || **s >= 1 << 40)
        {
            reasons.push(format!(
                "stride {i} is {s} bytes, expected a multiple of 16 below 2^40"
            ));
        }
        for (i, &b) in self
            .block
            .iter()
            .enumerate()
            .filter(|(_, b)| !(1..=256).contains(*b))
        {
            reasons.push(format!(
                "the box has {b} elements in dimension {i}, expected 1 to 256"
            ));
        }
        let inner = u64::from(self.block[0]) * element_bytes(self.dtype);
        if !inner.is_multiple_of(16) {
            reasons.push(format!(
                "rows of the box have {inner} bytes, expected a multiple of 16"
            ));
        }
        let widest = match self.swizzle {
            Swizzle::CU_TENSOR_MAP_SWIZZLE_NONE => u64::MAX,
            Swizzle::CU_TENSOR_MAP_SWIZZLE_32B => 32,
            Swizzle::CU_TENSOR_MAP_SWIZZLE_64B => 64,
            _ => 128,
        };
        if inner > widest {
            reasons.push(format!(
                "rows of the box have {inner} bytes, the swizzle allows {widest}"
            ));
        }
        reasons
    }

    /// Encodes the map; a host computation of the driver.
    ///
    /// # Errors
    /// [`CudaError::TensorMap`] with all [`TensorMapSpec::misfits`]; the driver refuses nevertheless.
    pub fn encode(&self) -> Result<TensorMap, CudaError> {
        let reasons = self.misfits();
        if !reasons.is_empty() {
            return Err(CudaError::TensorMap {
                name: self.name.clone(),
                reason: reasons.join("; "),
            });
        }
        super::library::ensure(super::library::Library::Driver)?;
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let element_strides = vec![1u32; self.dims.len()];
        // SAFETY: all arrays have the lengths that the rank asks for (checked by `misfits`), the map has its
        // required alignment by its type, and the address is only recorded, not read.
        let code = unsafe {
            sys::cuTensorMapEncodeTiled(
                ptr::from_mut(&mut map),
                self.dtype,
                self.dims.len() as u32,
                self.base as *mut c_void,
                self.dims.as_ptr(),
                self.strides.as_ptr(),
                self.block.as_ptr(),
                element_strides.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                self.swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        code.result()
            .during(|| format!("encoding the tensor map of {}", self.name))?;
        Ok(TensorMap(map))
    }
}

fn element_bytes(dtype: MapDType) -> u64 {
    use MapDType as D;
    match dtype {
        D::CU_TENSOR_MAP_DATA_TYPE_UINT8 => 1,
        D::CU_TENSOR_MAP_DATA_TYPE_UINT16
        | D::CU_TENSOR_MAP_DATA_TYPE_FLOAT16
        | D::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 => 2,
        D::CU_TENSOR_MAP_DATA_TYPE_UINT64
        | D::CU_TENSOR_MAP_DATA_TYPE_INT64
        | D::CU_TENSOR_MAP_DATA_TYPE_FLOAT64 => 8,
        _ => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_maps_have_no_misfits() {
        assert_eq!(
            TensorMapSpec::matrix_bf16("w", 0x1000, 6144, 4096, 128, 64).misfits(),
            Vec::<String>::new()
        );
        let panels = TensorMapSpec {
            dims: vec![64, 6144, 64],
            strides: vec![8192, 128],
            block: vec![64, 128, 2],
            ..TensorMapSpec::matrix_bf16("w", 0x1000, 6144, 4096, 128, 64)
        };
        assert!(panels.misfits().is_empty());
    }

    #[test]
    fn all_misfits_are_named() {
        let error = TensorMapSpec::matrix_bf16("w", 0x1008, 6144, 4001, 300, 128)
            .encode()
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "tensor map of w: address 0x1008 is not a multiple of 16; stride 0 is 8002 bytes, expected a multiple of 16 \
             below 2^40; the box has 300 elements in dimension 1, expected 1 to 256; rows of the box have 256 bytes, \
             the swizzle allows 128"
        );
    }
}
