//! From WGSL to SPIR-V: naga's translation, and what it leaves out added to its words.

use moebius_ir::DType;
use naga::back::spv;
use naga::valid::{Capabilities, ValidationFlags, Validator};

/// What kernels may use of the language beyond its core.
const CAPABILITIES: Capabilities = Capabilities::IMMEDIATES
    .union(Capabilities::SHADER_INT16)
    .union(Capabilities::SUBGROUP)
    .union(Capabilities::MEMORY_DECORATION_COHERENT)
    .union(Capabilities::COOPERATIVE_MATRIX);

/// Words before the first instruction.
pub(super) const HEADER: usize = 5;

// Numbers of the SPIR-V specification.
const CAPABILITY: u32 = 17;
const MEMORY_MODEL: u32 = 14;
const ENTRY_POINT: u32 = 15;
const EXECUTION_MODE: u32 = 16;
const DECORATE: u32 = 71;
const MEMBER_DECORATE: u32 = 72;
/// Instructions that define types.
const TYPES: std::ops::RangeInclusive<u32> = 19..=39;
/// Negation, sum, difference, product, quotient of floats.
const FLOAT_ARITHMETIC: [u32; 5] = [127, 129, 131, 133, 136];
const NO_CONTRACTION: u32 = 42;
/// 16 bits elsewhere than in storage buffers, which nothing here has: devices need not be capable of it.
const UNUSED: std::ops::RangeInclusive<u32> = 4434..=4436;
const PRESERVE_CAPABILITY: u32 = 4466;
const PRESERVE_MODE: u32 = 4461;

/// The words of a shader whose entry point is `main`; what the compiler says if it is wrong. `cooperative`: the dtype of the factors of
/// its cooperative matrices, if it has any. `preserve`: infinities and NaN are kept, where the device can promise that.
pub(crate) fn compile(text: &str, cooperative: Option<DType>, preserve: bool) -> Result<Vec<u32>, String> {
    let mut language = naga::front::wgsl::Options::new();
    language.capabilities = CAPABILITIES;
    let module = naga::front::wgsl::Frontend::new_with_options(language).parse(text);
    let module = module.map_err(|e| e.emit_to_string(text))?;
    // Barriers stand where the groups of the kernels agree; that a loop's bound comes from memory hides it from the analysis.
    let flags = ValidationFlags::all() - ValidationFlags::CONTROL_FLOW_UNIFORMITY;
    let info = Validator::new(flags, CAPABILITIES).validate(&module).map_err(|e| e.emit_to_string(text))?;
    let options = spv::Options {
        lang_version: (1, 5),
        flags: spv::WriterFlags::empty(),
        zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
        force_loop_bounding: false,
        emit_int_div_checks: false,
        use_storage_input_output_16: false,
        ..spv::Options::default()
    };
    let entry = spv::PipelineOptions { shader_stage: naga::ShaderStage::Compute, entry_point: "main".into() };
    let words = spv::write_vec(&module, &info, &options, Some(&entry)).map_err(|e| e.to_string())?;
    let words = match cooperative {
        Some(dtype) => super::cooperative::complete(&words, dtype)?,
        None => words,
    };
    Ok(exact(&words, preserve))
}

/// The instructions of a module, each with its operation.
pub(super) fn instructions(words: &[u32]) -> impl Iterator<Item = (u32, &[u32])> {
    let mut rest = words.get(HEADER..).unwrap_or_default();
    std::iter::from_fn(move || {
        let first = *rest.first()?;
        let (instruction, after) = rest.split_at_checked((first >> 16) as usize)?;
        rest = after;
        Some((first & 0xffff, instruction))
    })
}

fn instruction(operation: u32, operands: &[u32]) -> Vec<u32> {
    [&[(operands.len() as u32 + 1) << 16 | operation], operands].concat()
}

/// The same module without what is declared and not used, in which every operation on floats rounds by itself: a driver may join none of them to a fused one, so that results
/// are the same everywhere.
fn exact(words: &[u32], preserve: bool) -> Vec<u32> {
    let mut decorations = Vec::new();
    for (operation, words) in instructions(words) {
        if FLOAT_ARITHMETIC.contains(&operation) {
            decorations.extend(instruction(DECORATE, &[words[2], NO_CONTRACTION]));
        }
    }
    let mut out = words.get(..HEADER).unwrap_or_default().to_vec();
    let (mut capable, mut decorated, mut entry) = (!preserve, false, None);
    for (operation, words) in instructions(words) {
        if !capable && operation != CAPABILITY {
            out.extend(instruction(CAPABILITY, &[PRESERVE_CAPABILITY]));
            capable = true;
        }
        // Modes follow the entry point, and come before anything else but other modes.
        if preserve
            && let Some(id) = entry
            && ![ENTRY_POINT, EXECUTION_MODE, MEMORY_MODEL].contains(&operation)
        {
            out.extend(instruction(EXECUTION_MODE, &[id, PRESERVE_MODE, 32]));
            entry = None;
        }
        if !decorated && ([DECORATE, MEMBER_DECORATE].contains(&operation) || TYPES.contains(&operation)) {
            out.append(&mut decorations);
            decorated = true;
        }
        if operation == CAPABILITY && UNUSED.contains(&words[1]) {
            continue;
        }
        if operation == ENTRY_POINT {
            entry = Some(words[2]);
        }
        out.extend(words);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "@group(0) @binding(0) var<storage, read_write> x: array<f32>;
        @compute @workgroup_size(64) fn main(@builtin(global_invocation_id) id: vec3<u32>) {
            x[id.x] = x[id.x] * 3.0 + 1.0;
        }";

    #[test]
    fn every_float_operation_is_kept_apart() {
        let words = compile(TEXT, None, true).unwrap();
        let found =
            |wanted: &[u32]| instructions(&words).filter(|(o, w)| *o == wanted[0] && w.ends_with(&wanted[1..])).count();
        assert_eq!(found(&[DECORATE, NO_CONTRACTION]), 2);
        assert_eq!((found(&[CAPABILITY, PRESERVE_CAPABILITY]), found(&[EXECUTION_MODE, PRESERVE_MODE, 32])), (1, 1));
        let plain = compile(TEXT, None, false).unwrap();
        assert_eq!(instructions(&plain).filter(|(_, w)| w.contains(&PRESERVE_MODE)).count(), 0);
        // Nothing is lost on the way: the instructions fill the words.
        assert_eq!(HEADER + instructions(&words).map(|(_, w)| w.len()).sum::<usize>(), words.len());
    }

    #[test]
    fn a_wrong_shader_is_told_with_its_line() {
        let Err(log) = compile("fn main() { let x: u32 = 1.5; }", None, true) else { panic!("a wrong shader") };
        assert!(log.contains("1.5"), "{log}");
    }
}
