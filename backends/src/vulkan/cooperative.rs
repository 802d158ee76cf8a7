//! What naga leaves out of a kernel with cooperative matrices, added to its words in SPIR-V.
//!
//! In the texts 16-bit elements travel as `vec4<f32>`, eight of them at a time and unlooked at, and the matrices A and B are of f32.
//! Here those get their 16-bit elements. Under the Vulkan memory model, which cooperative matrices need, a barrier orders only such
//! loads and stores of a workgroup's memory as say so, and naga's do not. A cooperative matrix of zeros is a composite, not a null.

use std::collections::{HashMap, HashSet};

use moebius_ir::DType;

use super::spirv::{HEADER, instructions};

// Numbers of the SPIR-V specification and of SPV_KHR_cooperative_matrix and SPV_KHR_bfloat16.
const EXTENSION: u32 = 10;
const CAPABILITY: u32 = 17;
const TYPE_INT: u32 = 21;
const TYPE_FLOAT: u32 = 22;
const TYPE_ARRAY: u32 = 28;
const TYPE_POINTER: u32 = 32;
const CONSTANT: u32 = 43;
const CONSTANT_COMPOSITE: u32 = 44;
const CONSTANT_NULL: u32 = 46;
const VARIABLE: u32 = 59;
const LOAD: u32 = 61;
const STORE: u32 = 62;
const ACCESS_CHAIN: u32 = 65;
const IN_BOUNDS_ACCESS_CHAIN: u32 = 66;
const DECORATE: u32 = 71;
const TYPE_MATRIX: u32 = 4456;
const MATRIX_LOAD: u32 = 4457;
const MATRIX_STORE: u32 = 4458;
const ARRAY_STRIDE: u32 = 6;
const WORKGROUP_STORAGE: u32 = 4;
const WORKGROUP_SCOPE: u32 = 2;
const MAKE_AVAILABLE: u32 = 0x8;
const MAKE_VISIBLE: u32 = 0x10;
const NON_PRIVATE: u32 = 0x20;
const FLOAT_16: u32 = 9;
const DEVICE_SCOPE: u32 = 5346;
const BF16_TYPE: u32 = 5116;
const BF16_MATRIX: u32 = 5118;
const BF16_ENCODING: u32 = 0;
const USE_A: u32 = 0;
const USE_B: u32 = 1;

/// One instruction: its operation and its operands.
type Instruction = (u32, Vec<u32>);

/// The words of naga with the matrices A and B of `dtype`, which is bf16 or f16.
pub(crate) fn complete(words: &[u32], dtype: DType) -> Result<Vec<u32>, String> {
    let mut module: Vec<Instruction> = instructions(words).map(|(o, w)| (o, w[1..].to_vec())).collect();
    let mut next = *words.get(3).ok_or("no header")?;
    let mut fresh = || {
        next += 1;
        next - 1
    };
    narrow(&mut module, dtype, fresh())?;
    order(&mut module, fresh())?;
    let zeros: Vec<u32> = (0..8).map(|_| fresh()).collect();
    splat(&mut module, &zeros)?;
    bare(&mut module);
    let wanted: &[u32] =
        if dtype == DType::Bf16 { &[BF16_TYPE, BF16_MATRIX, DEVICE_SCOPE] } else { &[FLOAT_16, DEVICE_SCOPE] };
    for &capability in wanted {
        if !module.iter().any(|(o, w)| *o == CAPABILITY && w[0] == capability) {
            module.insert(0, (CAPABILITY, vec![capability]));
        }
    }
    if dtype == DType::Bf16 {
        let at = module.iter().position(|(o, _)| *o != CAPABILITY).unwrap_or(0);
        let name = b"SPV_KHR_bfloat16\0\0\0\0".chunks_exact(4);
        module.insert(at, (EXTENSION, name.map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect()));
    }
    let mut out = words[..HEADER].to_vec();
    out[3] = next;
    for (operation, operands) in module {
        out.push((operands.len() as u32 + 1) << 16 | operation);
        out.extend(operands);
    }
    Ok(out)
}

