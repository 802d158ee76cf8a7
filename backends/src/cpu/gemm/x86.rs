//! AVX-512 and AVX2 vectors, and AVX-512 with a matrix unit.

use std::sync::OnceLock;

use super::kernel::Isa;
use super::matrix::amx;

pub(super) use avx512::Avx512;

/// The x86 instruction sets this machine has, best first.
pub(super) fn available() -> [Option<&'static Isa>; 3] {
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq");
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    static AMX: OnceLock<Option<Isa>> = OnceLock::new();
    let amx = || AMX.get_or_init(|| Some(Isa { name: "amx", matrix: Some(amx::detect()?), ..avx512::ISA })).as_ref();
    [avx512.then(amx).flatten(), avx512.then_some(&avx512::ISA), avx2.then_some(&avx2::ISA)]
}

mod avx512 {
    use std::arch::x86_64::*;

    use half::{bf16, f16};

    use crate::cpu::gemm::Storage;
    use crate::cpu::gemm::kernel::{Simd, Source, isa};

    /// 512-bit vectors.
    #[derive(Clone, Copy)]
    pub(in crate::cpu::gemm) struct Avx512;

    // SAFETY (all of it): called only from functions compiled for, and after detection of, these features; pointers are
    // valid by the trait's contract.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Simd for Avx512 {
        type V = __m512;
        const LANES: usize = 16;
        const COL: usize = 16;
        #[inline(always)]
        unsafe fn zero() -> __m512 {
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m512) {
            unsafe { _mm512_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const bf16) -> __m512 {
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        unsafe fn store_bf16(p: *mut bf16, v: __m512) {
            unsafe {
                let bits = _mm512_castps_si512(v);
                let upper = _mm512_srli_epi32::<16>(bits);
                let odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
                let up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
                let rounded = _mm512_srli_epi32::<16>(up);
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
                let out = _mm512_mask_or_epi32(rounded, nan, upper, _mm512_set1_epi32(0x40));
                _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(out));
            }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const f16) -> __m512 {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
        }
        #[inline(always)]
        unsafe fn store_f16(p: *mut f16, v: __m512) {
            unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
        }
        #[inline(always)]
        unsafe fn copy_few<T: Source>(src: *const T, n: usize, dst: *mut f32) {
            unsafe {
                let mask = ((1u32 << n) - 1) as u16;
                let v = match T::STORAGE {
                    Storage::F32 => _mm512_maskz_loadu_ps(mask, src.cast()),
                    Storage::Bf16 => {
                        let wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, src.cast()));
                        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
                    }
                    Storage::F16 => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, src.cast())),
                };
                _mm512_storeu_ps(dst, v);
            }
        }
        #[inline(always)]
        unsafe fn transpose(rows: &mut [__m512; 16]) {
            unsafe {
                // Within groups of 4 rows: u[4g + q] holds in its 128-bit lane l column 4l + q of rows 4g..4g+4.
                let mut u = [_mm512_setzero_ps(); 16];
                for g in 0..4 {
                    let (a, b, c, d) = (rows[4 * g], rows[4 * g + 1], rows[4 * g + 2], rows[4 * g + 3]);
                    let ab = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
                    let cd = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
                    u[4 * g] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
                    u[4 * g + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
                    let ab = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
                    let cd = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
                    u[4 * g + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
                    u[4 * g + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
                }
                // Then a 4 x 4 transpose of lanes for each q.
                for q in 0..4 {
                    let even_lo = _mm512_shuffle_f32x4::<0x88>(u[q], u[4 + q]);
                    let even_hi = _mm512_shuffle_f32x4::<0x88>(u[8 + q], u[12 + q]);
                    let odd_lo = _mm512_shuffle_f32x4::<0xdd>(u[q], u[4 + q]);
                    let odd_hi = _mm512_shuffle_f32x4::<0xdd>(u[8 + q], u[12 + q]);
                    rows[q] = _mm512_shuffle_f32x4::<0x88>(even_lo, even_hi);
                    rows[4 + q] = _mm512_shuffle_f32x4::<0x88>(odd_lo, odd_hi);
                    rows[8 + q] = _mm512_shuffle_f32x4::<0xdd>(even_lo, even_hi);
                    rows[12 + q] = _mm512_shuffle_f32x4::<0xdd>(odd_lo, odd_hi);
                }
            }
        }
        #[inline(always)]
        unsafe fn split_bf16(v: __m512) -> (__m512, __m512) {
            unsafe {
                let bits = _mm512_castps_si512(v);
                let upper = _mm512_and_si512(bits, _mm512_set1_epi32(!0xffff));
                (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)), _mm512_castsi512_ps(upper))
            }
        }
        #[inline(always)]
        unsafe fn prefetch(p: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
        #[inline(always)]
        unsafe fn prefetch_l2(p: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
        }
    }

    // 28 accumulators, 2 vectors of B and a broadcast fill the 32 registers.
    isa!(#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")] "avx512", Avx512,
        [1 x 8, 2 x 8, 3 x 8, 4 x 4, 5 x 4, 6 x 4, 7 x 2, 8 x 2, 9 x 2, 10 x 2, 11 x 2, 12 x 2, 13 x 2, 14 x 2]);
}

