//! Every CUDA kernel that the op cases need is machine code for two kinds of GPU: compiled by NVRTC, which needs no GPU. Where
//! there is no NVRTC, the test says so and checks only that each case has kernels.
#![cfg(feature = "cuda")]

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use moebius_backends::cuda::{Compiler, Cuda, KernelText};
use moebius_ir::passes;
use moebius_tests::cases;

/// The oldest GPU that is supported, and one whose code is made with the features of its chip.
const ARCHITECTURES: [&str; 2] = ["sm_80", "sm_90a"];

/// The kernels of all cases in all dtypes, forward and backward, each once.
fn kernels() -> Vec<KernelText> {
    let mut all = BTreeSet::new();
    for (_, cases) in cases::groups() {
        for case in cases {
            for &dtype in case.dtypes {
                let mut sketch = case.sketch(dtype);
                if sketch.differentiable() {
                    sketch.differentiate().unwrap_or_else(|e| panic!("{}: {e}", case.title(dtype)));
                }
                let graph = passes::optimise(&sketch.graph).unwrap_or_else(|e| panic!("{e}"));
                all.extend(Cuda::kernels(&graph).unwrap_or_else(|e| panic!("{}: {e}", case.title(dtype))));
            }
        }
    }
    all.into_iter().collect()
}

#[test]
#[expect(clippy::print_stdout, reason = "what was compiled, or that nothing was, is the result")]
fn every_kernel_compiles() {
    let kernels = kernels();
    assert!(kernels.len() > 100, "only {} kernels", kernels.len());
    let compiler = match Compiler::find() {
        Ok(compiler) => compiler,
        Err(why) => {
            println!("{} kernels are not compiled: {why}", kernels.len());
            return;
        }
    };
    let generated = |k: &KernelText| k.title.starts_with("elementwise.cu");
    let mut work: Vec<(&str, &KernelText)> = Vec::new();
    for arch in ARCHITECTURES {
        // Generated chains are many and plain: the oldest GPU is enough.
        work.extend(kernels.iter().filter(|k| arch == ARCHITECTURES[0] || !generated(k)).map(|k| (arch, k)));
    }
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((arch, kernel)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(e) = compiler.compile(&kernel.title, &kernel.text, arch, &kernel.options) {
                        failures.lock().unwrap_or_else(|e| panic!("{e}")).push(e.to_string());
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap_or_else(|e| panic!("{e}"));
    assert!(failures.is_empty(), "{} of {} fail:\n{}", failures.len(), work.len(), failures.join("\n"));
    println!("{} kernels compiled by {}", work.len(), compiler.path().display());
}
