//! The text of wgmma's instructions, whose operands are a register for each sum.

use moebius_ir::DType;

use super::float;

/// `wgmma` for sums of `rows` rows: the operands in shared memory, either way round, as overloads by the number of sums.
pub(super) fn instructions(dtype: DType, rows: &[usize], x_along_k: bool, w_along_k: bool) -> Result<String, String> {
    let (kind, [x, w]) = (float(dtype)?, [!x_along_k, !w_along_k].map(u8::from));
    let one = |&n: &usize| {
        let sums = n / 2;
        let list = |f: &dyn Fn(usize) -> String| (0..sums).map(f).collect::<Vec<_>>().join(", ");
        let (registers, operands) = (list(&|i| format!("%{i}")), list(&|i| format!("\"+f\"(d[{i}])")));
        format!(
            "__device__ __forceinline__ void wgmma(float (&d)[{sums}], u64 w, u64 x, int add) {{\n    asm volatile(\"{{\\n .reg .pred \
             add;\\n setp.ne.b32 add, %{flag}, 0;\\n wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{registers}}}, \
             %{sums}, %{second}, add, 1, 1, {w}, {x};\\n}}\" : {operands} : \"l\"(w), \"l\"(x), \"r\"(add));\n}}\n",
            second = sums + 1,
            flag = sums + 2,
        )
    };
    Ok(rows.iter().map(one).collect())
}

/// `wgmma_held` for sums of `n` rows: the left side in registers, the right one in shared memory, along k or across it.
pub(super) fn held_instruction(dtype: DType, n: usize, along_k: bool) -> Result<String, String> {
    let (kind, sums, across) = (float(dtype)?, n / 2, u8::from(!along_k));
    let list = |f: &dyn Fn(usize) -> String| (0..sums).map(f).collect::<Vec<_>>().join(", ");
    let (registers, operands) = (list(&|i| format!("%{i}")), list(&|i| format!("\"+f\"(d[{i}])")));
    let [a, b, c, e, right, flag]: [usize; 6] = std::array::from_fn(|i| sums + i);
    Ok(format!(
        "__device__ __forceinline__ void wgmma_held(float (&d)[{sums}], u32 a, u32 b, u32 c, u32 e, u64 x, int add) {{\n    asm \
         volatile(\"{{\\n .reg .pred add;\\n setp.ne.b32 add, %{flag}, 0;\\n wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} \
         {{{registers}}}, {{%{a}, %{b}, %{c}, %{e}}}, %{right}, add, 1, 1, {across};\\n}}\" : {operands} : \"r\"(a), \"r\"(b), \"r\"(c), \
         \"r\"(e), \"l\"(x), \"r\"(add));\n}}\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_names_a_register_for_each_sum() {
        let text = instructions(DType::Bf16, &[16], true, false).unwrap();
        assert!(
            text.contains("m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, add, 1, 1, 1, 0;"),
            "{text}"
        );
        assert!(text.contains("setp.ne.b32 add, %10, 0;"), "{text}");
    }

    #[test]
    fn a_held_side_is_four_registers() {
        let text = held_instruction(DType::F16, 16, false).unwrap();
        assert!(
            text.contains(
                "m64n16k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, add, 1, 1, 1;"
            ),
            "{text}"
        );
        assert!(text.contains("setp.ne.b32 add, %13, 0;"), "{text}");
    }
}
