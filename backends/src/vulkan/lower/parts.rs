//! The rule by which the sums of a product with few tiles are cut into parts, each of which is a workgroup's; another kernel adds them up,
//! in their order.

use moebius_ir::DType;

use crate::vulkan::launch::{Action, At};
use crate::vulkan::limits::Limits;
use crate::vulkan::shader::Shader;

const THREADS: usize = 256;
/// A part is a multiple of this, as every block of a kernel.
const STEP: usize = 64;

/// How k is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Parts {
    pub(super) count: usize,
    /// Elements of one; of the last one what is left.
    pub(super) length: usize,
}

impl Parts {
    /// All of k.
    pub(super) fn whole(k: usize) -> Parts {
        Parts { count: 1, length: k }
    }

    /// Parts of at least `least` elements for `groups` workgroups without them, if at most half as many as `enough`, which keep a device
    /// busy.
    pub(super) fn of(groups: usize, k: usize, least: usize, enough: usize) -> Parts {
        let wanted = (enough / groups.max(1)).min(k / least.max(1));
        if wanted < 2 {
            return Parts::whole(k);
        }
        let length = k.div_ceil(wanted).next_multiple_of(STEP);
        Parts { count: k.div_ceil(length), length }
    }
}

/// Adds up the sums of `parts` of a product of `total` elements, which has rows of `n`, and the bias, into the result of this dtype.
pub(super) fn finish(
    limits: Limits,
    parts: Parts,
    [total, n]: [usize; 2],
    sums: At,
    bias: (At, DType),
    c: (DType, At),
) -> Result<Action, String> {
    Shader::file(limits, "gemm_finish", THREADS)
        .number("total", total)
        .number("parts", parts.count)
        .number("n", n)
        .buffer("sums", DType::F32, sums)
        .buffer("bias", bias.1, bias.0)
        .buffer("c", c.0, c.1)
        .line(total.div_ceil(THREADS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_the_sums_and_are_worth_a_workgroup() {
        for groups in [1, 16, 64, 131, 132, 133, 264, 5000] {
            for k in [0, 1, 255, 511, 512, 1000, 1024, 16_384, 50_257] {
                for least in [256, 512, 4096] {
                    let p = Parts::of(groups, k, least, 264);
                    assert!(p.count * p.length >= k && (p.count - 1) * p.length <= k, "{groups} {k} {least}: {p:?}");
                    assert!(
                        p.count == 1 || (p.length >= least && p.length.is_multiple_of(STEP)),
                        "{groups} {k}: {p:?}"
                    );
                    assert!(p.count == 1 || p.count * groups <= 264, "{groups} {k}: {p:?}");
                }
            }
        }
        assert_eq!(Parts::of(16, 16_384, 256, 528), Parts { count: 32, length: 512 });
        assert_eq!(Parts::of(200, 16_384, 256, 264), Parts::whole(16_384));
    }
}
