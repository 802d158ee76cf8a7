//! The matrix unit bit for bit against its arithmetic written out, and what it must not touch.

use half::{bf16, f16};

use super::*;
use crate::cpu::gemm::kernel::{self, Isa};
use crate::cpu::gemm::{Batch, Gather, Gemm, Stored, drive};

/// The instruction set with a unit, where there is one.
fn unit() -> Option<&'static Isa> {
    kernel::available().find(|isa| isa.matrix.is_some())
}

/// Numbers of all sizes from 2^-12 to 2^12, which every type can hold, and some zeros.
fn numbers(len: usize, mut seed: u64) -> Vec<f32> {
    let mut next = || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) as u32
    };
    (0..len)
        .map(|_| match next() % 9 {
            0 => 0.0,
            _ => f32::from_bits((next() & 0x807f_ffff) | ((115 + next() % 24) << 23)),
        })
        .collect()
}

/// The parts of a number, largest first.
fn parts_of(x: f32) -> [f32; 3] {
    let round = |x: f32| f32::from_bits((x.to_bits() + 0x8000) & 0xffff_0000);
    let first = round(x);
    let second = round(x - first);
    [first, second, x - first - second]
}

/// One element of C, as the head of [`super`] says.
fn element(k: usize, products: &[(usize, usize)], a: impl Fn(usize) -> f32, b: impl Fn(usize) -> f32) -> f32 {
    let mut c = 0.0f32;
    for block in (0..k).step_by(STEP) {
        for &(i, j) in products {
            let chain = |half: usize| {
                (block + half * TILE..(block + (half + 1) * TILE).min(k))
                    .fold(0.0f32, |sum, p| parts_of(a(p))[i].mul_add(parts_of(b(p))[j], sum))
            };
            c += chain(0) + chain(1);
        }
    }
    c
}

fn run(isa: &'static Isa, gemm: &Gemm<'_>, threads: usize) {
    let bytes = drive::workspace_bytes(isa, gemm.m, gemm.n, gemm.k, gemm.c.storage, threads);
    // SAFETY: the callers' operands have the sizes they say.
    unsafe { drive::run(isa, gemm, &mut vec![0xff; bytes], threads) }.unwrap();
}

/// A product of `T` with every layout of both operands, bit for bit.
fn check<T: Stored, U: Stored>([m, n, k]: [usize; 3]) {
    let Some(isa) = unit() else { return };
    let a: Vec<T> = numbers(m * k, 1 + k as u64).into_iter().map(T::from_f32).collect();
    let b: Vec<U> = numbers(k * n, 2 + n as u64).into_iter().map(U::from_f32).collect();
    for (a_strides, b_strides) in [((k, 1), (n, 1)), ((1, m), (1, k)), ((k, 1), (1, k)), ((1, m), (n, 1))] {
        let mut c = vec![f32::NAN; m * n];
        let mat = |(row, col): (usize, usize)| (row as isize, col as isize);
        let (left, right) = (mat(a_strides), mat(b_strides));
        let gemm = Gemm::new(
            m,
            n,
            k,
            Mat::new(a.as_ptr(), left.0, left.1),
            Mat::new(b.as_ptr(), right.0, right.1),
            crate::cpu::gemm::MatMut::new(c.as_mut_ptr(), n as isize, 1),
        );
        run(isa, &gemm, 1);
        for (at, &got) in c.iter().enumerate() {
            let of_a = |p: usize| a[at / n * a_strides.0 + p * a_strides.1].to_f32();
            let of_b = |p: usize| b[p * b_strides.0 + at % n * b_strides.1].to_f32();
            let wanted = element(k, products(T::STORAGE, U::STORAGE), of_a, of_b);
            assert_eq!(got.to_bits(), wanted.to_bits(), "{m} {n} {k} at {at}: {got} for {wanted}");
            let exact: f64 = (0..k).map(|p| f64::from(of_a(p)) * f64::from(of_b(p))).sum();
            let size: f64 = (0..k).map(|p| (f64::from(of_a(p)) * f64::from(of_b(p))).abs()).sum();
            let error = (f64::from(got) - exact).abs();
            assert!(
                error <= size * (k as f64 + 6.0) * 2f64.powi(-24),
                "{m} {n} {k} at {at}: {got} for {exact}, {error} of {size}"
            );
        }
    }
}

#[test]
fn sums_have_the_bits_of_their_parts_and_the_accuracy_of_f32() {
    for shape in [[15, 16, 16], [33, 40, 70], [70, 96, 300], [300, 72, 33], [240, 33, 270]] {
        check::<f32, f32>(shape);
    }
}

#[test]
fn types_of_16_bits_have_fewer_parts() {
    for shape in [[40, 48, 65], [17, 33, 290]] {
        check::<bf16, bf16>(shape);
        check::<bf16, f32>(shape);
        check::<f32, bf16>(shape);
        check::<f16, f16>(shape);
        check::<f16, f32>(shape);
        check::<f32, f16>(shape);
        check::<f16, bf16>(shape);
        check::<bf16, f16>(shape);
    }
}

