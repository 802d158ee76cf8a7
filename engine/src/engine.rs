//! Opening a device.

use std::sync::Arc;

use moebius_backends::cpu::Cpu;
#[cfg(feature = "cuda")]
use moebius_backends::cuda::{Chip, Cuda, CudaError};
#[cfg(feature = "vulkan")]
use moebius_backends::vulkan::{Choice, Vulkan};
use moebius_backends::{Backend, Refusal};
use moebius_ir::{Graph, passes};

use crate::copies::refresh_of;
use crate::error::{Error, Result};
use crate::session::Session;

/// Bytes that a program takes on its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Parameters and state.
    pub state: u64,
    /// Everything else: activations, gradients, feeds, outputs, scratch memory.
    pub arena: u64,
}

impl Memory {
    /// Both together.
    pub fn total(&self) -> u64 {
        self.state.saturating_add(self.arena)
    }
}

/// A device that graphs can be compiled for.
#[derive(Clone)]
pub struct Engine {
    backend: Arc<dyn Backend>,
}

/// What is known of one backend on this machine.
#[derive(Clone, Debug)]
pub struct DeviceReport {
    /// The name to open it by.
    pub name: String,
    /// What the device is, or why it cannot be used.
    pub state: Result<String, String>,
}

impl Engine {
    /// Opens a device by name: `cpu`, `cuda` or `cuda:N` for an NVIDIA GPU, `vulkan`, `vulkan:N` or `vulkan:NAME` (a part of its name)
    /// for a device with a Vulkan driver, `auto` for the best one there is: the first NVIDIA GPU that the kernels run on, else a
    /// card with a Vulkan driver, else the CPU.
    ///
    /// # Errors
    /// [`Error::NoSuchDevice`] naming those that are there; [`Error::Backend`] if a GPU that is there cannot be used, also for
    /// `auto`: nobody should train on a processor beside an idle GPU without knowing.
    pub fn open(device: &str) -> Result<Engine> {
        match device {
            "cpu" => Engine::cpu(None),
            "auto" => Engine::best(),
            other => match (numbered(other, "cuda"), behind(other, "vulkan")) {
                (Some(ordinal), _) => Engine::cuda(ordinal),
                (None, Some(choice)) => Engine::vulkan(choice),
                (None, None) => Err(no_such(other)),
            },
        }
    }

