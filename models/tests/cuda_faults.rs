//! The program on a GPU that something is wrong with: each time one clear error, an exit code that says so, and nothing lost. The
//! GPU is the emulated one, whose faults can be had by environment variables (`tests/emulator/cuda.cpp`).
//!
//! Needs g++ on x86-64 Linux; elsewhere each test says that it did nothing.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use crate::place::{Place, SMALL, checkpoint, json, kill_until_it_ends_with, metrics, stderr, stdout, succeeds};

/// The folder of the emulated driver and compiler, built once; kernels compiled for it are kept beside them.
#[expect(clippy::print_stderr, reason = "a test that did nothing should say so")]
fn emulator() -> Option<&'static Path> {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    let build = || {
        Command::new("g++").arg("--version").output().ok()?;
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/emulator/build");
        let output = Command::new(script).arg(&folder).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        Some(folder)
    };
    let built = BUILT.get_or_init(build).as_deref();
    if built.is_none() {
        eprintln!("not run: there is no g++ to build the emulated GPU with");
    }
    built
}

/// A place whose programs see the emulated GPU of `folder`, with the kernels in `cache`.
struct OnGpu<'a> {
    place: Place,
    folder: &'a Path,
    cache: PathBuf,
}

impl<'a> OnGpu<'a> {
    fn new(folder: &'a Path) -> OnGpu<'a> {
        let place = Place::new();
        // One layer and few tokens, so that few kernels are compiled and steps are short.
        let model = SMALL.replace("layers = 2", "layers = 1").replace("expert_interval = 2", "expert_interval = 1");
        let model = model.replace("sequence = 32", "sequence = 16");
        fs::write(place.path("small.toml"), model).unwrap();
        OnGpu { place, folder, cache: folder.join("cache") }
    }

    fn command(&self, args: &[&str], faults: &[(&str, &str)]) -> Command {
        let mut command = self.place.command(args);
        command.env("LD_LIBRARY_PATH", self.folder).env("MOEBIUS_CACHE", &self.cache);
        command.env_remove("MOEBIUS_NVRTC").env_remove("CUDA_PATH").envs(faults.iter().copied());
        command
    }

    fn run(&self, args: &[&str], faults: &[(&str, &str)]) -> Output {
        self.command(args, faults).output().unwrap()
    }

    fn train(&self, out: &str, more: &[&str], faults: &[(&str, &str)]) -> Output {
        let args = ["train", "--config", "small.toml", "--data", "text.txt", "--device", "cuda", "--out", out];
        self.run(&[&args[..], more].concat(), faults)
    }

    /// What a command says that must fail with code 1.
    fn fails(&self, args: &[&str], faults: &[(&str, &str)]) -> String {
        let output = self.run(args, faults);
        let error = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {error}");
        assert!(!error.contains("panicked") && !error.contains("a bug in moebius"), "{args:?}: {error}");
        error
    }
}

const TRAIN: [&str; 9] = ["train", "--config", "small.toml", "--data", "text.txt", "--out", "out", "--device", "cuda"];

#[test]
fn a_driver_or_compiler_that_is_missing_or_too_old_is_named_with_what_was_wanted() {
    let Some(emulator) = emulator() else { return };
    let here = OnGpu::new(emulator);
    let bogus = here.place.path("bogus");
    fs::create_dir(&bogus).unwrap();
    fs::write(bogus.join("libcuda.so.1"), "no library").unwrap();
    let bogus = bogus.display().to_string();
    for (fault, parts) in [
        (("LD_LIBRARY_PATH", bogus.as_str()), ["no NVIDIA driver", "libcuda.so.1", "too short"]),
        (("MOEBIUS_EMULATED_DRIVER", "11080"), ["driver is too old", "12.0 or newer", "found one for CUDA 11.8"]),
        (("MOEBIUS_EMULATED_DRIVER", "12040"), ["driver is too old", "NVRTC", "found one for CUDA 12.4"]),
        (("MOEBIUS_NVRTC", "/nowhere/libnvrtc.so"), ["no NVRTC", "/nowhere/libnvrtc.so", "pip install"]),
    ] {
        let error = here.fails(&TRAIN, &[fault]);
        assert!(parts.iter().all(|part| error.contains(part)), "{fault:?}: {error}");
        assert!(!here.place.path("out").exists(), "{fault:?}");
        // The list of devices says the same, and is no failure.
        let devices = stdout(&succeeds(here.run(&["devices"], &[fault])));
        assert!(devices.contains("cpu ") && parts.iter().all(|part| devices.contains(part)), "{fault:?}: {devices}");
    }

    // A driver that cannot load what the newest compiler makes takes an older one that is there.
    let both = here.place.path("both");
    fs::create_dir(&both).unwrap();
    for (from, to) in
        [("libcuda.so.1", "libcuda.so.1"), ("libnvrtc.so.13", "libnvrtc.so.13"), ("libnvrtc.so.13", "libnvrtc.so.12")]
    {
        fs::copy(emulator.join(from), both.join(to)).unwrap();
    }
    let faults = [("LD_LIBRARY_PATH", both.to_str().unwrap()), ("MOEBIUS_EMULATED_DRIVER", "12040")];
    let devices = stdout(&succeeds(here.run(&["devices"], &faults)));
    assert!(devices.contains("NVRTC 12.0"), "{devices}");
    let devices = stdout(&succeeds(here.run(&["devices"], &faults[..1])));
    assert!(devices.contains("NVRTC 13.0"), "{devices}");
}

#[test]
fn too_little_memory_is_told_in_numbers_before_anything_is_written() {
    let Some(emulator) = emulator() else { return };
    let here = OnGpu::new(emulator);
    // Known beforehand: parameters and moments alone are more.
    let error = here.fails(&TRAIN, &[("MOEBIUS_EMULATED_FREE", "200000")]);
    assert!(error.contains("the program needs") && error.contains("0.20 MB are free"), "{error}");
    // Others took it since the GPU was asked.
    let error = here.fails(&TRAIN, &[("MOEBIUS_EMULATED_MEMORY", "200000")]);
    assert!(
        error.contains("too little memory: stored tensor") && error.contains("kB, 17.18 GB of 17.18 GB"),
        "{error}"
    );
    assert!(!here.place.path("out").exists());
}

#[test]
fn a_gpu_that_fails_in_a_step_leaves_the_checkpoint_before_and_the_same_bits_after() {
    let Some(emulator) = emulator() else { return };
    let here = OnGpu::new(emulator);
    let settings = ["--checkpoint-every", "3", "--steps", "9"];
    succeeds(here.train("alone", &settings, &[]));
    // The first step is not yet a replayed graph.
    let output = here.train("failed", &settings, &[("MOEBIUS_EMULATED_FAULT", "4")]);
    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    for part in
        ["step 5 did not end", "CUDA_ERROR_LAUNCH_FAILED (719)", "may be partly", "last good checkpoint is of step 3"]
    {
        assert!(error.contains(part), "no `{part}`: {error}");
    }
    assert!(!here.place.path("failed/checkpoints/step-5").exists());
    let resume = ["train", "--data", "text.txt", "--device", "cuda", "--resume", "--out", "failed"];
    succeeds(here.run(&resume, &[]));
    assert_eq!(checkpoint(&here.place.path("alone"), 9), checkpoint(&here.place.path("failed"), 9));
    assert_eq!(metrics(&here.place.path("alone")), metrics(&here.place.path("failed")));
}

#[test]
fn damaged_kernels_of_the_cache_are_told_and_made_anew() {
    let Some(emulator) = emulator() else { return };
    let mut here = OnGpu::new(emulator);
    succeeds(here.train("run", &["--steps", "1"], &[]));
    here.cache = here.place.path("own");
    // Every pass has the same kernels, and each takes a second.
    let text = fs::read_to_string(here.place.path("text.txt")).unwrap();
    fs::write(here.place.path("short.txt"), &text[..2000]).unwrap();
    let eval = ["eval", "--model", "run", "--data", "short.txt", "--device", "cuda", "--json"];
    let whole = succeeds(here.run(&eval, &[]));
    assert!(!stderr(&whole).contains("damaged"), "{}", stderr(&whole));
    let kernels = || -> Vec<PathBuf> {
        let files = fs::read_dir(here.place.path("own/kernels")).unwrap().map(|e| e.unwrap().path());
        files.collect()
    };
    let entry = |path: &PathBuf| fs::read(path).unwrap();
    let intact: Vec<Vec<u8>> = kernels().iter().map(entry).collect();
    // One bit in the middle, one entry that is cut, one of nothing.
    for (i, path) in kernels().iter().enumerate() {
        let mut bytes = entry(path);
        match i % 3 {
            0 => bytes[intact[i].len() / 2] ^= 1,
            1 => bytes.truncate(100),
            _ => bytes.clear(),
        }
        fs::write(path, bytes).unwrap();
    }
    let again = succeeds(here.run(&eval, &[]));
    let told = stderr(&again);
    assert!(
        told.contains("damaged and made anew") && told.contains("checksum") && told.contains("own/kernels"),
        "{told}"
    );
    assert_eq!(json(&whole)["loss"], json(&again)["loss"]);
    let now: Vec<usize> = kernels().iter().map(|path| entry(path).len()).collect();
    assert!(now.iter().all(|&len| len > 100), "each is whole again: {now:?}");
    assert!(!stderr(&succeeds(here.run(&eval, &[]))).contains("damaged"));
}

#[test]
fn a_run_on_a_gpu_killed_at_random_moments_ends_with_the_same_bits() {
    let Some(emulator) = emulator() else { return };
    let here = OnGpu::new(emulator);
    let settings = ["--set", "train.steps=20", "--checkpoint-every", "1"];
    succeeds(here.train("alone", &settings, &[]));
    let begin = [&["--config", "small.toml"][..], &settings].concat();
    let seed = kill_until_it_ends_with(&here.place, "killed", (10, 1200.0), 7, |started| {
        let more = if started { &["--resume"][..] } else { &begin };
        here.command(&[&["train", "--data", "text.txt", "--device", "cuda", "--out", "killed"][..], more].concat(), &[])
    });
    assert_eq!(checkpoint(&here.place.path("alone"), 20), checkpoint(&here.place.path("killed"), 20), "seed {seed}");
    assert_eq!(metrics(&here.place.path("alone")), metrics(&here.place.path("killed")), "seed {seed}");
    // It goes on without the GPU, too.
    let more = ["train", "--data", "text.txt", "--device", "cpu", "--resume", "--out", "killed", "--steps", "22"];
    succeeds(here.run(&more, &[]));
    checkpoint(&here.place.path("killed"), 22);
}
