//! Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

/// Ten rounds over a counter and a key: four random words that depend on nothing else.
pub(super) fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// A number in `0..bound` for (seed, step, row): the high part of a 64-bit random times the bound, whose bias is below
/// bound / 2^64.
pub(super) fn uniform(seed: u64, step: u64, row: u32, bound: u64) -> u64 {
    let random = philox4x32([step as u32, (step >> 32) as u32, row, 0], [seed as u32, (seed >> 32) as u32]);
    let wide = u64::from(random[0]) | u64::from(random[1]) << 32;
    ((u128::from(wide) * u128::from(bound)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_of_random123() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_E8D5, 0xE169_C58D, 0xBC57_AC4C, 0x9B00_DBD8]);
        assert_eq!(philox4x32([!0; 4], [!0; 2]), [0x408F_276D, 0x41C8_3B0E, 0xA20B_C7C6, 0x6D54_51FD]);
        assert_eq!(
            philox4x32([0x243F_6A88, 0x85A3_08D3, 0x1319_8A2E, 0x0370_7344], [0xA409_3822, 0x299F_31D0]),
            [0xD16C_FE09, 0x94FD_CCEB, 0x5001_E420, 0x2412_6EA1]
        );
    }

    #[test]
    fn uniform_stays_below_its_bound_and_fills_it() {
        let mut seen = [0u32; 7];
        for step in 0..7000 {
            seen[uniform(3, step, 1, 7) as usize] += 1;
        }
        // 1000 expected each, standard deviation 29.
        assert!(seen.iter().all(|n| (850..1150).contains(n)), "{seen:?}");
    }
}