    /// An NVIDIA GPU by its number, from 0.
    ///
    /// # Errors
    /// [`Error::Backend`] saying what is missing: the driver, the GPU, the compiler for kernels.
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: usize) -> Result<Engine> {
        let cuda = Cuda::open(ordinal).map_err(moebius_backends::Error::from)?;
        Ok(Engine::with_backend(Arc::new(cuda)))
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda(_ordinal: usize) -> Result<Engine> {
        Err(no_such("cuda"))
    }

    /// Why the products of a graph get the kernels that they get on `cuda` or `cuda:N`: what is explained, and a line for each product. Where
    /// that GPU is not there, it is explained for an H100.
    ///
    /// # Errors
    /// [`Error::NoSuchDevice`] for other devices, which have no such choice; [`Error::Graph`] and [`Error::Backend`] of the graph.
    #[cfg(feature = "cuda")]
    pub fn explain(device: &str, graph: &Graph) -> Result<(String, Vec<String>)> {
        let Some(ordinal) = numbered(device, "cuda") else { return Err(no_such(device)) };
        let (what, chip) = match Cuda::open(ordinal) {
            Ok(cuda) => (format!("{device} ({})", cuda.describe()), cuda.chip()),
            Err(e) => (format!("an H100, as {device} cannot be opened ({e})"), Chip::HOPPER),
        };
        Ok((what, Cuda::explain(passes::optimise(graph)?, chip)?))
    }

    /// Why the products of a graph get the kernels that they get; this program was built without the devices that have such a choice.
    ///
    /// # Errors
    /// [`Error::NoSuchDevice`].
    #[cfg(not(feature = "cuda"))]
    pub fn explain(device: &str, _graph: &Graph) -> Result<(String, Vec<String>)> {
        Err(no_such(device))
    }

    /// A device with a Vulkan driver, by its number from 0 or by a part of its name; the best one if nothing is said.
    ///
    /// # Errors
    /// [`Error::Backend`] saying what is missing: the loader, the device, a feature of it.
    #[cfg(feature = "vulkan")]
    pub fn vulkan(choice: Option<&str>) -> Result<Engine> {
        let vulkan = Vulkan::open(&Choice::parse(choice)).map_err(moebius_backends::Error::from)?;
        Ok(Engine::with_backend(Arc::new(vulkan)))
    }

    #[cfg(not(feature = "vulkan"))]
    fn vulkan(_choice: Option<&str>) -> Result<Engine> {
        Err(no_such("vulkan"))
    }

    #[cfg(feature = "cuda")]
    fn best() -> Result<Engine> {
        // Without a driver that works there is no GPU.
        if Cuda::count().is_ok_and(|n| n > 0) {
            match Cuda::open(0) {
                Ok(cuda) => return Ok(Engine::with_backend(Arc::new(cuda))),
                Err(CudaError::OldDevice { .. }) => {}
                Err(e) => return Err(moebius_backends::Error::from(e).into()),
            }
        }
        Engine::card_or_cpu()
    }

    #[cfg(not(feature = "cuda"))]
    fn best() -> Result<Engine> {
        Engine::card_or_cpu()
    }

    /// A card with a Vulkan driver, as opposed to a processor or the graphics of one; without one the CPU.
    #[cfg(feature = "vulkan")]
    fn card_or_cpu() -> Result<Engine> {
        match Vulkan::open(&Choice::Best) {
            Ok(vulkan) if vulkan.is_discrete() => Ok(Engine::with_backend(Arc::new(vulkan))),
            Ok(_) | Err(_) => Engine::cpu(None),
        }
    }

    #[cfg(not(feature = "vulkan"))]
    fn card_or_cpu() -> Result<Engine> {
        Engine::cpu(None)
    }

    /// The CPU, on `threads` threads; `None` means one per available core.
    ///
    /// # Errors
    /// [`Error::Backend`] if the threads cannot be started.
    pub fn cpu(threads: Option<usize>) -> Result<Engine> {
        Ok(Engine::with_backend(Arc::new(Cpu::new(threads)?)))
    }

    /// Any backend.
    pub fn with_backend(backend: Arc<dyn Backend>) -> Engine {
        Engine { backend }
    }

    /// Every backend this program knows, and whether it can be used here.
    pub fn devices() -> Vec<DeviceReport> {
        let state = Cpu::new(None).map(|cpu| cpu.describe()).map_err(|e| e.to_string());
        let mut devices = vec![DeviceReport { name: "cpu".into(), state }];
        devices.extend(gpus());
        devices.extend(vulkan_devices());
        devices
    }

    /// Name of the backend.
    pub fn name(&self) -> &'static str {
        self.backend.name()
    }

    /// What the device is, in words.
    pub fn describe(&self) -> String {
        self.backend.describe()
    }

    /// The same device with memory checks: buffers are filled with NaN before they are written, and a kernel that writes past
    /// the end of one is an error of [`Session::run`]. Slower; results have the same bits.
    ///
    /// # Errors
    /// [`Error::NoChecks`] if the backend has no such mode.
    pub fn checked(&self) -> Result<Engine> {
        let backend = self.backend.checked().ok_or(Error::NoChecks { device: self.name() })?;
        Ok(Engine { backend })
    }

    /// The memory that `graph` takes on the device, from its plan. Allocates nothing on the device.
    ///
    /// # Errors
    /// [`Error::Graph`] or [`Error::Backend`] if the graph is refused.
    pub fn memory(&self, graph: &Graph) -> Result<Memory> {
        let plan = self.backend.plan(passes::optimise(graph)?)?;
        Ok(Memory { state: plan.state_bytes() as u64, arena: plan.arena_bytes() as u64 })
    }

    /// [`Engine::memory`] of a [`crate::training_step`] with all that a [`crate::Trainer`] has beside it: where the step reads rounded
    /// copies of parameters, the scratch of the program that makes them, whose arena is one of its own.
    ///
    /// # Errors
    /// As [`Engine::memory`].
    pub fn training_memory(&self, step: &Graph) -> Result<Memory> {
        let Memory { state, arena } = self.memory(step)?;
        let refresh = refresh_of(step)?.map(|graph| self.memory(&graph)).transpose()?;
        Ok(Memory { state, arena: arena + refresh.map_or(0, |refresh| refresh.arena) })
    }

    /// Makes the device ready for many graphs at once: on a GPU their kernels are compiled side by side. Compiling a graph does not
    /// need this, and graphs that are not legal or that the device refuses are passed over: compiling them says why.
    ///
    /// # Errors
    /// [`Error::Backend`] if a kernel cannot be made.
    pub fn prepare(&self, graphs: impl IntoIterator<Item = Graph>) -> Result<()> {
        Ok(self.backend.prepare(&mut graphs.into_iter().filter_map(|graph| passes::optimise(&graph).ok()))?)
    }

    /// Bytes that can be allocated on the device now, where that can be told.
    pub fn free_memory(&self) -> Option<u64> {
        self.backend.free_memory()
    }

    /// Every node of `graph`, as the passes leave it, that the device cannot run; none if [`Session::compile`] would take it.
    /// Allocates nothing on the device.
    ///
    /// # Errors
    /// [`Error::Graph`] or [`Error::Backend`] if something other than the support of its nodes is wrong with the graph.
    pub fn refusals(&self, graph: &Graph) -> Result<Vec<Refusal>> {
        let planned = self.backend.plan(passes::optimise(graph)?).map_err(Error::from);
        match planned {
            Ok(_) => Ok(Vec::new()),
            Err(error) if error.refusals().is_empty() => Err(error),
            Err(error) => Ok(error.refusals().to_vec()),
        }
    }

    /// What the device has to tell since this was last asked: damaged files of a cache that were made anew and the like.
    pub fn take_notes(&self) -> Vec<String> {
        self.backend.take_notes()
    }

    /// The backend behind it.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// An empty set of parameters and state on this device.
    pub fn session(&self) -> Session {
        Session::new(self.clone())
    }
}

