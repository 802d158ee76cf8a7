//! Every kind of CUDA kernel that the op cases need becomes machine code for two kinds of GPU: compiled by NVRTC, which needs no
//! GPU. Where there is no NVRTC, the test says so and checks only that each case has kernels.
#![cfg(feature = "cuda")]

use std::collections::BTreeSet;

use moebius_backends::cuda::{Chip, Compiler, Cuda, KernelText};
use moebius_tests::graphs;
use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

/// The oldest GPU that is supported, and one whose code is made with the features of its chip.
const ARCHITECTURES: [(&str, Chip); 2] = [("sm_80", Chip::AMPERE), ("sm_90a", Chip::HOPPER)];

/// The kernels of all cases in all dtypes, forward and backward, each once.
fn kernels(chip: Chip) -> BTreeSet<KernelText> {
    graphs::of_all_cases(|graph, title| Cuda::kernels(graph, chip).unwrap_or_else(|e| panic!("{title}: {e}")))
}

/// A kernel's title without the extents that only change how often its loops run, and of Hopper's products, which take long to
/// compile, without the dtype, which is a word of their instructions.
fn kind(title: &str) -> String {
    let extents = [
        "EXPERTS=",
        "K=",
        "COUNTED=",
        "KEEP=",
        "HEAD=",
        "JITTER=",
        "LOADS=",
        "WIDTH=",
        "TOKENS=",
        "ASSIGNED=",
        "CHOICES=",
    ];
    let word = |w: &str| match extents.iter().find(|e| w.trim_start_matches('(').starts_with(**e)) {
        Some(extent) => (*extent).to_owned(),
        None => w.trim_end_matches([',', ')']).to_owned(),
    };
    let kind = title.split(' ').map(word).collect::<Vec<_>>().join(" ");
    if title.contains("hopper") { kind.replace("T=f16", "T=bf16") } else { kind }
}

#[test]
#[expect(clippy::print_stdout, reason = "what was compiled, or that nothing was, is the result")]
fn every_kernel_compiles() {
    let of_chips = ARCHITECTURES.map(|(arch, chip)| (arch, kernels(chip)));
    let count: usize = of_chips.iter().map(|(_, kernels)| kernels.len()).sum();
    assert!(of_chips.iter().all(|(_, kernels)| kernels.len() > 100), "only {count} kernels");
    let hopper = of_chips.iter().flat_map(|(_, kernels)| kernels).filter(|k| k.title.contains("hopper")).count();
    assert!(hopper > 5, "only {hopper} kernels of Hopper's own");
    let compiler = match Compiler::find() {
        Ok(compiler) => compiler,
        Err(why) => {
            println!("{count} kernels are not compiled: {why}");
            return;
        }
    };
    let mut work: Vec<(&str, &KernelText)> = Vec::new();
    for (arch, kernels) in &of_chips {
        let mut kinds = BTreeSet::new();
        for kernel in kernels {
            // Generated chains are many and plain: one GPU is enough.
            let chain = kernel.title.starts_with("elementwise.cu");
            if if chain { *arch == ARCHITECTURES[0].0 } else { kinds.insert(kind(&kernel.title)) } {
                work.push((arch, kernel));
            }
        }
    }
    let compile = |(arch, kernel): &(&str, &KernelText)| {
        let made = compiler.compile(&kernel.title, &kernel.text, arch, &kernel.options);
        made.err().map(|e| e.to_string())
    };
    let failures: Vec<String> = work.par_iter().filter_map(compile).collect();
    assert!(failures.is_empty(), "{} of {} fail:\n{}", failures.len(), work.len(), failures.join("\n"));
    println!("{} kernels compiled by {}", work.len(), compiler.path().display());
}
