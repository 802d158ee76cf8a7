//! Opening a device.

use std::sync::Arc;

use moebius_backends::cpu::Cpu;
use moebius_backends::{Backend, Refusal};
use moebius_ir::{Graph, passes};

use crate::error::{Error, Result};
use crate::session::Session;

/// A device that graphs can be compiled for.
#[derive(Clone)]
pub struct Engine {
    backend: Arc<dyn Backend>,
}

/// What is known of one backend on this machine.
#[derive(Clone, Debug)]
pub struct DeviceReport {
    /// The name to open it by.
    pub name: &'static str,
    /// What the device is, or why it cannot be used.
    pub state: Result<String, String>,
}

impl Engine {
    /// Opens a device by name: `cpu`, or `auto` for the best one there is.
    ///
    /// # Errors
    /// [`Error::NoSuchDevice`] naming those that are there.
    pub fn open(device: &str) -> Result<Engine> {
        match device {
            "auto" | "cpu" => Engine::cpu(None),
            other => {
                let there = Engine::devices().into_iter().filter(|d| d.state.is_ok()).map(|d| d.name.into()).collect();
                Err(Error::NoSuchDevice { wanted: other.into(), there })
            }
        }
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
        vec![DeviceReport { name: "cpu", state }]
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

    /// The backend behind it.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// An empty set of parameters and state on this device.
    pub fn session(&self) -> Session {
        Session::new(self.clone())
    }
}