/// What stands behind `KIND:` in a name; `None` inside if the name is `KIND` alone.
fn behind<'a>(name: &'a str, kind: &str) -> Option<Option<&'a str>> {
    let rest = name.strip_prefix(kind)?;
    if rest.is_empty() { Some(None) } else { rest.strip_prefix(':').filter(|r| !r.is_empty()).map(Some) }
}

/// N of `KIND:N`; `KIND` alone is the first one.
fn numbered(name: &str, kind: &str) -> Option<usize> {
    behind(name, kind)?.map_or(Some(0), |n| n.parse().ok())
}

fn no_such(wanted: &str) -> Error {
    let there = Engine::devices().into_iter().filter(|d| d.state.is_ok()).map(|d| d.name).collect();
    Error::NoSuchDevice { wanted: wanted.into(), there }
}

/// Each NVIDIA GPU, or one line that says why there is none.
#[cfg(feature = "cuda")]
fn gpus() -> Vec<DeviceReport> {
    let describe = |i| Cuda::open(i).map(|cuda| cuda.describe());
    reports("cuda", Cuda::count(), "the driver shows no GPU", describe)
}

#[cfg(not(feature = "cuda"))]
fn gpus() -> Vec<DeviceReport> {
    reports::<&str>("cuda", Err(NOT_BUILT), "", |_| Err(NOT_BUILT))
}

/// Each device with a Vulkan driver, or one line that says why there is none.
#[cfg(feature = "vulkan")]
fn vulkan_devices() -> Vec<DeviceReport> {
    let describe = |i| Vulkan::open(&Choice::Number(i)).map(|vulkan| vulkan.describe());
    reports("vulkan", Vulkan::count(), "no driver shows a device", describe)
}

#[cfg(not(feature = "vulkan"))]
fn vulkan_devices() -> Vec<DeviceReport> {
    reports::<&str>("vulkan", Err(NOT_BUILT), "", |_| Err(NOT_BUILT))
}

/// Why there is no device of a kind that a feature left out.
#[cfg(not(all(feature = "cuda", feature = "vulkan")))]
const NOT_BUILT: &str = "this program was built without it";

/// Each device of a kind, or one line that says why there is none; `shows_none` if there are none.
fn reports<E: ToString>(
    kind: &str,
    count: std::result::Result<usize, E>,
    shows_none: &str,
    describe: impl Fn(usize) -> std::result::Result<String, E>,
) -> Vec<DeviceReport> {
    let none = |why: String| vec![DeviceReport { name: kind.into(), state: Err(why) }];
    match count {
        Err(e) => none(e.to_string()),
        Ok(0) => none(shows_none.into()),
        Ok(count) => (0..count)
            .map(|i| DeviceReport { name: format!("{kind}:{i}"), state: describe(i).map_err(|e| e.to_string()) })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_named_by_number_or_name() {
        let numbers = ["cuda", "cuda:0", "cuda:12", "cuda:", "cuda:x", "cuda1", "cpu"].map(|n| numbered(n, "cuda"));
        assert_eq!(numbers, [Some(0), Some(0), Some(12), None, None, None, None]);
        let names = ["vulkan", "vulkan:radeon", "vulkan:", "vulkans"].map(|n| behind(n, "vulkan"));
        assert_eq!(names, [Some(None), Some(Some("radeon")), None, None]);
    }

    #[test]
    fn a_gpu_that_is_not_there_says_why() {
        let Err(error) = Engine::open("cuda:999") else { panic!("a thousand GPUs") };
        let report = Engine::devices().into_iter().find(|d| d.name.starts_with("cuda"));
        let report = report.unwrap_or_else(|| panic!("CUDA is not listed"));
        match report.state {
            // The same words as in the list.
            Err(why) if cfg!(feature = "cuda") => {
                assert!(error.to_string().contains(&why) || why.contains("no GPU"), "{error}")
            }
            Err(_) => assert!(error.to_string().contains("cuda"), "{error}"),
            Ok(_) => assert!(error.to_string().contains("999"), "{error}"),
        }
    }
}
