//! The program on a Vulkan device that something is wrong with: each time one clear error, an exit code that says so, and nothing
//! lost. The device is whatever the machine's loader shows, such as Mesa's processor; what stands between it and the program lets it
//! fail (`tests/emulator/vulkan.cpp`).
//!
//! Needs g++ on Linux and a loader with a device; elsewhere each test says that it did nothing.
#![cfg(target_os = "linux")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use crate::place::{Place, SMALL, checkpoint, json, metrics, stderr, stdout, succeeds};

/// The folder of what stands in for the loader, and the machine's own loader.
type Faulty = (PathBuf, PathBuf);

/// The machine's loader, where that of the system's list of libraries is.
fn loader() -> Option<PathBuf> {
    let list =
        Command::new("ldconfig").arg("-p").output().or_else(|_| Command::new("/sbin/ldconfig").arg("-p").output());
    let list = stdout(&list.ok()?);
    let line = list.lines().find(|l| l.trim_start().starts_with("libvulkan.so.1 ") && l.contains("x86-64"))?;
    Some(PathBuf::from(line.split(" => ").nth(1)?.trim()))
}

/// Built once; `None` if there is nothing to build it with or no device behind it.
#[expect(clippy::print_stderr, reason = "a test that did nothing should say so")]
fn faulty() -> Option<&'static Faulty> {
    static BUILT: OnceLock<Result<Faulty, &str>> = OnceLock::new();
    let build = || {
        let loader = loader().ok_or("there is no Vulkan loader")?;
        Command::new("g++").arg("--version").output().map_err(|_| "there is no g++")?;
        let listed = Place::new().run(&["devices", "--json"]);
        let devices = json(&succeeds(listed))["devices"].as_array().cloned().unwrap_or_default();
        let is_there = |d: &serde_json::Value| d["name"] == "vulkan:0" && d["available"] == true;
        if !devices.iter().any(is_there) {
            return Err("no driver shows a Vulkan device");
        }
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("faulty-vulkan");
        fs::create_dir_all(&folder).unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/emulator/vulkan.cpp");
        // Renamed when whole, as other suites may build it too.
        let made = folder.join(format!("made-{}", std::process::id()));
        let mut compiler = Command::new("g++");
        compiler.args(["-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"]).arg(source);
        let output = compiler.arg("-o").arg(&made).arg("-ldl").output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        fs::rename(made, folder.join("libvulkan.so.1")).unwrap();
        Ok((folder, loader))
    };
    match BUILT.get_or_init(build) {
        Ok(built) => Some(built),
        Err(why) => {
            eprintln!("not run: {why}");
            None
        }
    }
}

/// A place whose programs see the device with faults.
struct OnDevice<'a> {
    place: Place,
    faulty: &'a Faulty,
}

