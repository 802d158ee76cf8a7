//! Tests of the tile products.

use super::*;

fn values(n: usize, seed: u32) -> Vec<f32> {
    (0..n as u32).map(|i| ((i.wrapping_mul(2_654_435_761) ^ seed) >> 8) as f32 / 8_388_608.0 - 1.0).collect()
}

#[test]
fn a_product_is_the_sum_over_k_wherever_it_lies() {
    for [m, n, k] in [[1, 16, 1], [1, 1, 5], [19, 1, 7], [7, 16, 3], [64, 64, 64], [13, 48, 5], [8, 32, 0], [21, 80, 9]]
    {
        let (ldb, ldc) = (n + 3, n + 5);
        let (a, b) = (values(m * k + m, 7), values(k * ldb + n, 9));
        for transposed in [false, true] {
            let (row, step) = if transposed { (1, m) } else { (k, 1) };
            let factor = values(m, 11);
            for mode in 0..3 {
                let before = values(m * ldc, 3);
                let mut c = if mode == 0 { vec![f32::NAN; m * ldc] } else { before.clone() };
                let start = [Start::Zero, Start::Keep, Start::Scaled(&factor)][mode];
                product([m, n, k], Left { data: &a, row, step }, (&b, ldb), start, (&mut c, ldc));
                for i in 0..m {
                    for j in 0..n {
                        let mut want =
                            [0.0, before[i * ldc + j] as f64, (before[i * ldc + j] * factor[i]) as f64][mode];
                        for p in 0..k {
                            want += a[i * row + p * step] as f64 * b[p * ldb + j] as f64;
                        }
                        let got = c[i * ldc + j] as f64;
                        assert!((got - want).abs() < 1e-5, "{m} {n} {k} {mode}: ({i}, {j}) {got} {want}");
                    }
                }
            }
            // One row or one column alone has the same bits as inside the whole.
            let mut whole = vec![0.0; m * ldc];
            product([m, n, k], Left { data: &a, row, step }, (&b, ldb), Start::Zero, (&mut whole, ldc));
            for i in 0..m {
                let mut one = vec![0.0; n];
                product([1, n, k], Left { data: &a[i * row..], row, step }, (&b, ldb), Start::Zero, (&mut one, n));
                assert_eq!(one, whole[i * ldc..][..n]);
            }
            let mut column = vec![0.0; m];
            product([m, 1, k], Left { data: &a, row, step }, (&b[n / 2..], ldb), Start::Zero, (&mut column, 1));
            for i in 0..m {
                assert_eq!(column[i], whole[i * ldc + n / 2]);
            }
        }
    }
}

#[test]
fn dots_have_the_bits_of_a_product_of_one_column() {
    for (count, k) in [(0, 3), (1, 1), (7, 64), (8, 8), (9, 5), (31, 20), (32, 64), (64, 64), (61, 33), (40, 0)] {
        let ld = k + 3;
        let (rows, x) = (values(count * ld + k, 1), values(k, 2));
        let (mut got, mut want) = (vec![f32::NAN; count], vec![f32::NAN; count]);
        dots(count, k, (&rows, ld), &x, &mut got);
        product([count, 1, k], Left { data: &rows, row: ld, step: 1 }, (&x, 1), Start::Zero, (&mut want, 1));
        assert_eq!(got, want, "{count} {k}");
    }
}

#[test]
fn every_instruction_set_gives_the_same_sums() {
    for [m, n, k] in [[1, 64, 9], [1, 208, 9], [19, 48, 7], [13, 1, 5], [6, 16, 20], [8, 80, 3]] {
        let (a, b, factor) = (values(m * k, 7), values(k * n, 9), values(m, 5));
        let left = Left { data: &a, row: k, step: 1 };
        for start in [Start::Zero, Start::Keep, Start::Scaled(&factor)] {
            let before = values(m * n, 3);
            let run = |f: &dyn Fn(Args<'_>)| {
                let mut c = before.clone();
                f(Args { m, n, k, left, b: b.as_ptr(), ldb: n, start, c: c.as_mut_ptr(), ldc: n });
                c
            };
            let mut want = before.clone();
            product([m, n, k], left, (&b, n), start, (&mut want, n));
            let portable = run(&|args| {
                // SAFETY: the operands are as `product` just checked them.
                unsafe { blocks::<[f32; 4], f32, 4, 4, 4>(args, 0) }
            });
            assert!(portable.iter().zip(&want).all(|(x, y)| (x - y).abs() < 1e-5), "portable {m} {n} {k}");
            #[cfg(target_arch = "x86_64")]
            if has_avx2() {
                let avx2 = run(&|args| {
                    // SAFETY: the features were just found; the operands are as `product` checked them.
                    unsafe { product_avx2(args) }
                });
                assert_eq!(avx2, want, "AVX2 {m} {n} {k}");
            }
        }
    }
}
