//! Opening a device.

use std::sync::Arc;

use moebius_backends::Backend;
use moebius_backends::cpu::Cpu;

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

    /// The backend behind it.
    pub fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// An empty set of parameters and state on this device.
    pub fn session(&self) -> Session {
        Session::new(self.clone())
    }
}
