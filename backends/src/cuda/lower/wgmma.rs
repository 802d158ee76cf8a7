//! The text of wgmma's instructions, whose operands are a register for each sum.

use moebius_ir::DType;

use super::float;

/// `wgmma` for sums of `rows` rows: the operands in shared memory, either way round, as overloads by the number of sums.
pub(super) fn instructions(dtype: DType, rows: &[usize], x_along_k: bool, w_along_k: bool) -> Result<String, String> {
    let turned = format!(", {}, {}", u8::from(!w_along_k), u8::from(!x_along_k));
    rows.iter().map(|&n| instruction("wgmma", dtype, n, &[("w", 'l')], &turned)).collect()
}

/// `wgmma_held` for sums of `n` rows: the left side in registers, the right one in shared memory, along k or across it.
pub(super) fn held_instruction(dtype: DType, n: usize, along_k: bool) -> Result<String, String> {
    let turned = format!(", {}", u8::from(!along_k));
    instruction("wgmma_held", dtype, n, &["a", "b", "c", "e"].map(|name| (name, 'r')), &turned)
}

/// One function around the instruction. `left` names the left side's operands and the letter of their kind of register (several are
/// braced); `turned` ends the instruction with which sides lie across k.
fn instruction(name: &str, dtype: DType, n: usize, left: &[(&str, char)], turned: &str) -> Result<String, String> {
    let (kind, sums) = (float(dtype)?, n / 2);
    let numbered =
        |from: usize, count: usize| (from..from + count).map(|i| format!("%{i}")).collect::<Vec<_>>().join(", ");
    let joined = |one: &dyn Fn(&(&str, char)) -> String| left.iter().map(one).collect::<String>();
    let params = joined(&|&(name, letter)| format!("{} {name}, ", if letter == 'l' { "u64" } else { "u32" }));
    let inputs = joined(&|&(name, letter)| format!("\"{letter}\"({name}), "));
    let (results, held) = (numbered(0, sums), numbered(sums, left.len()));
    let held = if left.len() > 1 { format!("{{{held}}}") } else { held };
    let (right, flag) = (sums + left.len(), sums + left.len() + 1);
    let outputs: Vec<_> = (0..sums).map(|i| format!("\"+f\"(d[{i}])")).collect();
    Ok(format!(
        "__device__ __forceinline__ void {name}(float (&d)[{sums}], {params}u64 x, int add) {{\n    asm volatile(\"{{\\n .reg .pred \
         add;\\n setp.ne.b32 add, %{flag}, 0;\\n wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{results}}}, {held}, \
         %{right}, add, 1, 1{turned};\\n}}\" : {outputs} : {inputs}\"l\"(x), \"r\"(add));\n}}\n",
        outputs = outputs.join(", ")
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