/// The matrices A and B get elements of 16 bits.
fn narrow(module: &mut Vec<Instruction>, dtype: DType, id: u32) -> Result<(), String> {
    let constants: HashMap<u32, u32> =
        module.iter().filter(|(o, w)| *o == CONSTANT && w.len() == 3).map(|(_, w)| (w[1], w[2])).collect();
    let mut count = 0;
    for (_, w) in module.iter_mut().filter(|(o, _)| *o == TYPE_MATRIX) {
        if matches!(constants.get(&w[5]), Some(&USE_A | &USE_B)) {
            w[1] = id;
            count += 1;
        }
    }
    if count != 2 {
        return Err(format!("wanted a matrix A and a matrix B, found {count} of their types"));
    }
    let at = module.iter().position(|(o, _)| *o == TYPE_FLOAT).ok_or("no type of floats")?;
    let ty = if dtype == DType::Bf16 { vec![id, 16, BF16_ENCODING] } else { vec![id, 16] };
    module.insert(at, (TYPE_FLOAT, ty));
    Ok(())
}

/// Loads and stores of a workgroup's memory are ordered by its barriers.
fn order(module: &mut Vec<Instruction>, id: u32) -> Result<(), String> {
    let is_u32 = |(o, w): &Instruction| *o == TYPE_INT && w[1..] == [32, 0];
    let at = module.iter().position(is_u32).ok_or("no type of numbers")?;
    let scope = (CONSTANT, vec![module[at].1[0], id, WORKGROUP_SCOPE]);
    module.insert(at + 1, scope);
    let shared = |(o, w): &&Instruction| *o == TYPE_POINTER && w[1] == WORKGROUP_STORAGE;
    let pointers: HashSet<u32> = module.iter().filter(shared).map(|(_, w)| w[0]).collect();
    let points = |(o, w): &&Instruction| {
        [VARIABLE, ACCESS_CHAIN, IN_BOUNDS_ACCESS_CHAIN].contains(o) && pointers.contains(&w[0])
    };
    let places: HashSet<u32> = module.iter().filter(points).map(|(_, w)| w[1]).collect();
    for (operation, w) in module.iter_mut() {
        match *operation {
            LOAD if w.len() == 3 && places.contains(&w[2]) => w.extend([NON_PRIVATE | MAKE_VISIBLE, id]),
            STORE if w.len() == 2 && places.contains(&w[0]) => w.extend([NON_PRIVATE | MAKE_AVAILABLE, id]),
            MATRIX_LOAD if places.contains(&w[2]) => w.extend([NON_PRIVATE | MAKE_VISIBLE, id]),
            MATRIX_STORE if places.contains(&w[0]) => w.extend([NON_PRIVATE | MAKE_AVAILABLE, id]),
            _ => {}
        }
    }
    Ok(())
}

/// A matrix of zeros is made of one zero.
fn splat(module: &mut Vec<Instruction>, ids: &[u32]) -> Result<(), String> {
    let matrices: HashMap<u32, u32> =
        module.iter().filter(|(o, _)| *o == TYPE_MATRIX).map(|(_, w)| (w[0], w[1])).collect();
    let mut ids = ids.iter();
    let mut zeros: HashMap<u32, u32> = HashMap::new();
    for (operation, w) in std::mem::take(module) {
        let Some(&element) = matrices.get(&w.first().copied().unwrap_or(0)).filter(|_| operation == CONSTANT_NULL)
        else {
            module.push((operation, w));
            continue;
        };
        let zero = match zeros.get(&element) {
            Some(&zero) => zero,
            None => {
                let zero = *ids.next().ok_or("too many kinds of matrices")?;
                module.push((CONSTANT_NULL, vec![element, zero]));
                zeros.insert(element, zero);
                zero
            }
        };
        module.push((CONSTANT_COMPOSITE, vec![w[0], w[1], zero]));
    }
    Ok(())
}

/// Arrays in a workgroup's memory have no stated layout.
fn bare(module: &mut Vec<Instruction>) {
    let shared = |(o, w): &&Instruction| *o == TYPE_POINTER && w[1] == WORKGROUP_STORAGE;
    let pointed: HashSet<u32> = module.iter().filter(shared).map(|(_, w)| w[2]).collect();
    let array = |(o, w): &&Instruction| *o == TYPE_ARRAY && pointed.contains(&w[0]);
    let arrays: HashSet<u32> = module.iter().filter(array).map(|(_, w)| w[0]).collect();
    module.retain(|(o, w)| !(*o == DECORATE && w.get(1) == Some(&ARRAY_STRIDE) && arrays.contains(&w[0])));
}
