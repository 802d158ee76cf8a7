//! Intel's AMX: eight tile registers of 16 rows of 64 bytes, and products of tiles of pairs of bf16.
//!
//! Rust has no stable functions for these instructions, so they are written as assembly. No other code of the program uses the
//! tile registers.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};

use super::split;
use super::{Block, Matrix, PART_BYTES, TILE, TILE_BYTES};

/// The unit of this processor, if it has one and the system lets this program use it.
pub(in crate::cpu::gemm) fn detect() -> Option<&'static Matrix> {
    (has_instructions() && permitted()).then_some(&AMX)
}

static AMX: Matrix =
    Matrix { split_a: split::split_a, split_b: split::split_b, block, release, any_not_finite: split::any_not_finite };

/// AMX-TILE and AMX-BF16, by Intel's manual (CPUID leaf 7, EDX 24 and 22).
fn has_instructions() -> bool {
    if __cpuid(0).eax < 7 {
        return false;
    }
    let edx = __cpuid_count(7, 0).edx;
    edx & (1 << 24) != 0 && edx & (1 << 22) != 0
}

/// Asks Linux for the tile registers, once for all threads: threads that use them have larger stacks of saved registers.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XTILEDATA: i64 = 18;
    let result: i64;
    // SAFETY: a system call that reads no memory; it clobbers what is named.
    unsafe {
        asm!("syscall", inlateout("rax") ARCH_PRCTL => result, in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") XTILEDATA,
            lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result == 0
}

/// Other systems are asked in other ways, which nobody has tried.
#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// What `ldtilecfg` reads: rows and bytes of a row of each tile register.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Registers 0 to 3 are C, 4 and 5 A, 6 and 7 B.
fn config(upper: usize, lower: usize) -> Config {
    let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    for (register, rows) in [upper, upper, lower, lower, upper, lower, TILE, TILE].into_iter().enumerate() {
        // A register of no rows would not be one.
        (config.rows[register], config.row_bytes[register]) = (rows.max(1) as u8, 64);
    }
    config
}

/// Loads a register from `$from`, rows `$stride` bytes apart.
macro_rules! load {
    ($register:literal, $from:expr, $stride:expr) => {
        asm!(
            concat!("tileloadd ", $register, ", [{from} + {stride}*1]"),
            from = in(reg) $from,
            stride = in(reg) $stride,
            options(nostack, readonly)
        )
    };
}
/// Stores a register likewise.
macro_rules! store {
    ($register:literal, $to:expr, $stride:expr) => {
        asm!(
            concat!("tilestored [{to} + {stride}*1], ", $register),
            to = in(reg) $to,
            stride = in(reg) $stride,
            options(nostack)
        )
    };
}
/// One instruction without memory.
macro_rules! unit {
    ($text:literal) => {
        asm!($text, options(nostack, nomem))
    };
}

/// Computes a block of C.
///
/// # Safety
/// The processor has the unit and the system permits it; the operands cover what the block says.
unsafe fn block(block: &Block<'_>) {
    // SAFETY: the caller's contract.
    unsafe {
        match (block.rows > TILE, block.cols > TILE) {
            (false, false) => tiles::<false, false>(block),
            (false, true) => tiles::<false, true>(block),
            (true, false) => tiles::<true, false>(block),
            (true, true) => tiles::<true, true>(block),
        }
    }
}

/// A block with a second row of tiles or not (`LOWER`), and with a second column or not (`RIGHT`).
#[inline(always)]
unsafe fn tiles<const LOWER: bool, const RIGHT: bool>(block: &Block<'_>) {
    let &Block { steps, a, b, c, ldc, rows, .. } = block;
    let upper = rows.min(TILE);
    let config = config(upper, rows - upper);
    let stride = ldc * size_of::<f32>();
    let lower = c.wrapping_add(TILE * ldc);
    // SAFETY: the caller's contract; registers have as many rows as the block.
    unsafe {
        asm!("ldtilecfg [{config}]", config = in(reg) &raw const config, options(nostack, readonly));
        if block.load {
            load!("tmm0", c, stride);
            if RIGHT {
                load!("tmm1", c.add(TILE), stride);
            }
            if LOWER {
                load!("tmm2", lower, stride);
            }
            if LOWER && RIGHT {
                load!("tmm3", lower.add(TILE), stride);
            }
        } else {
            unit!("tilezero tmm0");
            unit!("tilezero tmm1");
            unit!("tilezero tmm2");
            unit!("tilezero tmm3");
        }
        for step in 0..steps {
            let a = a.add(step * block.parts[0] * PART_BYTES);
            let b = b.add(step * block.parts[1] * PART_BYTES);
            let mut loaded = (usize::MAX, usize::MAX);
            for &(i, j) in block.products {
                if loaded.0 != i {
                    load!("tmm4", a.add(i * PART_BYTES), 64usize);
                    if LOWER {
                        load!("tmm5", a.add(i * PART_BYTES + TILE_BYTES), 64usize);
                    }
                }
                if loaded.1 != j {
                    load!("tmm6", b.add(j * PART_BYTES), 64usize);
                    if RIGHT {
                        load!("tmm7", b.add(j * PART_BYTES + TILE_BYTES), 64usize);
                    }
                }
                loaded = (i, j);
                unit!("tdpbf16ps tmm0, tmm4, tmm6");
                if RIGHT {
                    unit!("tdpbf16ps tmm1, tmm4, tmm7");
                }
                if LOWER {
                    unit!("tdpbf16ps tmm2, tmm5, tmm6");
                }
                if LOWER && RIGHT {
                    unit!("tdpbf16ps tmm3, tmm5, tmm7");
                }
            }
        }
        store!("tmm0", c, stride);
        if RIGHT {
            store!("tmm1", c.add(TILE), stride);
        }
        if LOWER {
            store!("tmm2", lower, stride);
        }
        if LOWER && RIGHT {
            store!("tmm3", lower.add(TILE), stride);
        }
    }
}

/// Registers that hold nothing need not be saved with a thread, and let the core save power.
unsafe fn release() {
    // SAFETY: the caller has the unit, and needs no register's content any more.
    unsafe { unit!("tilerelease") }
}
