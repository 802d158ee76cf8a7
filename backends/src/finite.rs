//! Values that are not finite, in bytes copied from a device.

use moebius_ir::DType;

/// Index and value of the first element that is not finite.
pub(crate) fn non_finite(dtype: DType, bytes: &[u8]) -> Option<(usize, f32)> {
    let at = |n: usize, value: &dyn Fn(&[u8]) -> f32| {
        bytes.chunks_exact(n).map(value).enumerate().find(|(_, v)| !v.is_finite())
    };
    let half = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
    match dtype {
        DType::F32 => at(4, &|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        DType::Bf16 => at(2, &|b| half::bf16::from_bits(half(b)).to_f32()),
        DType::F16 => at(2, &|b| half::f16::from_bits(half(b)).to_f32()),
        DType::I32 | DType::U32 | DType::Bool => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_value_that_is_not_finite_is_found_in_every_float_type() {
        let f32s: Vec<u8> = [1.0f32, f32::NAN, f32::INFINITY].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert!(non_finite(DType::F32, &f32s).is_some_and(|(i, v)| i == 1 && v.is_nan()));
        let halves: Vec<u8> = [0x3c00u16, 0x0000, 0xfc00].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(non_finite(DType::F16, &halves), Some((2, f32::NEG_INFINITY)));
        assert_eq!((non_finite(DType::Bf16, &halves), non_finite(DType::I32, &f32s)), (None, None));
    }
}