/// The unit's sums of f32 are not less exact than chains of multiply-adds of f32.
#[test]
fn errors_are_those_of_f32() {
    let Some(isa) = unit() else { return };
    let chain = kernel::available().find(|isa| isa.matrix.is_none()).unwrap();
    for k in [16, 64, 256, 1000] {
        let (m, n) = (64, 64);
        let (a, b) = (numbers(m * k, 8), numbers(k * n, 9));
        // Of like size, so that many of them count.
        let tame = |x: &Vec<f32>| x.iter().map(|x| f32::from_bits(x.to_bits() & 0x807f_ffff | 0x3f80_0000)).collect();
        let (a, b): (Vec<f32>, Vec<f32>) = (tame(&a), tame(&b));
        let root_mean_square = |isa: &'static Isa| {
            let mut c = vec![f32::NAN; m * n];
            let to = crate::cpu::gemm::MatMut::new(c.as_mut_ptr(), n as isize, 1);
            let (left, right) = (Mat::new(a.as_ptr(), k as isize, 1), Mat::new(b.as_ptr(), n as isize, 1));
            run(isa, &Gemm::new(m, n, k, left, right, to), 1);
            let error = |at: usize| {
                let terms = (0..k).map(|p| f64::from(a[at / n * k + p]) * f64::from(b[p * n + at % n]));
                f64::from(c[at]) - terms.sum::<f64>()
            };
            ((0..m * n).map(|at| error(at).powi(2)).sum::<f64>() / (m * n) as f64).sqrt()
        };
        let (unit, chain) = (root_mean_square(isa), root_mean_square(chain));
        assert!(unit <= chain, "k {k}: {unit:.2e} on the unit, {chain:.2e} by chains");
    }
}

#[test]
fn every_number_is_the_sum_of_its_parts() {
    for x in numbers(100_000, 7) {
        let [first, second, third] = parts_of(x);
        assert_eq!(f64::from(first) + f64::from(second) + f64::from(third), f64::from(x));
        for part in [first, second, third] {
            assert_eq!(part.to_bits() & 0xffff, 0, "{x} has a part {part}");
        }
    }
}

/// What the chain of multiply-adds gives, where the parts of an infinite number would give NaN.
#[test]
fn what_is_not_finite_is_what_the_other_kernels_give() {
    let Some(isa) = unit() else { return };
    let chain = kernel::available().find(|isa| isa.matrix.is_none()).unwrap();
    let (m, n, k) = (70, 50, 300);
    let rows: Vec<i32> = (0..m as i32).map(|i| if i == 40 { -1 } else { i }).collect();
    let specials = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::from_bits(u32::MAX), f32::MAX, -f32::MAX, 3e38];
    for (which, special) in specials.into_iter().enumerate() {
        let (mut a, mut b) = (numbers(m * k, 3), numbers(k * n, 4));
        a[5 * k + 3] = special;
        a[33 * k + 299] = special;
        b[200 * n + 17] = -special;
        let product = |isa: &'static Isa, c: &mut [f32]| {
            let c = crate::cpu::gemm::MatMut::new(c.as_mut_ptr(), n as isize, 1);
            let (a, b) = (Mat::new(a.as_ptr(), k as isize, 1), Mat::new(b.as_ptr(), n as isize, 1));
            run(isa, &Gemm { gather: Some(Gather { rows: &rows, source_rows: m }), ..Gemm::new(m, n, k, a, b, c) }, 1);
        };
        let (mut got, mut wanted) = (vec![0.0; m * n], vec![0.0; m * n]);
        product(isa, &mut got);
        product(chain, &mut wanted);
        let mut special_sums = 0;
        for (at, (&got, &wanted)) in got.iter().zip(&wanted).enumerate() {
            if wanted.is_finite() {
                let (a, b) = (&a[at / n * k..][..k], b[at % n..].iter().step_by(n));
                let size: f64 = a.iter().zip(b).map(|(a, b)| (f64::from(*a) * f64::from(*b)).abs()).sum();
                assert!(
                    (f64::from(got) - f64::from(wanted)).abs() <= size * 1e-5,
                    "{which} at {at}: {got} for {wanted}"
                );
            } else {
                special_sums += 1;
                assert!(got == wanted || got.is_nan() && wanted.is_nan(), "{which} at {at}: {got} for {wanted}");
            }
        }
        assert!(special_sums > 0, "{which}");
    }
}

/// Few rows of many run on the unit too, and segments of any length have the bits of a product by itself.
#[test]
fn a_row_of_a_segment_has_the_bits_of_a_row_among_many() {
    let Some(isa) = unit() else { return };
    let (m, n, k, offsets) = (200, 96, 130, [0, 1, 1, 30, 35, 170]);
    let (a, b) = (numbers(m * k, 5), numbers(5 * k * n, 6));
    let mut grouped = vec![f32::NAN; m * n];
    let of_a = Mat::new(a.as_ptr(), k as isize, 1);
    let to = |c: &mut [f32]| crate::cpu::gemm::MatMut::new(c.as_mut_ptr(), n as isize, 1);
    let of_b = |e: usize| Mat::new(b[e * k * n..].as_ptr(), n as isize, 1);
    let batch = Batch::MGrouped { offsets: &offsets, b: (k * n) as isize };
    run(isa, &Gemm { batch, ..Gemm::new(m, n, k, of_a, of_b(0), to(&mut grouped)) }, 1);
    for e in 0..5 {
        let mut all = vec![f32::NAN; m * n];
        run(isa, &Gemm::new(m, n, k, of_a, of_b(e), to(&mut all)), 1);
        let segment = offsets[e] as usize * n..offsets[e + 1] as usize * n;
        assert!(grouped[segment.clone()] == all[segment], "expert {e}");
    }
    assert!(grouped[170 * n..].iter().all(|&x| x == 0.0));
}