impl<'a> OnDevice<'a> {
    fn new(faulty: &'a Faulty) -> OnDevice<'a> {
        let place = Place::new();
        // One layer, so that few kernels are compiled and steps are short.
        let model = SMALL.replace("layers = 2", "layers = 1").replace("expert_interval = 2", "expert_interval = 1");
        fs::write(place.path("small.toml"), model).unwrap();
        OnDevice { place, faulty }
    }

    fn run(&self, args: &[&str], faults: &[(&str, &str)]) -> Output {
        let mut command = self.place.command(args);
        command.env("LD_LIBRARY_PATH", &self.faulty.0).env("MOEBIUS_VULKAN_LOADER", &self.faulty.1);
        command.env("MOEBIUS_CACHE", self.place.path("kept")).envs(faults.iter().copied());
        // What Mesa's processor makes of a kernel is kept by Mesa, not in ours.
        command.env("MESA_SHADER_CACHE_DIR", &self.faulty.0);
        command.output().unwrap()
    }

    fn train(&self, device: &str, out: &str, more: &[&str], faults: &[(&str, &str)]) -> Output {
        let args = ["train", "--config", "small.toml", "--data", "text.txt", "--device", device, "--out", out];
        self.run(&[&args[..], more].concat(), faults)
    }

    /// What training says that must fail with code 1 before it writes anything.
    fn refuses(&self, device: &str, more: &[&str], faults: &[(&str, &str)]) -> String {
        let output = self.train(device, "out", more, faults);
        let error = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{device}, {faults:?}: {error}");
        assert!(!error.contains("panicked") && !error.contains("a bug in moebius"), "{device}, {faults:?}: {error}");
        assert!(!self.place.path("out").exists(), "{device}, {faults:?}");
        error
    }
}

fn has_all(text: &str, parts: &[&str]) {
    assert!(parts.iter().all(|part| text.contains(part)), "wanted {parts:?}: {text}");
}

#[test]
fn a_loader_driver_or_feature_that_is_missing_is_named() {
    let Some(faulty) = faulty() else { return };
    let here = OnDevice::new(faulty);
    let bogus = here.place.path("bogus");
    fs::create_dir(&bogus).unwrap();
    fs::write(bogus.join("libvulkan.so.1"), "no library").unwrap();
    let bogus = bogus.display().to_string();
    for (faults, parts) in [
        (&[("LD_LIBRARY_PATH", bogus.as_str())][..], &["no Vulkan loader", "libvulkan.so.1", "too short"][..]),
        (
            &[("VK_ICD_FILENAMES", "/nowhere.json"), ("VK_DRIVER_FILES", "/nowhere.json")],
            &["no Vulkan driver", "mesa-vulkan-drivers"],
        ),
        (&[("MOEBIUS_VULKAN_LACKS", "1.2")], &["has Vulkan 1.1", "wanted Vulkan 1.2"]),
        (&[("MOEBIUS_VULKAN_LACKS", "timeline")], &["wanted timeline semaphores"]),
    ] {
        has_all(&here.refuses("vulkan", &[], faults), parts);
        // The list of devices says the same, and is no failure.
        let devices = stdout(&succeeds(here.run(&["devices"], faults)));
        has_all(&devices, parts);
        has_all(&devices, &["cpu ", "vulkan"]);
    }
    // What a device can do without is told, and refused where it is needed, with every node.
    let lacks = [("MOEBIUS_VULKAN_LACKS", "halves")];
    let devices = stdout(&succeeds(here.run(&["devices"], &lacks)));
    has_all(&devices, &["vulkan:0", "without floats of 16 bits", "subgroups of", "shared by a workgroup"]);
    let error = here.refuses("vulkan", &["--set", "model.dtype=\"bf16\""], &lacks);
    has_all(&error, &["the device cannot read and write bf16", "elementwise", "matmul"]);
}

#[test]
fn a_device_of_another_name_or_number_is_told_with_those_that_are_there() {
    let Some(faulty) = faulty() else { return };
    let here = OnDevice::new(faulty);
    let listed = json(&succeeds(here.run(&["devices", "--json"], &[])));
    let first = listed["devices"].as_array().unwrap().iter().find(|d| d["name"] == "vulkan:0").unwrap();
    let name = first["description"].as_str().unwrap().split(',').next().unwrap().to_owned();
    for (device, wanted) in [("vulkan:77", "number 77"), ("vulkan:no such card", "\"no such card\"")] {
        has_all(&here.refuses(device, &[], &[]), &["no Vulkan device", wanted, &format!("0: {name}")]);
    }
    // A part of the name is enough, whatever the case.
    let part = name.split(' ').next().unwrap().to_uppercase();
    succeeds(here.train(&format!("vulkan:{part}"), "named", &["--steps", "1"], &[]));
}

#[test]
fn too_little_memory_is_told_in_numbers_before_anything_is_written() {
    let Some(faulty) = faulty() else { return };
    let here = OnDevice::new(faulty);
    // Known beforehand: parameters and moments alone are more.
    let error = here.refuses("vulkan", &[], &[("MOEBIUS_VULKAN_FREE", "200000")]);
    has_all(&error, &["the program needs", "0.20 MB are free"]);
    // Others took it since the device was asked.
    let error = here.refuses("vulkan", &[], &[("MOEBIUS_VULKAN_MEMORY", "200000")]);
    has_all(&error, &["the device has too little memory", "needs 0.03 GB", "are free"]);
}

#[test]
fn a_device_that_is_lost_in_a_step_leaves_the_checkpoint_before_and_the_same_bits_after() {
    let Some(faulty) = faulty() else { return };
    let here = OnDevice::new(faulty);
    let settings = ["--checkpoint-every", "3", "--steps", "9"];
    succeeds(here.train("vulkan", "alone", &settings, &[]));
    // Which submission is in a step behind the first checkpoint depends on the model, and is found by trying.
    let (mut submission, mut in_step) = (60, false);
    while !in_step {
        let _ = fs::remove_dir_all(here.place.path("lost"));
        let output = here.train("vulkan", "lost", &settings, &[("MOEBIUS_VULKAN_LOST", &submission.to_string())]);
        let error = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "at {submission}: {error}");
        assert!(!error.contains("panicked"), "at {submission}: {error}");
        has_all(&error, &["the device was lost"]);
        let kept = here.place.path("lost/checkpoints/step-3").exists();
        in_step = kept && error.contains("did not end");
        if kept {
            has_all(&error, &["last good checkpoint is of step"]);
        }
        if in_step {
            has_all(&error, &["may be partly", "nothing on disk is affected"]);
        }
        submission += if kept { 5 } else { 40 };
    }
    let resume = ["train", "--data", "text.txt", "--device", "vulkan", "--resume", "--out", "lost"];
    succeeds(here.run(&resume, &[]));
    assert_eq!(checkpoint(&here.place.path("alone"), 9), checkpoint(&here.place.path("lost"), 9));
    assert_eq!(metrics(&here.place.path("alone")), metrics(&here.place.path("lost")));
    // The processor goes on from there.
    let more = ["train", "--data", "text.txt", "--device", "cpu", "--resume", "--out", "lost", "--steps", "11"];
    succeeds(here.run(&more, &[]));
    checkpoint(&here.place.path("lost"), 11);
}

#[test]
fn damaged_pipelines_on_disk_are_told_and_made_anew() {
    let Some(faulty) = faulty() else { return };
    let here = OnDevice::new(faulty);
    succeeds(here.train("vulkan", "run", &["--steps", "1"], &[]));
    let eval = ["eval", "--model", "run", "--data", "text.txt", "--device", "vulkan", "--json"];
    let whole = succeeds(here.run(&eval, &[]));
    assert!(!stderr(&whole).contains("damaged"), "{}", stderr(&whole));
    let files = || -> Vec<PathBuf> {
        fs::read_dir(here.place.path("kept/kernels")).unwrap().map(|e| e.unwrap().path()).collect()
    };
    assert!(files().len() > 10);
    for (i, path) in files().iter().enumerate() {
        let mut bytes = fs::read(path).unwrap();
        match i % 3 {
            0 => *bytes.last_mut().unwrap() ^= 1,
            1 => bytes.truncate(20),
            _ => bytes.clear(),
        }
        fs::write(path, bytes).unwrap();
    }
    let again = succeeds(here.run(&eval, &[]));
    has_all(&stderr(&again), &["damaged and made anew", "checksum", "too short", "kept/kernels"]);
    assert_eq!(json(&whole)["loss"], json(&again)["loss"]);
    assert!(!stderr(&succeeds(here.run(&eval, &[]))).contains("damaged"));
}