mod avx2 {
    use std::arch::x86_64::*;

    use half::{bf16, f16};

    use crate::cpu::gemm::Storage;
    use crate::cpu::gemm::kernel::{Simd, Source, isa};

    /// 256-bit vectors with FMA.
    #[derive(Clone, Copy)]
    pub(super) struct Avx2;

    // SAFETY (all of it): as for AVX-512.
    #[allow(clippy::undocumented_unsafe_blocks)]
    impl Simd for Avx2 {
        type V = __m256;
        const LANES: usize = 8;
        const COL: usize = 8;
        #[inline(always)]
        unsafe fn zero() -> __m256 {
            unsafe { _mm256_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> __m256 {
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m256 {
            unsafe { _mm256_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m256) {
            unsafe { _mm256_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn add(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const bf16) -> __m256 {
            unsafe {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        unsafe fn store_bf16(p: *mut bf16, v: __m256) {
            unsafe {
                let bits = _mm256_castps_si256(v);
                let upper = _mm256_srli_epi32::<16>(bits);
                let odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
                let up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
                let rounded = _mm256_srli_epi32::<16>(up);
                let quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
                let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
                let out = _mm256_blendv_epi8(rounded, quiet, nan);
                let packed = _mm256_permute4x64_epi64::<0x08>(_mm256_packus_epi32(out, out));
                _mm_storeu_si128(p.cast(), _mm256_castsi256_si128(packed));
            }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const f16) -> __m256 {
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
        }
        #[inline(always)]
        unsafe fn store_f16(p: *mut f16, v: __m256) {
            unsafe { _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
        }
        #[inline(always)]
        unsafe fn copy_few<T: Source>(src: *const T, n: usize, dst: *mut f32) {
            if T::STORAGE == Storage::F32 {
                const MASK: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
                unsafe {
                    let mask = _mm256_loadu_si256(MASK.as_ptr().add(8 - n).cast());
                    _mm256_storeu_ps(dst, _mm256_maskload_ps(src.cast(), mask));
                }
                return;
            }
            for i in 0..n {
                unsafe { *dst.add(i) = (*src.add(i)).to_f32() };
            }
        }
        #[inline(always)]
        unsafe fn transpose(rows: &mut [__m256; 16]) {
            unsafe {
                // Within groups of 4 rows: u[4g + q] holds in its 128-bit lane l column 4l + q of rows 4g..4g+4.
                let mut u = [_mm256_setzero_ps(); 8];
                for g in 0..2 {
                    let (a, b, c, d) = (rows[4 * g], rows[4 * g + 1], rows[4 * g + 2], rows[4 * g + 3]);
                    let ab = _mm256_castps_pd(_mm256_unpacklo_ps(a, b));
                    let cd = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
                    u[4 * g] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
                    u[4 * g + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
                    let ab = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
                    let cd = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
                    u[4 * g + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
                    u[4 * g + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
                }
                for q in 0..4 {
                    let (lo, hi) = (u[q], u[4 + q]);
                    rows[q] = _mm256_permute2f128_ps::<0x20>(lo, hi);
                    rows[4 + q] = _mm256_permute2f128_ps::<0x31>(lo, hi);
                }
            }
        }
        #[inline(always)]
        unsafe fn split_bf16(v: __m256) -> (__m256, __m256) {
            unsafe {
                let bits = _mm256_castps_si256(v);
                let upper = _mm256_and_si256(bits, _mm256_set1_epi32(!0xffff));
                (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits)), _mm256_castsi256_ps(upper))
            }
        }
        #[inline(always)]
        unsafe fn prefetch(p: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
        #[inline(always)]
        unsafe fn prefetch_l2(p: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
        }
    }

    // 12 accumulators, 2 vectors of B and a broadcast of 16 registers.
    isa!(#[target_feature(enable = "avx2,fma,f16c")] "avx2", Avx2, [1 x 8, 2 x 4, 3 x 4, 4 x 2, 5 x 2, 6 x 2]);
}
